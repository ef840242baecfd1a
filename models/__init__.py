"""Networks. `BACKBONES` is the table of backbones, `models.checkpoint.NETS` that of the networks built on them.

Dimension letters in all files of `models`: N images, or samples of one dictionary; H, W pixels; C classes; F feature
size; P projection size; K shifts, each with its own dictionary; M atoms of a dictionary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from common.errors import UserError
from common.flags import Flags, Spec, flag, one_component, path_flag
from models.dm_wide_resnet import CIFAR100, dm_wrn, ra_wrn70_16
from models.preact_resnet import PreActResNet, WideResNet
from models.ra_imagenet import ra_wrn101_2
from models.resnet import BasicBlock, Bottleneck, ResNet
from models.sdnet import VARIANTS, sdnet


@dataclass(frozen=True)
class BackboneSpec:
    """make: builds the backbone with fresh weights, which torch's global generator draws.

    The backbone maps normalised images (N, 3, H, W) to features (N, F) and has the attribute `feature_dim` = F, and
    where they differ from the defaults `in_channels` (3), `input_mean` and `input_std` (0.5 for each channel).
    image_size: pixels on a side that the backbone is made for; fixed_size: it accepts no other.
    """

    make: Callable[[], nn.Module]
    image_size: int = 32
    fixed_size: bool = False


def _imagenet(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from models import imagenet_resnet  # Not before it is needed: torchvision's models load slowly.

        return getattr(imagenet_resnet, name)()

    return make


_BIT = "the published fine-tuning of downloaded weights is left out; timm_resnetv2_50x1_bit names an architecture"
_REFUSED = {"timm_resnetv2_bit": _BIT, "timm_swinv2": "name a model of timm: timm_swinv2_tiny_window8_256, say"}


@dataclass(frozen=True)
class ModelSpec(Spec, group="network and device"):
    """The network. simclr_dim: what weights have decides, where there are any."""

    model: str = flag(
        "resnet18",
        "backbone",
        type=one_component,
        choices=lambda: BACKBONES,
        prefix="timm_",
        refused=_REFUSED,
        origin="fixed",
    )
    pretrained_path: str | None = path_flag(None, "local file of weights to start the backbone from")
    simclr_dim: int = flag(128, "outputs of the projector", above=0, origin="fixed")
    projector_layers: int = flag(2, "linear layers of the projector", at_least=2, origin="fixed")


_WIDTHS = (64, 128, 256, 512)
_SMALL, _18, _34 = ((1, 1, 1), (16, 32, 64)), ((2, 2, 2, 2), _WIDTHS), ((3, 4, 6, 3), _WIDTHS)

BACKBONES: dict[str, BackboneSpec] = {
    "resnet8": BackboneSpec(lambda: ResNet(BasicBlock, *_SMALL)),
    "resnet18": BackboneSpec(lambda: ResNet(BasicBlock, *_18)),
    "resnet34": BackboneSpec(lambda: ResNet(BasicBlock, *_34)),
    "resnet50": BackboneSpec(lambda: ResNet(Bottleneck, *_34)),
    "wrn16_1": BackboneSpec(lambda: WideResNet(16, 1)),
    "wrn28_10": BackboneSpec(lambda: WideResNet(28, 10)),
    "wrn34_10": BackboneSpec(lambda: WideResNet(34, 10)),
    # Those of RobustBench.
    "dm_wrn10_1": BackboneSpec(partial(dm_wrn, 10, 1)),
    "dm_wrn28_10": BackboneSpec(partial(dm_wrn, 28, 10)),
    "dm_wrn34_10": BackboneSpec(partial(dm_wrn, 34, 10)),
    "dm_wrn70_16": BackboneSpec(partial(dm_wrn, 70, 16)),
    "dm_wrn70_16_cifar100": BackboneSpec(partial(dm_wrn, 70, 16, statistics=CIFAR100)),
    "dm_wrn94_16": BackboneSpec(partial(dm_wrn, 94, 16)),
    "ra_wrn70_16": BackboneSpec(ra_wrn70_16),
    "ra_wrn101_2": BackboneSpec(ra_wrn101_2, image_size=224),
    "preact18_64": BackboneSpec(lambda: PreActResNet(*_18, stem=64, grid=2), image_size=64, fixed_size=True),
    "resnet18_imagenet": BackboneSpec(_imagenet("resnet18"), image_size=224),
    "resnet34_imagenet": BackboneSpec(_imagenet("resnet34"), image_size=224),
    "resnet50_imagenet": BackboneSpec(_imagenet("resnet50"), image_size=224),
    # sdnet8, sdnet8_all, sdnet8_all_noshortcut, and so on.
    **{
        f"sdnet{depth}{variant}": BackboneSpec(partial(sdnet, variant, *size))
        for depth, size in {8: _SMALL, 18: _18, 34: _34}.items()
        for variant in VARIANTS
    },
    **{
        f"sdnet{depth}{variant}_imagenet": BackboneSpec(partial(sdnet, variant, *size, large=True), image_size=224)
        for depth, size in {18: _18, 34: _34}.items()
        for variant in VARIANTS
    },
}

TIMM = "timm_"


def backbone_spec(name: str) -> BackboneSpec:
    """The row `name` of the table, or for `timm_<model>` that model of the timm package, where it is installed.

    Raises: UserError where timm is not installed or has no such model.
    """
    if not name.startswith(TIMM):
        return BACKBONES[name]
    try:
        import timm
    except ImportError:
        raise UserError(f"--model {name}: the package timm is not installed; pip install timm") from None
    model = name.removeprefix(TIMM)
    if not timm.is_model(model):
        near = timm.list_models(f"*{model.split('_')[0]}*")[:5] or timm.list_models("resnet*")[:5]
        raise UserError(f"--model {name}: timm has no {model}; it has {', '.join(near)}, ...")
    config = timm.get_pretrained_cfg(model)

    def make() -> nn.Module:
        net: Any = timm.create_model(model, pretrained=False, num_classes=0)
        net.feature_dim = getattr(net, "head_hidden_size", None) or net.num_features
        if config is not None:  # Weights from a file expect the inputs they were trained on.
            net.input_mean, net.input_std = config.mean, config.std
        return net

    if config is None:
        return BackboneSpec(make, image_size=224)
    return BackboneSpec(make, image_size=config.input_size[-1], fixed_size=config.fixed_input_size)


def model_size(flags: Flags, *, backbone: bool = True) -> tuple[int | None, bool]:
    """Pixels on a side of the images that the backbone of --model is made for, and whether it takes no other size.

    backbone: False for networks without one, which take every size: (None, False).
    """
    if not backbone:
        return None, False
    spec = backbone_spec(flags.of(ModelSpec, only=["model"]).model)
    return spec.image_size, spec.fixed_size
