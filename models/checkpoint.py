"""The kinds of networks, built with fresh weights or from files.

A file's state dict fixes the sizes of its network; flags that differ from them are reported.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.files import load_state_dict, readable
from common.flags import Flags
from models import BACKBONES, backbone_spec
from models.autoencoder.networks import AutoencoderSpec
from models.autoencoder.robust_net import RobustNet
from models.feature_net import Classifier, CocsrNet, FeatureNet, FeatureTransform, RotTransNet
from models.level_net import LevelNet
from models.mean_sparse import insert_as, operator_names, with_own_buffers
from models.resnet import StagedNet
from models.reverse_attention import RaClassifier
from models.robustbench import from_robustbench
from models.sparse.dictionary import CodingSpec, DictionaryBank

State = dict[str, Tensor]


class Misfit(Exception):
    """Why a state dict is not one of a certain kind; `load_net` puts the flag and the file's path before it."""


@dataclass(frozen=True)
class NetKind:
    """One kind of network, a row of `NETS`.

    markers: keys by which a state dict of this kind is recognised.
    absent: the error for a file without one of them, {key}.
    excluded: keys that say that it is of another kind, each with its error.
    build(model, **sizes): the network with fresh weights, drawn by torch's global generator. Takes what `sizes` returns
        and, as further keyword arguments, what no file fixes.
    sizes(state): what a state dict with the markers fixes; the names are those of the flags. Raises: Misfit.
    must_agree: sizes for which a file with another value than asked for is an error, with its text ({file}, {asked}).
        Of other sizes the file's value is used, and a note says so.
    inner: name of the submodule with the backbone, to which `--no_strict` applies. The tensors outside it must all be
        in the file. Empty: the whole network.
    named_by: the flag that says which network it is.
    """

    markers: tuple[str, ...]
    absent: str
    build: Callable[..., nn.Module]
    sizes: Callable[[State], dict[str, Any]]
    must_agree: Mapping[str, str] = field(default_factory=dict)
    inner: str = ""
    named_by: str = "model"
    excluded: Mapping[str, str] = field(default_factory=dict)

    def read_sizes(self, state: State) -> dict[str, Any]:
        """`sizes` of any state dict. Raises: Misfit where a marker is missing, and where an excluded key is there."""
        for key in self.markers:
            if key not in state:
                raise Misfit(self.absent.format(key=key))
        for key, text in self.excluded.items():
            if key in state:
                raise Misfit(text)
        return self.sizes(state)


def _build_feature(model: str, **sizes: Any) -> FeatureNet:
    return FeatureNet(backbone_spec(model).make(), **sizes)


def _feature_sizes(state: State) -> dict[str, Any]:
    # Linear layers alternate with activations.
    last = max(int(found[1]) for key in state if (found := re.fullmatch(r"simclr_layer\.(\d+)\.weight", key)))
    return {
        "n_classes": len(state["linear.weight"]),
        "simclr_dim": len(state[f"simclr_layer.{last}.weight"]),
        "n_shifts": len(state["shift_cls_layer.weight"]),
        "projector_layers": last // 2 + 1,
        "stage_heads": any(key.startswith("stage_layers.") for key in state),
    }


def _build_classifier(model: str, *, n_classes: int) -> Classifier:
    return Classifier(backbone_spec(model).make(), n_classes=n_classes)


def _build_ra_classifier(model: str, *, n_classes: int, ra_blocks: int | None = None) -> RaClassifier:
    backbone = backbone_spec(model).make()
    if not isinstance(backbone, StagedNet):
        raise UserError(f"--model {model}: no reverse attention for it; there is for {_ATTENTIVE}")
    if ra_blocks is not None:
        # A file may be of another backbone, which is found when its tensors are loaded.
        ra_blocks = min(ra_blocks, len(backbone.layers()[-1]))
    return RaClassifier(backbone, n_classes=n_classes, ra_blocks=ra_blocks)


def _ra_sizes(state: State) -> dict[str, Any]:
    blocks = state["ra_blocks"]
    if blocks.numel() != 1 or int(blocks) < 1:
        raise Misfit(f"is corrupt: its tensor ra_blocks is {blocks.tolist()}")
    return {"n_classes": len(state["linear.weight"]), "ra_blocks": int(blocks)}


# With which backbones, in an error message.
_ATTENTIVE = "resnet8, resnet18, wrn28_10, wrn34_10, preact18_64 and their kin"


def _build_rot_trans(model: str) -> RotTransNet:
    return RotTransNet(backbone_spec(model).make())


def autoencoder_spec(flags: Flags) -> AutoencoderSpec:
    """From the flags; reads only those that the network of --autoencoder has."""
    kind = flags.of(AutoencoderSpec, only=["autoencoder"]).autoencoder
    own = list(_AUTOENCODER_FLAGS[kind])
    if kind == "vae" and flags.of(AutoencoderSpec, only=["likelihood"]).likelihood == "gaussian":
        own.append("sigma")
    return flags.of(AutoencoderSpec, only=["autoencoder", "layers", *own])


