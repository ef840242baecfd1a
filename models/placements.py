"""Where operators go in a network that is built already: before its activations, or where its blocks have slots.

`PLACEMENTS` is the table. A site is named by the operator's name in the state dict, as in the published files of
MeanSparse (arXiv 2406.05927).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.insert import ACTIVATIONS, BeforeActivation

# Activations that are no classes of torch: timm has a GELU of its own.
_ACTIVATIONS = ("GELU", "GELUTanh", "QuickGELU", "Swish", "HardSwish", "HardMish")
_OF_TORCH = (*ACTIVATIONS, nn.ReLU6, nn.ELU, nn.SELU, nn.CELU, nn.PReLU, nn.Mish, nn.Hardswish, nn.Softplus)
# Perceptrons that see places and no image.
_OF_PLACES = (".cpb_mlp.",)
# Gates over channels: their own activations see means of maps.
_GATES = ("SqueezeExcitation", "SqueezeExcite", "SEModule", "EffectiveSEModule")
# The dimension of the channels.
LAYOUTS = {"channels_first": 1, "channels_last": -1}


class Slot(nn.Identity):
    """A place between modules where an operator may go, after a residual sum, say. channels: of what passes, in
    dimension `dim`."""

    def __init__(self, channels: int, dim: int = 1):
        super().__init__()
        self.channels, self.dim = channels, dim


class Behind(nn.Sequential):
    """A module and the operator behind it, in the module's former place."""


class Site(NamedTuple):
    """One place. name: that of the operator there. channels: of what it sees, in dimension `dim`."""

    name: str
    channels: int
    dim: int


def _activations(net: nn.Module) -> list[Site]:
    """Before each activation outside gates, of the channels of the last layer registered before it; and behind the
    residual branch of each block of a ConvNeXt. That is the first version of MeanSparse.

    Raises: ValueError where a module is used under two names, or where no layer comes before an activation.
    """
    gates = tuple(f"{name}." for name, module in net.named_modules() if type(module).__name__ in _GATES)
    sites: list[Site] = []
    last, first = None, dict[nn.Module, str]()
    width = 0
    for name, module in net.named_modules(remove_duplicate=False):
        last = channels_of(module) or last
        apart = name.startswith(gates) or name.endswith(_JOINT) or any(part in name for part in _OF_PLACES)
        if is_activation(module) and not apart:
            if first.setdefault(module, name) != name:
                raise ValueError(f"{first[module]} and {name} are one activation module; each use needs its own")
            if last is None:
                raise ValueError(f"nothing before the activation {name} says how many channels it has")
            sites.append(Site(f"{name}.0", *last))
        if type(module).__name__ == "ConvNeXtBlock":
            width = module.conv_dw.out_channels  # type: ignore[union-attr, assignment]
        if width and name.endswith(".drop_path"):
            sites.append(Site(f"{name}.1", width, 1))
    return sites


# An activation behind a residual sum of the ImageNet network of Peng et al. (2023), which was left alone.
_JOINT = "last_activation"


def _slots(net: nn.Module) -> list[Site]:
    """At the slots of a network: before the activations of blocks and behind their residual sums. That is the second
    version."""
    _with_slots(net)
    return [Site(name, module.channels, module.dim) for name, module in net.named_modules() if isinstance(module, Slot)]


# network -> its sites, in the order in which modules are registered.
PLACEMENTS: dict[str, Callable[[nn.Module], list[Site]]] = {"activations": _activations, "blocks": _slots}


def is_activation(module: nn.Module) -> bool:
    return isinstance(module, _OF_TORCH) or type(module).__name__ in _ACTIVATIONS


def channels_of(module: nn.Module) -> tuple[int, int] | None:
    """Channels of a layer's output and their dimension; None for what does not decide them."""
    match module:
        case nn.modules.batchnorm._BatchNorm():
            return module.num_features, 1
        case nn.GroupNorm():
            return module.num_channels, 1
        case nn.LayerNorm():
            # That of timm for maps (N, C, H, W) is a LayerNorm2d.
            return module.normalized_shape[-1], 1 if type(module).__name__.endswith("2d") else -1
        case nn.modules.conv._ConvNd():
            return module.out_channels, 1
        case nn.Linear():
            return module.out_features, -1
    return None


def sites(net: nn.Module, placement: str, *, layout: str | None = None) -> list[Site]:
    """The sites of a placement in a network. layout: of all of them, of `LAYOUTS`; None: as their layers say.

    Raises: ValueError for an unknown placement or layout, and where the network has no site.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placements are {', '.join(PLACEMENTS)}, got {placement!r}")
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layouts are {', '.join(LAYOUTS)}, got {layout!r}")
    found = PLACEMENTS[placement](net)
    if not found:
        if placement == "blocks":
            raise ValueError("there is no slot to put an operator at; dm_wrn*, ra_wrn70_16 and timm's Swin have slots")
        raise ValueError("there is no activation module to put an operator at")
    return [site if layout is None else site._replace(dim=LAYOUTS[layout]) for site in found]


def put(net: nn.Module, site: Site, operator: nn.Module) -> None:
    """Put an operator at a site."""
    parent, _, place = site.name.rpartition(".")
    if place == "0":
        net.set_submodule(parent, BeforeActivation(operator, net.get_submodule(parent)))
    elif place == "1":
        net.set_submodule(parent, Behind(net.get_submodule(parent), operator))
    else:
        net.set_submodule(site.name, operator)


def take_out(net: nn.Module, site: Site) -> None:
    """Undo `put`."""
    parent, _, place = site.name.rpartition(".")
    if place in ("0", "1"):
        net.set_submodule(parent, net.get_submodule(parent)[1 - int(place)])  # type: ignore[index]
    else:
        net.set_submodule(site.name, Slot(site.channels, site.dim))


def _with_slots(net: nn.Module) -> None:
    """Give the blocks of timm's Swin transformer slots; other networks have theirs or none."""
    blocks = [module for module in net.modules() if type(module).__name__ == "SwinTransformerBlock"]
    if blocks:
        block_of, mlp_of = _swin()
    for block in blocks:
        mlp: Any = block.mlp
        block.__class__, mlp.__class__ = block_of, mlp_of
        block.meansparse1, block.meansparse2 = Slot(mlp.fc2.out_features, -1), Slot(mlp.fc2.out_features, -1)
        mlp.meansparse1, mlp.meansparse2 = Slot(mlp.fc1.out_features, -1), Slot(mlp.fc2.out_features, -1)


def _swin() -> tuple[type[nn.Module], type[nn.Module]]:
    """timm's block and its multilayer perceptron, with slots."""
    from timm.layers import Mlp
    from timm.models.swin_transformer import SwinTransformerBlock

    class SlottedMlp(Mlp):
        meansparse1: nn.Module
        meansparse2: nn.Module

        def forward(self, x: Tensor) -> Tensor:
            x = self.drop1(self.act(self.meansparse1(self.fc1(x))))
            return self.drop2(self.meansparse2(self.fc2(self.norm(x))))

    class SlottedSwinBlock(SwinTransformerBlock):
        meansparse1: nn.Module
        meansparse2: nn.Module

        def forward(self, x: Tensor) -> Tensor:
            """Maps (N, H, W, C); operators see tokens (N, H W, C)."""
            N, H, W, C = x.shape
            x = x + self.drop_path1(self._attn(self.norm1(x)))
            x = self.meansparse1(x.reshape(N, -1, C))
            x = self.meansparse2(x + self.drop_path2(self.mlp(self.norm2(x))))
            return x.reshape(N, H, W, C)

    return SlottedSwinBlock, SlottedMlp
