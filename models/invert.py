"""Looking inside a network of sparse coding layers: what each layer makes of its input, and the way back to images.

A code z is taken back by synthesis A(z), batch normalisation by its inverse. What a code did not explain is lost, so
that the images show what the layers have kept (Dai et al., NeurIPS 2022, section 2.10 of the specification: networks
whose blocks are chains of sparse coding and batch normalisation).

Letters: B images, C channels and H, W pixels; M atoms of a layer.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.csc import CSC2d
from models.mode import evaluation_mode

# Below this size of gamma the inverse of a batch normalisation is noise.
_LEAST_GAMMA = 1e-8
_TINY = 1e-12

STEM = "stem"


def batch_norm_inverse(bn: nn.BatchNorm2d, y: Tensor, name: str = "the layer", *, offset: bool = True) -> Tensor:
    """The input (B, M, H, W) of a batch normalisation in evaluation mode, from its output y.

    offset: without, y is a difference of two outputs, and what is returned the difference of their inputs.
    name: of the layer, for errors. Raises: ValueError for a layer without running statistics, and for one that has a
    channel with |gamma| < 1e-8.
    """
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError(f"{name} has no running statistics, by which its inverse is defined")
    scale, shift = (bn.running_var + bn.eps).sqrt(), torch.zeros_like(bn.running_mean)
    if bn.affine:
        tiny = (bn.weight.abs() < _LEAST_GAMMA).nonzero()[:, 0].tolist()
        if tiny:
            gamma = bn.weight[tiny[0]].item()
            raise ValueError(f"channel {tiny[0]} of {name} has gamma {gamma:.3g}, without inverse")
        scale, shift = scale / bn.weight, bn.bias
    scale, shift, mean = (values.view(-1, 1, 1) for values in (scale, shift, bn.running_mean))
    return (y - shift) * scale + mean if offset else y * scale


class CodingLayer(NamedTuple):
    """A sparse coding layer and the batch normalisation behind it, if there is one, with their names."""

    csc: CSC2d
    norm: nn.BatchNorm2d | None = None
    norm_name: str = ""


class Tap(NamedTuple):
    """A place from which a network can be inverted.

    output: name of the module whose output is taken back. layers: all between images and that output, in order.
    """

    output: str
    layers: tuple[CodingLayer, ...]


def taps(net: nn.Module) -> dict[str, Tap]:
    """The places from which a `ResNet` can be inverted, in order of computation.

    `stem`; `pool` where another sparse coding layer follows it; `<stage>.<block>`, counted from 1, as long as all
    blocks before are chains of sparse coding and batch normalisation. Empty where the stem is not a sparse coding
    layer.
    """
    layer = _coding(net, "conv1", "bn1")
    if layer is None:
        return {}
    path: tuple[CodingLayer, ...] = (layer,)
    found = {STEM: Tap("bn1", path)}
    pool = getattr(net, "pool", None)
    if isinstance(pool, CSC2d):
        path = (*path, CodingLayer(pool))
        found["pool"] = Tap("pool", path)
    if not _nothing(getattr(net, "act1", None)) or not (isinstance(pool, CSC2d) or _nothing(pool)):
        return found
    for stage in range(1, getattr(net, "stages", 0) + 1):
        for number, block in enumerate(net.get_submodule(f"layer{stage}").children()):
            name = f"layer{stage}.{number}"
            layers = _chain(block, name)
            if layers is None:
                return found
            path = (*path, *layers)
            found[f"{stage}.{number + 1}"] = Tap(name, path)
    return found


def _nothing(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)


def _coding(parent: nn.Module, csc: str, norm: str, prefix: str = "") -> CodingLayer | None:
    layer, bn = getattr(parent, csc, None), getattr(parent, norm, None)
    if isinstance(layer, CSC2d) and isinstance(bn, nn.BatchNorm2d):
        return CodingLayer(layer, bn, f"{prefix}{norm}")
    return None


def _chain(block: nn.Module, name: str) -> tuple[CodingLayer, ...] | None:
    """The layers of a block that computes bn2(conv2(bn1(conv1(x)))) by sparse coding, and nothing else."""
    first, second = (_coding(block, f"conv{n}", f"bn{n}", f"{name}.") for n in (1, 2))
    if first is None or second is None or getattr(block, "shortcut", None) is not None:
        return None
    if not all(_nothing(getattr(block, f"act{n}", None)) for n in (1, 2)):
        return None
    return first, second


def tap_of(net: nn.Module, upto: str) -> Tap:
    """The tap of that name. Raises: ValueError, naming those that there are."""
    known = taps(net)
    if upto in known:
        return known[upto]
    if not known:
        raise ValueError("the stem is no sparse coding layer; nothing can be inverted")
    if list(known) == [STEM]:
        raise ValueError("blocks with shortcuts or activations have no inverse; only the stem can be inverted")
    raise ValueError(f"no such place to invert from; there are {', '.join(known)}")


def invert(net: nn.Module, y: Tensor, upto: str, size: Sequence[int]) -> Tensor:
    """Normalised images (B, C, H, W) of `size` (H, W), from the output y (B, M, h, w) of the tap `upto`.

    Raises: ValueError as `tap_of`, `invert_layers`.
    """
    return invert_layers(tap_of(net, upto).layers, y, size)


def invert_layers(layers: Iterable[CodingLayer], y: Tensor, size: Sequence[int], *, offset: bool = True) -> Tensor:
    """The input (B, C, H, W) of `size` (H, W) of a chain of layers, from its output y (B, M, h, w).

    offset: without, from a difference of outputs the difference of inputs. Beside the offset, which grows with depth
    while each layer returns a part of what it coded, the differences of images would be lost in rounding.
    Raises: ValueError as `batch_norm_inverse`, and for an output that does not belong to inputs of this size.
    """
    layers, sizes = list(layers), [tuple(size)]
    for layer in layers:
        sizes.append(layer.csc.code_size(sizes[-1]))
    if tuple(y.shape[2:]) != sizes[-1]:
        there, expected = (" x ".join(map(str, sides)) for sides in (y.shape[2:], sizes[-1]))
        raise ValueError(f"an output of {there} entries is not of images of {size[0]} x {size[1]}, but {expected} is")
    for layer, before in zip(reversed(layers), reversed(sizes[:-1]), strict=True):
        z = y if layer.norm is None else batch_norm_inverse(layer.norm, y, layer.norm_name, offset=offset)
        y = layer.csc.synthesise(z, before)
    return y


class Coded(NamedTuple):
    """What a layer made of a batch.

    size: (H, W) of its input. nonzero (B, M): for each atom, the share of the non-zero entries of its code. mean (B,):
    of the code's absolute values. residual (B,): |x - A(z)|^2 / |x|^2, of an input that is all zero 0.
    """

    size: tuple[int, ...]
    nonzero: Tensor
    mean: Tensor
    residual: Tensor


@torch.no_grad()
def inspect(
    net: nn.Module, x: Tensor, layers: dict[str, CSC2d], outputs: Collection[str] = ()
) -> tuple[dict[str, Coded], dict[str, Tensor]]:
    """Run a network on a batch x in evaluation mode: what its sparse coding `layers` did, and outputs by module name.

    outputs: names of the modules whose outputs are wanted; of a sparse coding layer, its code. The network is left as
    it was: its modes, its buffers, its hooks.
    """
    coded: dict[str, Coded] = {}
    wanted: dict[str, Tensor] = {}
    handles = []

    def code_hook(name: str, layer: CSC2d) -> None:
        def look(module: nn.Module, args: tuple[Tensor, ...], z: Tensor) -> None:
            coded[name] = _coded(layer, args[0], z)

        handles.append(layer.register_forward_hook(look))

    def output_hook(name: str) -> None:
        def look(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            wanted[name] = y.clone()  # What follows may compute in place.

        handles.append(net.get_submodule(name).register_forward_hook(look))

    try:
        for name, layer in layers.items():
            code_hook(name, layer)
        for name in outputs:
            output_hook(name)
        with evaluation_mode(net):
            net(x)
    finally:
        for handle in handles:
            handle.remove()
    return coded, wanted


def _coded(layer: CSC2d, x: Tensor, z: Tensor) -> Coded:
    size = tuple(x.shape[2:])
    left, whole = (values.square().flatten(1).sum(1) for values in (x - layer.synthesise(z, size), x))
    nonzero = (z != 0).flatten(2).to(x.dtype).mean(2)
    return Coded(size, nonzero, z.abs().flatten(1).mean(1), left / whole.clamp_min(_TINY))
