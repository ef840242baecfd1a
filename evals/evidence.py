"""What each family of evaluation modes gathers from an image, and from which network. `Evidence` rows are below.

Letters: N images, K shifts, F feature size, M atoms.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.dist import SINGLE, World
from common.errors import UserError
from common.files import load_state_dict
from common.flags import Flags, pick
from common.seed import generator
from datasets import ShiftSpec
from datasets.augment import AlignedSpec
from datasets.shifts import Shift, rotations_and_translations
from evals.features import Outputs, class_outputs, cocsr_outputs, code_outputs, net_outputs
from models.checkpoint import State, find_weights, load_net
from models.feature_net import CocsrNet, Features, FeatureTransform
from models.sparse.dictionary import CodingSpec, DictionaryBank
from models.sparse.learn import learn_dictionary

# Codes in fitted dictionaries: at most so many ADMM steps, or to this gap relative to lambda (ICS 2020).
_FITTED_STEPS, _FITTED_TOL = 500, 1e-3


@dataclass(frozen=True)
class Finished:
    """What the scores see: a function on draw-averaged outputs, and the dictionaries (K, F, M) and the l1 weight, in
    and by which they were coded."""

    finish: Callable[[Outputs], Outputs]
    dictionary: Tensor | None = None
    lam: float | None = None


def _as_they_are(flags: Flags, net: nn.Module, train: Outputs, world: World = SINGLE) -> Finished:
    return Finished(lambda outputs: outputs)


@dataclass(frozen=True)
class Evidence:
    """One row.

    scores: that can be made of it, the default first. weights: names of checkpoint files.
    shifts: (flags, names of the scores) -> what every image is looked at under. plain: without augmentation, once.
    read: (flags, state dict, its file, K) -> network. outputs: network -> (views -> Outputs).
    finish: (flags, network, training outputs, world) -> what is made of averaged outputs, the same in all processes.
    fitted: whether scores are fitted to the normal training images; else nobody looks at them.
    """

    scores: tuple[str, ...]
    weights: tuple[str, ...]
    shifts: Callable[[Flags, Sequence[str]], list[Shift]]
    read: Callable[[Flags, State, Any, int], nn.Module]
    outputs: Callable[[Any], Callable[[Tensor], Outputs]]
    finish: Callable[[Flags, Any, Outputs, World], Finished] = _as_they_are
    plain: bool = False
    fitted: bool = True

    def load(self, flags: Flags, shifts: int) -> tuple[nn.Module, Any]:
        """The network of --load_path and its file. Raises: UserError for a missing, damaged or unfitting file."""
        if not flags.load_path:
            raise UserError(f"--load_path: which weights to evaluate? Give a run folder or its {self.weights[0]}")
        path = find_weights(flags.load_path, self.weights, flag="load_path")
        return self.read(flags, load_state_dict(path, flag="load_path"), path, shifts), path


def _trained_shifts(flags: Flags, names: Sequence[str]) -> list[Shift]:
    return ShiftSpec.of(flags).functions(pick(AlignedSpec, flags))


def _label_shifts(flags: Flags, names: Sequence[str]) -> list[Shift]:
    """The four rotations where something is marginalised over them, else the image as it is."""
    return ShiftSpec("rotation" if any("marginalized" in name for name in names) else "none").functions()


def _common(flags: Flags, path: Any) -> dict[str, Any]:
    given = {"simclr_dim": flags.simclr_dim} if flags.given("simclr_dim") else {}
    return {"model": flags.model, "path": path, "flag": "load_path", "strict": not flags.no_strict, **given}


def _read_stage1(flags: Flags, state: State, path: Any, shifts: int | None) -> nn.Module:
    # A stage-2 file holds the whole stage-1 network.
    inner = {k.removeprefix("feature_net."): v for k, v in state.items() if not k.startswith("sr_nets.")}
    return load_net("feature", inner, n_shifts=shifts, **_common(flags, path))


def _read_labelled(flags: Flags, state: State, path: Any, shifts: int) -> nn.Module:
    """However many shifts the network was trained with: its shift head is not asked."""
    return _read_stage1(flags, state, path, None)


def _read_stage2(flags: Flags, state: State, path: Any, shifts: int) -> nn.Module:
    transform, steps, tol = pick(FeatureTransform, flags), flags.sr_admm_stage, flags.sr_tol
    common = _common(flags, path)
    net = load_net("cocsr", state, n_shifts=shifts, transform=transform, steps=steps, tol=tol, **common)
    # The file's dictionary settings count; say so where a flag was given that differs.
    bank = net.sr_nets
    there = {"sr_lambda": bank.coding.lam, "sr_rho": bank.coding.rho, "sr_dict_size": bank.dictionary.shape[2]}
    for name, value in there.items():
        if flags.given(name) and abs(getattr(flags, name) - value) > 1e-6 * abs(value):
            print(f"note: --{name} {getattr(flags, name)}: {path} was trained with {value:.6g}, which is used")
    return net


def _read_rot_trans(flags: Flags, state: State, path: Any, shifts: int) -> nn.Module:
    return load_net("rot_trans", state, model=flags.model, path=path, flag="load_path", strict=not flags.no_strict)


def _trained_dictionary(flags: Flags, net: CocsrNet, train: Outputs, world: World = SINGLE) -> Finished:
    return Finished(lambda outputs: outputs, net.sr_nets.dictionary.detach().cpu(), net.sr_nets.coding.lam)


def _fitted_dictionary(flags: Flags, net: nn.Module, train: Outputs, world: World = SINGLE) -> Finished:
    """Dictionaries fitted to the averaged features of the training images, after stage 1 (Lee et al., ICS 2020)."""
    transform = pick(FeatureTransform, flags)
    device = next(net.parameters()).device
    coding = CodingSpec(flags.sr_lambda, flags.sr_rho, _FITTED_STEPS, tol=_FITTED_TOL)

    def sparse_features(outputs: Outputs) -> Tensor:
        """s (N, K, F)"""
        rows = [outputs[name].mean(1).flatten(0, 1) for name in ("h", "z", "shift")]
        return transform(Features(*rows)).unflatten(0, (len(outputs["h"]), -1)).to(device)

    s_KFN = sparse_features(train).permute(1, 2, 0)
    print(f"fitting {flags.sr_dict_size} atoms for each of {len(s_KFN)} shifts to {s_KFN.shape[2]} images", flush=True)
    fit = {"lam": coding.lam, "rho": coding.rho, "steps": flags.sr_fit_steps}
    atoms = flags.sr_dict_size
    bank = DictionaryBank(len(s_KFN), s_KFN.shape[1], atoms, coding).requires_grad_(False).to(device)
    if world.is_main:
        bank.dictionary.copy_(learn_dictionary(s_KFN, atoms, generator=generator(flags.seed, "multi_sr"), **fit))
    world.broadcast(bank.parameters())
    system = bank.system()

    def finish(outputs: Outputs) -> Outputs:
        blocks = sparse_features(outputs).split(4096)
        parts = [code_outputs(bank, block, system) for block in blocks]
        coded = {name: torch.cat([part[name] for part in parts])[:, None].cpu() for name in parts[0]}
        return {**coded, "shift": outputs["shift"]}

    return Finished(finish, bank.dictionary.cpu(), coding.lam)


_STAGE1_FILES = ("last.model", "last.cocsr_model")
_SPARSE_SCORES = ("CSI_sr", "simclr_sr")

CONTRASTIVE = Evidence(("CSI", "simclr", "knn", "ocsvm"), _STAGE1_FILES, _trained_shifts, _read_stage1, net_outputs)
SPARSE = Evidence(
    _SPARSE_SCORES, ("last.cocsr_model",), _trained_shifts, _read_stage2, cocsr_outputs, _trained_dictionary
)
MULTI_SR = Evidence(_SPARSE_SCORES, _STAGE1_FILES, _trained_shifts, _read_stage1, net_outputs, _fitted_dictionary)
LABELLED = Evidence(
    ("baseline", "baseline_marginalized"),
    ("last.model",),
    _label_shifts,
    _read_labelled,
    class_outputs,
    plain=True,
    fitted=False,
)
ROT_TRANS = Evidence(
    ("rot_trans",),
    ("last.model",),
    lambda flags, names: rotations_and_translations(),
    _read_rot_trans,
    net_outputs,
    plain=True,
    fitted=False,
)
