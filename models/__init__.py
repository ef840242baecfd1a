"""Networks. `BACKBONES` is the table; `models.checkpoint` builds networks, fresh or from files."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from models.resnet import BasicBlock, Bottleneck, ResNet


@dataclass(frozen=True)
class BackboneSpec:
    """make: builds it with fresh weights. image_size: pixels on a side that it is for."""

    make: Callable[[], nn.Module]
    image_size: int = 32


def _torchvision_resnet18() -> nn.Module:
    from torchvision.models import resnet18

    net = resnet18(weights=None)
    net.feature_dim = net.fc.in_features  # type: ignore[assignment]
    net.fc = nn.Identity()  # type: ignore[assignment]
    return net


_WIDTHS = (64, 128, 256, 512)

BACKBONES: dict[str, BackboneSpec] = {
    "resnet8": BackboneSpec(lambda: ResNet(BasicBlock, (1, 1, 1), (16, 32, 64))),
    "resnet18": BackboneSpec(lambda: ResNet(BasicBlock, (2, 2, 2, 2), _WIDTHS)),
    "resnet34": BackboneSpec(lambda: ResNet(BasicBlock, (3, 4, 6, 3), _WIDTHS)),
    "resnet50": BackboneSpec(lambda: ResNet(Bottleneck, (3, 4, 6, 3), _WIDTHS)),
    "resnet18_imagenet": BackboneSpec(_torchvision_resnet18, image_size=224),
}
