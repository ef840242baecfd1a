"""Networks on a backbone: stage 1 (FeatureNet), classification (Classifier), Rot+Trans (RotTransNet), stage 2
(CocsrNet).

Dimension letters: see `models`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.flags import Spec, flag
from models.resnet import StagedNet
from models.sparse.dictionary import DictionaryBank


class Features(NamedTuple):
    """Output of stage 1, float32 or float64.

    h (N, F): features. z (N, P): projections, not normalised. shift (N, K): logits of the shift.
    """

    h: Tensor
    z: Tensor
    shift: Tensor


def full_precision(x: Tensor) -> Tensor:
    """x in float32, in which losses and scores are computed; float64 is left as it is."""
    return x if x.dtype == torch.float64 else x.float()


class BackboneNet(nn.Module):
    """A backbone and the normalisation of its input. Subclasses add heads.

    The backbone maps normalised images (N, in_channels, H, W) to features (N, F). Its attribute `feature_dim` is F;
    `in_channels`, `input_mean` and `input_std` are optional, by default 3 and 0.5 for each channel.
    The state dict has the published keys: those of the backbone have no prefix.
    """

    input_mean: Tensor
    input_std: Tensor

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.feature_dim: int = backbone.feature_dim  # type: ignore[assignment]
        self.in_channels: int = getattr(backbone, "in_channels", 3)
        for name in ("input_mean", "input_std"):
            values = torch.tensor(getattr(backbone, name, (0.5,) * self.in_channels)).view(self.in_channels, 1, 1)
            self.register_buffer(name, values, persistent=False)
        # Convolutions are faster in channels-last memory format, on CPUs (resnet8: 2.2 times) and on tensor cores.
        self.to(memory_format=torch.channels_last)
        self.register_state_dict_post_hook(_drop_backbone_prefix)
        self.register_load_state_dict_pre_hook(_add_backbone_prefix)

    def features(self, images: Tensor) -> Tensor:
        """Features h (N, F) of images (N, in_channels, H, W) in [0, 1], which are normalised here."""
        return self.backbone(self.normalise(images))

    def normalise(self, images: Tensor) -> Tensor:
        """What the backbone takes of images in [0, 1], in channels-last memory format."""
        x = (images - self.input_mean) / self.input_std
        return x.contiguous(memory_format=torch.channels_last)


class DeepFeatures(NamedTuple):
    """`Features` and, of a backbone of S stages, the projections of all but the last: stages (N, S - 1, P)."""

    h: Tensor
    z: Tensor
    shift: Tensor
    stages: Tensor


class FeatureNet(BackboneNet):
    """The stage-1 network: class, projection, shift and joint (class and rotation) heads on the features.

    The joint head has 4 C outputs, and like the class head is applied by its callers, not in `forward`.
    projector_layers: linear layers of the projection head, the published one has 2.
    stage_heads: whether the stages before the last, where the backbone has any, have projection heads for training.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        n_classes: int,
        simclr_dim: int,
        n_shifts: int,
        projector_layers: int = 2,
        stage_heads: bool = False,
    ):
        super().__init__(backbone)
        f = self.feature_dim
        self.projection_dim = simclr_dim
        self.linear = nn.Linear(f, n_classes)
        self.simclr_layer = projector(f, simclr_dim, projector_layers)
        self.shift_cls_layer = nn.Linear(f, n_shifts)
        self.joint_distribution_layer = nn.Linear(f, 4 * n_classes)
        widths = stage_widths(backbone) if stage_heads else []
        self.stage_layers = nn.ModuleList(projector(width, simclr_dim) for width in widths)

    def forward(self, images: Tensor) -> Features | DeepFeatures:
        """Images (N, in_channels, H, W) in [0, 1]. `DeepFeatures` in training mode, where earlier stages have heads."""
        if not (self.training and self.stage_layers):
            return self.head_outputs(self.features(images))
        assert isinstance(self.backbone, StagedNet)  # Others have no such heads.
        *earlier, last = self.backbone.maps(self.normalise(images))
        pooled = (x.mean((2, 3)) for x in earlier)
        z = [full_precision(head(x)) for head, x in zip(self.stage_layers, pooled, strict=True)]
        return DeepFeatures(*self.head_outputs(self.backbone.features(last)), torch.stack(z, 1))

    def head_outputs(self, h: Tensor) -> Features:
        """Of features h (N, F)."""
        return Features(
            full_precision(h), full_precision(self.simclr_layer(h)), full_precision(self.shift_cls_layer(h))
        )

    def transformation_logits(self, h: Tensor) -> dict[str, Tensor]:
        """Logits of the shift of features h (N, F), by head: (N, K)."""
        return {"shift": full_precision(self.shift_cls_layer(h))}