# Besides --layers.
_AUTOENCODER_FLAGS = {
    "dense": ("activation", "output", "tied"),
    "conv": ("widths", "activation", "output"),
    "vae": ("activation", "likelihood", "beta"),
    "svd": (),
}


def _build_autoencoder(
    kind: str, *, rows: int, features: int, shape: tuple[int, int, int] | None, spec: AutoencoderSpec
) -> RobustNet:
    return RobustNet(spec.build(kind, features, shape), rows, features, shape)


def _autoencoder_sizes(state: State) -> dict[str, Any]:
    rows, features = state["S"].shape
    return {"rows": rows, "features": features, "shape": tuple(state["image_shape"].tolist()) or None}


def _build_cocsr(
    model: str,
    *,
    sr_dict_size: int,
    sr_lambda: float,
    sr_rho: float,
    transform: FeatureTransform,
    steps: int,
    tol: float | None = None,
    **sizes: int,
) -> CocsrNet:
    net = _build_feature(model, **sizes)
    coding = CodingSpec(lam=sr_lambda, rho=sr_rho, steps=steps, tol=tol)
    bank = DictionaryBank(sizes["n_shifts"], transform.size(net), sr_dict_size, coding)
    return CocsrNet(net, bank, transform)


def _cocsr_sizes(state: State) -> dict[str, Any]:
    sizes = NETS["feature"].read_sizes(_below("feature_net", state))
    dictionary = state["sr_nets.dictionary"]
    if dictionary.ndim != 3:
        raise Misfit(f"has dictionaries of shape {tuple(dictionary.shape)}, not (shifts, features, atoms)")
    settings = [state.get(f"sr_nets.{name}", torch.tensor(torch.nan)) for name in ("lambdaV", "rho")]
    if any(value.numel() != 1 or not value > 0 for value in settings):
        raise Misfit("lacks the lambda and rho of its dictionaries (sr_nets.lambdaV, .rho > 0)")
    lam, rho = map(float, settings)
    return {**sizes, "sr_dict_size": dictionary.shape[2], "sr_lambda": lam, "sr_rho": rho}


def _build_levels(
    model: str, *, stage1: str, stage1_sizes: dict[str, int], sizes: dict[str, int], atoms: int, known: Any
) -> LevelNet:
    net: Any = NETS[stage1].build(model, **stage1_sizes)
    return LevelNet(net, sizes, atoms, known)


def _levels_sizes(state: State) -> dict[str, Any]:
    inner = _below("feature_net", state)
    try:
        stage1 = kind_of(inner)
    except ValueError:
        raise Misfit("is corrupt: it lacks the network of stage 1") from None
    suffix = ".bank.dictionary"
    levels = {k.removeprefix("levels.").removesuffix(suffix): x for k, x in state.items() if k.endswith(suffix)}
    atoms = {x.shape[-1] for x in levels.values()}
    if state["known"].ndim != 3 or any(x.ndim != 3 for x in levels.values()) or len(atoms) != 1:
        raise Misfit("is corrupt: its dictionaries do not fit together")
    return {
        "stage1": stage1,
        "stage1_sizes": NETS[stage1].read_sizes(inner),
        "sizes": {name: x.shape[1] for name, x in levels.items()},
        "atoms": atoms.pop(),
        "known": tuple(state["known"].shape),
    }


_SHIFTS_AGREE = {"n_shifts": "was trained with {file} shifts, there are {asked} here (--shift_trans_type)"}

NETS: dict[str, NetKind] = {
    "feature": NetKind(
        markers=("linear.weight", "simclr_layer.2.weight", "shift_cls_layer.weight"),
        absent="holds no weights of a stage-1 network (no {key!r})",
        build=_build_feature,
        sizes=_feature_sizes,
        must_agree=_SHIFTS_AGREE,
    ),
    "classifier": NetKind(
        markers=("linear.weight",),
        absent="holds no classifier (no {key!r})",
        build=_build_classifier,
        sizes=lambda state: {"n_classes": len(state["linear.weight"])},
        excluded={"ra_blocks": "holds a classifier with reverse attention; give one without"},
    ),
    "ra_classifier": NetKind(
        markers=("linear.weight", "ra_blocks"),
        absent="holds no classifier with reverse attention (no {key!r})",
        build=_build_ra_classifier,
        sizes=_ra_sizes,
    ),
    "rot_trans": NetKind(
        markers=("rotation.weight",),
        absent="was not made by train.py --mode rot_trans",
        build=_build_rot_trans,
        sizes=lambda state: {},
    ),
    "cocsr": NetKind(
        markers=("sr_nets.dictionary",),
        absent="holds no dictionaries; give a last.cocsr_model, made by train_cocsr.py",
        build=_build_cocsr,
        sizes=_cocsr_sizes,
        must_agree=_SHIFTS_AGREE,
        inner="feature_net",
    ),
    "levels": NetKind(
        markers=("known", "deviations", "weights"),
        absent="was not made by train_cocsr.py --mode level_dict",
        build=_build_levels,
        sizes=_levels_sizes,
        inner="feature_net",
    ),
    "autoencoder": NetKind(
        markers=("L", "S", "threshold", "image_shape"),
        absent="was not made by train.py --mode rdae, dae or vae",
        build=_build_autoencoder,
        sizes=_autoencoder_sizes,
        named_by="autoencoder",
    ),
}


