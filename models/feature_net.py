"""Networks: a backbone with the heads of stage 1 or of Rot+Trans, and stage 2: that of stage 1, with dictionaries.

Letters: N images, F feature size, P projection size, K shifts, C classes, M atoms.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.flags import Spec, flag
from models.sparse.dictionary import DictionaryBank


class Features(NamedTuple):
    """h (N, F) pooled features; z (N, P) projections, not normalised; shift (N, K) logits of the shift. float32."""

    h: Tensor
    z: Tensor
    shift: Tensor


def full_precision(x: Tensor) -> Tensor:
    """Half precision to float32, in which losses and scores are computed; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


class BackboneNet(nn.Module):
    """A backbone (normalised images -> (N, F), with attribute `feature_dim`), to which subclasses add heads.

    Images are normalised to (x - 0.5) / 0.5, or by the backbone's own `input_mean` and `input_std` where it has them.
    The state dict has the published keys: the backbone's own, without a prefix, beside those of the heads.
    """

    input_mean: Tensor
    input_std: Tensor

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.feature_dim: int = backbone.feature_dim  # type: ignore[assignment]
        for name in ("input_mean", "input_std"):
            values = torch.tensor(getattr(backbone, name, (0.5, 0.5, 0.5))).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)
        # Convolutions want channels last on CPUs (2.2 times here, resnet8) and on tensor cores alike.
        self.to(memory_format=torch.channels_last)
        self.register_state_dict_post_hook(_drop_backbone_prefix)
        self.register_load_state_dict_pre_hook(_add_backbone_prefix)

    def features(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) in [0, 1], normalised here -> h (N, F)."""
        x = (images - self.input_mean) / self.input_std
        return self.backbone(x.contiguous(memory_format=torch.channels_last))


class FeatureNet(BackboneNet):
    """The stage-1 network: four heads on the features of a backbone."""

    def __init__(self, backbone: nn.Module, *, n_classes: int, simclr_dim: int, n_shifts: int):
        super().__init__(backbone)
        f = self.feature_dim
        self.projection_dim = simclr_dim
        self.linear = nn.Linear(f, n_classes)
        self.simclr_layer = nn.Sequential(nn.Linear(f, f), nn.ReLU(), nn.Linear(f, simclr_dim))
        self.shift_cls_layer = nn.Linear(f, n_shifts)
        self.joint_distribution_layer = nn.Linear(f, 4 * n_classes)

    def forward(self, images: Tensor) -> Features:
        """images (N, 3, H, W) in [0, 1]."""
        h = self.features(images)
        return Features(
            full_precision(h), full_precision(self.simclr_layer(h)), full_precision(self.shift_cls_layer(h))
        )


class Transformation(NamedTuple):
    """Logits of the rotation (N, 4), the vertical (N, 3) and the horizontal translation (N, 3), float32."""

    rotation: Tensor
    vertical: Tensor
    horizontal: Tensor


class RotTransNet(BackboneNet):
    """Rot+Trans (Hendrycks et al. 2019): three heads that tell how an image was rotated and moved."""

    def __init__(self, backbone: nn.Module):
        super().__init__(backbone)
        self.rotation = nn.Linear(self.feature_dim, 4)
        self.vertical = nn.Linear(self.feature_dim, 3)
        self.horizontal = nn.Linear(self.feature_dim, 3)

    def forward(self, images: Tensor) -> Transformation:
        """images (N, 3, H, W) in [0, 1]."""
        h = self.features(images)
        return Transformation(
            full_precision(self.rotation(h)), full_precision(self.vertical(h)), full_precision(self.horizontal(h))
        )


def _drop_backbone_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [k for k in state if k.startswith(f"{prefix}backbone.")]:
        state[prefix + key.removeprefix(f"{prefix}backbone.")] = state.pop(key)


def _add_backbone_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    heads = {name for name, _ in module.named_children()} - {"backbone"}
    for key in [k for k in state if k.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if name.split(".")[0] not in heads:
            state[f"{prefix}backbone.{name}"] = state.pop(key)


class SparseFeatures(NamedTuple):
    """s (N, F) features as they are coded; shift (N, K) logits."""

    s: Tensor
    shift: Tensor


@dataclass(frozen=True)
class FeatureTransform(Spec, group="stage 2: dictionaries"):
    """How a network's output becomes the feature that is coded; field names are flag names.

    sr_layer: `penultimate` (h) or `simclr` (z). invert_sr_feature_norm: divide by the squared norm.
    normalize_sr_dict_feature, normalize_sr_feature: then scale to unit norm. Published training read the first and
    evaluation the second for this same step; here either acts in both.
    """

    sr_layer: str = flag("penultimate", "features to code", choices=lambda: ("penultimate", "simclr"), origin="network")
    invert_sr_feature_norm: bool = flag(False, "code h / |h|^2 instead of h", origin="network")
    normalize_sr_dict_feature: bool = flag(False, "then scale to unit norm", origin="network")
    normalize_sr_feature: bool = flag(False, "the same step under the name published evaluation used", origin="network")

    def size(self, net: FeatureNet) -> int:
        """Length of the features that are coded."""
        return net.feature_dim if self.sr_layer == "penultimate" else net.projection_dim

    def __call__(self, features: Features) -> Tensor:
        s = features.h if self.sr_layer == "penultimate" else features.z
        if self.invert_sr_feature_norm:
            # The published help text names another power; the published program divides by the square.
            s = s / s.square().sum(1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
        unit_norm = self.normalize_sr_dict_feature or self.normalize_sr_feature
        return F.normalize(s, dim=1) if unit_norm else s


class CocsrNet(nn.Module):
    """Stage 2: a frozen `feature_net`, always in eval mode, and one dictionary per shift, `sr_nets`."""

    def __init__(self, feature_net: FeatureNet, sr_nets: DictionaryBank, transform: FeatureTransform):
        super().__init__()
        self.feature_net = feature_net.requires_grad_(False).eval()
        self.sr_nets = sr_nets
        self.transform = transform

    def train(self, mode: bool = True) -> "CocsrNet":
        super().train(mode)
        self.feature_net.eval()
        return self

    def forward(self, images: Tensor) -> SparseFeatures:
        """images (N, 3, H, W) in [0, 1]. Builds no graph: the network is frozen."""
        with torch.no_grad():
            features = self.feature_net(images)
            return SparseFeatures(self.transform(features), features.shift)