def projector(inputs: int, outputs: int, layers: int = 2) -> nn.Sequential:
    """Linear layers with ReLU between them; all but the last keep the width."""
    hidden = [module for _ in range(layers - 1) for module in (nn.Linear(inputs, inputs), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(inputs, outputs))


def stage_widths(backbone: nn.Module) -> list[int]:
    """Channels of the map of each stage but the last; none where the backbone is not made of stages."""
    return backbone.stage_channels[:-1] if isinstance(backbone, StagedNet) else []


class Heads(NamedTuple):
    """Class logits (N, C), float32 or float64: of the last head, and of those before it, in order."""

    final: Tensor
    auxiliary: tuple[Tensor, ...]


class Classifier(BackboneNet):
    """A backbone and one linear head, for classes with labels.

    Its bias starts from 0 where the backbone has the attribute `zero_bias`.
    """

    def __init__(self, backbone: nn.Module, *, n_classes: int):
        super().__init__(backbone)
        self.linear = nn.Linear(self.feature_dim, n_classes)
        if getattr(backbone, "zero_bias", False):
            nn.init.zeros_(self.linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (N, C), float32 or float64, of images (N, in_channels, H, W) in [0, 1]."""
        return full_precision(self.linear(self.features(images)))

    def heads(self, images: Tensor, labels: Tensor | None = None) -> Heads:
        """The logits of `forward` and no auxiliary ones. labels (N,): not used."""
        return Heads(self(images), ())


class Transformation(NamedTuple):
    """Output of Rot+Trans, float32 or float64: logits of the rotation and of both translations.

    rotation (N, 4); vertical (N, 3); horizontal (N, 3).
    """

    rotation: Tensor
    vertical: Tensor
    horizontal: Tensor


class RotTransNet(BackboneNet):
    """Rot+Trans (Hendrycks et al. 2019): three heads that classify the rotation and the translations of an image."""

    def __init__(self, backbone: nn.Module):
        super().__init__(backbone)
        self.rotation = nn.Linear(self.feature_dim, 4)
        self.vertical = nn.Linear(self.feature_dim, 3)
        self.horizontal = nn.Linear(self.feature_dim, 3)

    def forward(self, images: Tensor) -> Transformation:
        """Images (N, in_channels, H, W) in [0, 1]."""
        return self.heads(self.features(images))

    def heads(self, h: Tensor) -> Transformation:
        """Of features h (N, F)."""
        return Transformation(
            full_precision(self.rotation(h)), full_precision(self.vertical(h)), full_precision(self.horizontal(h))
        )

    def transformation_logits(self, h: Tensor) -> dict[str, Tensor]:
        """Logits of the transformation of features h (N, F), by head: (N, 4), (N, 3), (N, 3)."""
        return self.heads(h)._asdict()


def _drop_backbone_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [k for k in state if k.startswith(f"{prefix}backbone.")]:
        state[prefix + key.removeprefix(f"{prefix}backbone.")] = state.pop(key)


def _add_backbone_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    own = (*module.named_children(), *module.named_buffers(recurse=False))
    heads = {name for name, _ in own} - {"backbone"}
    for key in [k for k in state if k.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if name.split(".")[0] not in heads:
            state[f"{prefix}backbone.{name}"] = state.pop(key)


class SparseFeatures(NamedTuple):
    """Output of stage 2. s (N, F'): the features to code, of size P where `sr_layer` is `simclr`. shift (N, K): logits.
    h (N, F): features as they are.
    """

    s: Tensor
    shift: Tensor
    h: Tensor


@dataclass(frozen=True)
class FeatureTransform(Spec, group="stage 2: dictionaries"):
    """How the feature to code is computed from the output of stage 1; the fields are named like their flags.

    sr_layer: `penultimate` (h) or `simclr` (z), one of them; for several depths those of `models.level_net.LEVELS`.
    invert_sr_feature_norm: divide the feature by its squared norm.
    normalize_sr_dict_feature, normalize_sr_feature: then scale it to unit norm. The published training reads the first
        flag and the published evaluation the second; here either flag applies to both.
    """

    sr_layer: Sequence[str] = flag(
        ("penultimate",),
        "features to code: penultimate or simclr; level_dict: several of these",
        nargs="+",
        choices=lambda: ("penultimate", "simclr", "pixels", "stages"),
        origin="network",
    )
    invert_sr_feature_norm: bool = flag(False, "code h / |h|^2 instead of h", origin="network")
    normalize_sr_dict_feature: bool = flag(False, "then scale to unit norm", origin="network")
    normalize_sr_feature: bool = flag(False, "the same step under the name published evaluation used", origin="network")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.sr_layer, str):  # As older weights have recorded it.
            object.__setattr__(self, "sr_layer", (self.sr_layer,))

    @property
    def layer(self) -> str:
        """The one layer. Raises: UserError for several, and for those of several depths."""
        if len(self.sr_layer) != 1 or self.sr_layer[0] not in ("penultimate", "simclr"):
            raise UserError(f"--sr_layer {' '.join(self.sr_layer)}: only --mode level_dict codes these")
        return self.sr_layer[0]

    def size(self, net: FeatureNet) -> int:
        """Size of the features to code."""
        return net.feature_dim if self.layer == "penultimate" else net.projection_dim

    def __call__(self, features: Features) -> Tensor:
        s = features.h if self.layer == "penultimate" else features.z
        if self.invert_sr_feature_norm:
            # As the published program does; its help text names another power.
            s = s / s.square().sum(1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
        unit_norm = self.normalize_sr_dict_feature or self.normalize_sr_feature
        return F.normalize(s, dim=1) if unit_norm else s


class CocsrNet(nn.Module):
    """The stage-2 network: a frozen `feature_net`, always in eval mode, and `sr_nets`, one dictionary per shift."""

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
        """Images (N, in_channels, H, W) in [0, 1]. Gradients reach them and no parameter: the network is frozen."""
        features = self.feature_net(images)
        return SparseFeatures(self.transform(features), features.shift, features.h)