def kind_of(state: State) -> str:
    """The kind of network that a state dict holds: of the rows whose markers are all there, the one with the most.

    Raises: ValueError where there is none.
    """
    fitting = [kind for kind, row in NETS.items() if all(key in state for key in row.markers)]
    if not fitting:
        raise ValueError(f"the state dict is of none of these networks: {', '.join(NETS)}")
    return max(fitting, key=lambda kind: len(NETS[kind].markers))


def recorded_sizes(net: nn.Module) -> dict[str, int]:
    """The whole-number sizes that a file of this network fixes, under their flags' names; none for other networks."""
    state = net.state_dict()
    try:
        sizes = NETS[kind_of(state)].read_sizes(state)
    except ValueError:
        return {}
    return {name: value for name, value in sizes.items() if isinstance(value, int)}


def build_net(kind: str, model: str, *, seed: int, **sizes: Any) -> Any:
    """A network with fresh weights that depend on `seed` alone, of the class that the row `kind` of `NETS` builds.

    sizes: keyword arguments of the row's `build`.
    """
    with _seeded(seed):
        return NETS[kind].build(model, **sizes)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator, from which layers draw their weights, and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def load_pretrained(backbone: nn.Module, path: str, *, model: str) -> None:
    """Load `--pretrained_path`, a local file of weights, into a backbone; further tensors of the file are ignored.

    Raises: UserError where the file does not hold every tensor of the backbone in its shape.
    """
    state = load_state_dict(Path(path), flag="pretrained_path")
    own = backbone.state_dict()
    missing = [k for k, v in own.items() if k not in state or not _fits(v, state[k])]
    if missing:
        raise UserError(
            f"--pretrained_path: {path} does not hold a {model}: {len(missing)} of {len(own)} tensors are missing or of"
            f" another shape, {missing[0]} for one"
        )
    backbone.load_state_dict({k: state[k] for k in own})


def find_weights(path: str, names: tuple[str, ...], *, flag: str) -> Path:
    """The file `path`, or if it is a folder the first of `names` in it.

    Raises: UserError that names `flag` where there is none.
    """
    place = Path(path)
    with readable(place, flag):
        if place.is_dir():
            for name in names:
                if (place / name).is_file():
                    return place / name
            raise UserError(f"--{flag}: no {' or '.join(names)} in {place}")
        if not place.is_file():
            raise UserError(f"--{flag}: no checkpoint at {place}")
    return place


def read_state(path: Path, *, flag: str) -> State:
    """The state dict of a file of weights; RobustBench's under our names. Raises: UserError as `load_state_dict`."""
    return with_own_buffers(from_robustbench(load_state_dict(path, flag=flag)))


def load_net(
    kind: str, state: State, *, model: str, path: Path, flag: str, strict: bool = True, **expected: Any
) -> Any:
    """A network from a state dict, of the class that the row `kind` of `NETS` builds, with the sizes of the file.

    expected: sizes that the user asks for (None: whatever the file has), and further arguments of the row's `build`.
    A file with operators of MeanSparse gives a network with them.
    strict: every tensor must fit; without it, those that fit are loaded, and the names of the others are printed.
    Raises: UserError, beginning with `flag` and `path`, where the file holds another kind of network, non-finite
    numbers, or a size that differs and must agree; UserError where its tensors do not fit.
    """
    row = NETS[kind]
    try:
        _check_finite(state)
        sizes = row.read_sizes(state)
        asked = {name: value for name, value in expected.items() if name in sizes and value is not None}
        differ = {name: value for name, value in asked.items() if _differ(value, sizes[name])}
        for name, text in row.must_agree.items():
            if name in differ:
                raise Misfit(text.format(file=sizes[name], asked=differ[name]))
        for name, value in differ.items():
            there = f"{sizes[name]:.6g}" if isinstance(sizes[name], float) else sizes[name]
            print(f"note: --{name} {value}: {path} was trained with {there}, which is used")
        others = {name: value for name, value in expected.items() if name not in sizes}
        net = build_net(kind, model, seed=0, **sizes, **others)
        state = _same_normalisation(net, state)
        _insert_operators(net.get_submodule(row.inner), _below(row.inner, state))
        _load_backbone_and_heads(
            net.get_submodule(row.inner),
            _below(row.inner, state),
            named_by=row.named_by,
            model=model,
            path=path,
            strict=strict,
        )
        if row.inner:
            _load_rest(net, state, row.inner)
    except Misfit as why:
        raise UserError(f"--{flag}: {path} {why}") from None
    return net


