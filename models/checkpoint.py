"""Networks from files of weights: what a file fixes is read off it, what the flags say differently is told."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.files import load_state_dict, readable
from models import BACKBONES, backbone_spec
from models.feature_net import BackboneNet, CocsrNet, FeatureNet, FeatureTransform, RotTransNet
from models.sparse.dictionary import CodingSpec, DictionaryBank

State = dict[str, Tensor]


def build_net(model: str, *, n_classes: int, simclr_dim: int, n_shifts: int, seed: int) -> FeatureNet:
    """A stage-1 network with fresh weights that depend on `seed` alone."""
    with _seeded(seed):
        backbone = backbone_spec(model).make()
        return FeatureNet(backbone, n_classes=n_classes, simclr_dim=simclr_dim, n_shifts=n_shifts)


def build_rot_trans(model: str, *, seed: int) -> RotTransNet:
    """A network of Rot+Trans with fresh weights that depend on `seed` alone."""
    with _seeded(seed):
        return RotTransNet(backbone_spec(model).make())


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Layers draw their weights from torch's global generator; it is put back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def load_pretrained(backbone: nn.Module, path: str, *, model: str) -> None:
    """Load `--pretrained_path`, a local file of weights, into a backbone; what a file has beyond it, a head, is left.

    Raises: UserError where the file does not hold every tensor of the backbone in its shape.
    """
    state = load_state_dict(Path(path), flag="pretrained_path")
    own = backbone.state_dict()
    missing = [k for k, v in own.items() if k not in state or state[k].shape != v.shape]
    if missing:
        raise UserError(
            f"--pretrained_path: {path} does not hold a {model}: {len(missing)} of {len(own)} tensors are missing or of"
            f" another shape, {missing[0]} for one"
        )
    backbone.load_state_dict({k: state[k] for k in own})


def find_weights(path: str, names: tuple[str, ...], *, flag: str) -> Path:
    """The file `path`, or where it is a folder the first of `names` in it.

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


def net_from_state(
    state: State,
    *,
    model: str,
    n_shifts: int | None,
    path: Path,
    flag: str,
    strict: bool = True,
    simclr_dim: int | None = None,
) -> FeatureNet:
    """A stage-1 network as the file has it: classes and projection size are read off the weights.

    n_shifts: what the shifts at hand need; None: whatever the file has.
    simclr_dim: what the user asked for; a line says so where the file differs.
    Raises: UserError where the file holds another model or another number of shifts.
    """
    try:
        n_classes, dim_there = len(state["linear.weight"]), len(state["simclr_layer.2.weight"])
        shifts_there = len(state["shift_cls_layer.weight"])
    except KeyError as error:
        raise UserError(f"--{flag}: {path} holds no weights of a stage-1 network (no {error})") from None
    if n_shifts not in (None, shifts_there):
        raise UserError(
            f"--{flag}: {path} was trained with {shifts_there} shifts, there are {n_shifts} here (--shift_trans_type)"
        )
    if simclr_dim not in (None, dim_there):
        print(f"note: --simclr_dim {simclr_dim}: {path} was trained with {dim_there}, which is used")
    net = build_net(model, n_classes=n_classes, simclr_dim=dim_there, n_shifts=shifts_there, seed=0)
    _load(net, state, model=model, path=path, flag=flag, strict=strict)
    return net


def rot_trans_from_state(state: State, *, model: str, path: Path, strict: bool = True) -> RotTransNet:
    """A network of Rot+Trans from a file. Raises: UserError where the file holds something else."""
    if "rotation.weight" not in state:
        raise UserError(f"--load_path: {path} was not made by train.py --mode rot_trans")
    net = build_rot_trans(model, seed=0)
    _load(net, state, model=model, path=path, flag="load_path", strict=strict)
    return net


def _load(net: BackboneNet, state: State, *, model: str, path: Path, flag: str, strict: bool) -> None:
    """Fill `net`, wholly or without `strict` with what fits. Raises: UserError where it does not fit."""
    own = net.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    if not strict:
        if not any(k in fitting for k in net.backbone.state_dict()):
            raise UserError(f"--no_strict: no tensor of a {model} fits {path}{_guess(state)}")
        fresh = [k for k in own if k not in fitting]
        print(f"--no_strict: loaded {len(fitting)} of {len(own)} tensors; fresh: {', '.join(fresh) or 'none'}")
    elif len(fitting) < len(own) or len(fitting) < len(state):
        raise UserError(f"--model: {path} does not hold a {model}{_guess(state)}; --no_strict loads what fits")
    net.load_state_dict(fitting, strict=strict)


def _guess(state: State) -> str:
    for name in BACKBONES:
        other = build_rot_trans(name, seed=0).backbone.state_dict()
        if all(k in state and state[k].shape == v.shape for k, v in other.items()):
            return f" but a {name}"
    return ""


def cocsr_from_state(
    state: State,
    *,
    model: str,
    n_shifts: int,
    transform: FeatureTransform,
    steps: int,
    tol: float | None = None,
    path: Path,
    strict: bool = True,
    simclr_dim: int | None = None,
) -> CocsrNet:
    """A stage-2 network as the file has it; rho, lambda and the number of atoms are the file's.

    Raises: UserError where the file is of stage 1, or its dictionaries are not for this network and these shifts.
    """
    if "sr_nets.dictionary" not in state:
        raise UserError(f"--load_path: {path} holds no dictionaries; give a last.cocsr_model, made by train_cocsr.py")
    feature_state = {k.removeprefix("feature_net."): v for k, v in state.items() if k.startswith("feature_net.")}
    net = net_from_state(
        feature_state,
        model=model,
        n_shifts=n_shifts,
        path=path,
        flag="load_path",
        strict=strict,
        simclr_dim=simclr_dim,
    )
    dictionary = state["sr_nets.dictionary"]
    size = transform.size(net)
    if dictionary.ndim != 3 or dictionary.shape[:2] != (n_shifts, size):
        raise UserError(
            f"--load_path: dictionaries of {path} have shape {tuple(dictionary.shape)}, not ({n_shifts}, {size}, atoms)"
        )
    settings = [state.get(f"sr_nets.{name}", torch.tensor(torch.nan)) for name in ("lambdaV", "rho")]
    if any(value.numel() != 1 or not value > 0 for value in settings):
        raise UserError(f"--load_path: {path} lacks the lambda and rho of its dictionaries (sr_nets.lambdaV, .rho > 0)")
    coding = CodingSpec(lam=float(settings[0]), rho=float(settings[1]), steps=steps, tol=tol)
    bank = DictionaryBank(n_shifts, size, dictionary.shape[2], coding)
    bank.load_state_dict({name: state[f"sr_nets.{name}"] for name in bank.state_dict()})
    return CocsrNet(net, bank, transform)