def _same_normalisation(net: nn.Module, state: State) -> State:
    """The state dict without the normalisation of inputs, where the backbone decides that.

    Raises: Misfit where a file says another.
    """
    own = net.state_dict()
    for name in ("input_mean", "input_std"):
        if name in state and name not in own and isinstance(getattr(net, name, None), Tensor):
            there, here = (values.flatten().tolist() for values in (state[name], getattr(net, name)))
            if len(there) != len(here) or any(abs(a - b) > 1e-3 for a, b in zip(there, here, strict=True)):
                raise Misfit(f"is of inputs normalised with {name} {_rounded(there)}, the model has {_rounded(here)}")
            state = {key: value for key, value in state.items() if key != name}
    return state


def _rounded(values: list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _insert_operators(net: nn.Module, state: State) -> None:
    """Those of MeanSparse that a file has. Raises: Misfit where the network has no such places."""
    names = operator_names(state)
    if names:
        try:
            insert_as(net, names)
        except ValueError as why:
            raise Misfit(str(why)) from None


def _check_finite(state: State) -> None:
    """Raises: Misfit for a tensor of which an entry is NaN or infinite."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise Misfit(f"is corrupt: its tensor {name} holds non-finite numbers")


def _differ(asked: Any, there: Any) -> bool:
    """Whether two values differ; floats by more than the rounding of a float32 in the file."""
    return not math.isclose(asked, there, rel_tol=1e-6) if isinstance(there, float) else asked != there


def _below(name: str, state: State) -> State:
    """The state dict of the submodule `name`; of the whole network where that is empty."""
    prefix = f"{name}." if name else ""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _load_backbone_and_heads(
    net: nn.Module, state: State, *, named_by: str, model: str, path: Path, strict: bool
) -> None:
    """Load all tensors, or without `strict` those that fit.

    Raises: UserError where they do not fit; Misfit for settings of a layer that are out of range.
    """
    own = net.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and _fits(own[k], v)}
    if not strict:
        if not any(k in fitting for k in getattr(net, "backbone", net).state_dict()):
            raise UserError(f"--no_strict: no tensor of a {model} fits {path}{_guess(state)}")
        fresh = [k for k in own if k not in fitting]
        print(f"--no_strict: loaded {len(fitting)} of {len(own)} tensors; fresh: {', '.join(fresh) or 'none'}")
    elif len(fitting) < len(own) or len(fitting) < len(state):
        what = model if named_by == "model" else f"{model} {named_by} of these sizes"
        raise UserError(f"--{named_by}: {path} does not hold a {what}{_guess(state)}; --no_strict loads what fits")
    try:
        net.load_state_dict(fitting, strict=strict)
    except ValueError as why:  # Of a layer that checks the settings which a file has of it.
        raise Misfit(f"is corrupt: {why}") from None


def _fits(own: Tensor, saved: Tensor) -> bool:
    """Whether a file's tensor is one of this network's. An empty one takes its size from the file."""
    return own.shape == saved.shape or own.numel() == 0


def _load_rest(net: nn.Module, state: State, inner: str) -> None:
    """Load all tensors outside the submodule `inner`. Raises: Misfit where one is missing or of another shape."""
    rest = {key: value for key, value in net.state_dict().items() if not key.startswith(f"{inner}.")}
    for key, value in rest.items():
        if key not in state:
            raise Misfit(f"lacks {key}")
        shape = state[key].shape
        if shape != value.shape and not shape.numel() == value.numel() == 1:
            raise Misfit(f"has {key} of shape {tuple(shape)}, not {tuple(value.shape)}")
    net.load_state_dict({key: state[key].view(value.shape) for key, value in rest.items()}, strict=False)


def _guess(state: State) -> str:
    """Which model of `BACKBONES` a state dict holds, as the end of an error message; empty where it holds none."""
    fitting = {}
    for name, spec in BACKBONES.items():
        with torch.device("meta"):  # Shapes only: no memory, no random draws.
            own = spec.make().state_dict()
        if all(key in state and _fits(value, state[key]) for key, value in own.items()):
            fitting[name] = len(own)
    # The tensors of a resnet18 are among those of a resnet34.
    return f" but a {max(fitting, key=fitting.__getitem__)}" if fitting else ""
