"""Reverse attention (RA; ANCRA, arXiv 2310.03358): features multiplied by the classifier's own weights of one class.

Letters: N images, C classes, F features of the classifier, D channels of a map.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.feature_net import Classifier, Heads, full_precision
from models.resnet import StagedNet, average_pool

# (auxiliary logits (N, C), weight (C, F)) -> the rows that features are multiplied by, (N, F).
Rows = Callable[[Tensor, Tensor], Tensor]


def predicted_rows(logits: Tensor, weight: Tensor) -> Tensor:
    """The row of each image's own most likely class, which passes no gradient to the logits."""
    return F.embedding(logits.argmax(1), weight)


def rows_of(classes: Tensor | int) -> Rows:
    """The rows of given classes, (N,) int64, or one for all images."""
    if isinstance(classes, int):
        return lambda logits, weight: weight[classes].expand(len(logits), -1)
    return lambda logits, weight: F.embedding(classes, weight)


def soft_rows(temperature: float = 1.0) -> Rows:
    """The mean of all rows by the softmax of logits / temperature, which does pass a gradient."""
    return lambda logits, weight: (logits / temperature).softmax(1) @ weight


def straight_through_rows(temperature: float = 1.0) -> Rows:
    """`predicted_rows`, with the gradient of `soft_rows`."""
    soft = soft_rows(temperature)

    def rows(logits: Tensor, weight: Tensor) -> Tensor:
        mean = soft(logits, weight)
        return mean + (predicted_rows(logits, weight) - mean).detach()

    return rows


class ReverseAttention(NamedTuple):
    """z (N, D, H, W): the map, weighted. auxiliary, final (N, C): class logits before and after."""

    z: Tensor
    auxiliary: Tensor
    final: Tensor


def reverse_attention(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    pool: int | tuple[int, int],
    labels: Tensor | None = None,
    rows: Rows = predicted_rows,
) -> ReverseAttention:
    """Classify a map z (N, D, H, W), multiply it by the weights of one class, and classify it again.

    weight (C, F), bias (C,): of the classifier of pooled maps, F = D x (H / pool) x (W / pool), the channel first. Each
    of its weights multiplies one window of the pooling. Nothing is detached.
    pool: side of a window, or both sides. labels (N,) int64: the classes; None: as `rows` chooses.
    Raises: ValueError where windows do not divide the map, or do not give F features.
    """
    window = (pool, pool) if isinstance(pool, int) else pool
    (N, D, H, W), (h, w) = z.shape, window
    if H % h or W % w or D * (H // h) * (W // w) != weight.shape[1]:
        raise ValueError(f"a map of {D} x {H} x {W} and windows of {h} x {w} do not give {weight.shape[1]} features")
    u = average_pool(z, window)
    auxiliary = F.linear(u, weight, bias)
    chosen = (rows if labels is None else rows_of(labels))(auxiliary, weight)
    mask = chosen.view(N, D, H // h, 1, W // w, 1)
    weighted = z.unflatten(3, (-1, w)).unflatten(2, (-1, h)) * mask
    # The mean of a window of z' is that of z times its weight.
    return ReverseAttention(weighted.flatten(4, 5).flatten(2, 3), auxiliary, F.linear(u * chosen, weight, bias))


@dataclass(frozen=True)
class RaBlock:
    """A residual block, the tail of its network and reverse attention. It holds the network's modules, and none itself.

    use: which use of the tail it is.
    """

    block: nn.Module
    backbone: StagedNet
    linear: nn.Linear
    use: int

    def __call__(self, x: Tensor, rows: Rows = predicted_rows) -> ReverseAttention:
        """x (N, ., H, W): the map before the block."""
        z = self.backbone.tail(self.block(x), self.use)
        return reverse_attention(z, self.linear.weight, self.linear.bias, pool=self.backbone.window(z), rows=rows)


class RaClassifier(Classifier):
    """A classifier whose last blocks are followed by reverse attention. Its parameters are those of `Classifier`.

    The one linear head serves all of these blocks, and gradients reach it from everywhere.
    In training mode rows follow from labels; in evaluation mode from each block's own prediction, or as asked for.

    ra_blocks: their number; None: the last two, or the last one of a backbone with one block a stage. A buffer, by
    which a file of weights is known to be of this kind. The file holds `input_mean` and `input_std`, too, since
    published networks take images as they are.
    Raises: ValueError for a backbone that is no `StagedNet`, and for more blocks than the last stage has.
    """

    backbone: StagedNet
    ra_blocks: Tensor

    def __init__(self, backbone: nn.Module, *, n_classes: int, ra_blocks: int | None = None):
        if not isinstance(backbone, StagedNet):
            raise ValueError(
                f"reverse attention needs a backbone made of residual blocks, got {type(backbone).__name__}"
            )
        there = len(backbone.layers()[-1])
        count = min(2, there) if ra_blocks is None else ra_blocks
        if not 1 <= count <= there:
            raise ValueError(f"ra_blocks must be between 1 and {there}, the blocks of the last stage, got {ra_blocks}")
        backbone.repeat_tail(count)
        super().__init__(backbone, n_classes=n_classes)
        self.register_buffer("ra_blocks", torch.tensor(count))
        for name in ("input_mean", "input_std"):
            self.register_buffer(name, self.get_buffer(name), persistent=True)
        self._count = count

    def forward(self, images: Tensor) -> Tensor:
        """The final class logits (N, C) in evaluation mode. Raises: ValueError in training mode."""
        return self.heads(images).final

    def heads(self, images: Tensor, labels: Tensor | None = None, *, rows: Rows = predicted_rows) -> Heads:
        """Logits of images (N, in_channels, H, W) in [0, 1]; of the auxiliary ones there is one for each RA block.

        labels (N,) int64: the classes whose rows are taken, in training mode alone. rows: how they are chosen in
        evaluation mode, see `rows_of`, `soft_rows`, `straight_through_rows`.
        Raises: ValueError in training mode without labels.
        """
        outputs = self._attend(images, self._rows(labels, rows))
        auxiliary = tuple(full_precision(output.auxiliary) for output in outputs)
        return Heads(full_precision(outputs[-1].final), auxiliary)

    def features(self, images: Tensor) -> Tensor:
        """What the linear head classifies last (N, F): pooled, weighted features.

        Raises: ValueError in training mode.
        """
        (*_, last) = self._attend(images, self._rows(None, predicted_rows))
        return average_pool(last.z, self.backbone.window(last.z))

    def _rows(self, labels: Tensor | None, rows: Rows) -> Rows:
        if not self.training:
            return rows
        if labels is None:
            raise ValueError("reverse attention needs labels in training mode")
        return rows_of(labels)

    def _attend(self, images: Tensor, rows: Rows) -> list[ReverseAttention]:
        """The outputs of the RA blocks, in order."""
        blocks = [block for layer in self.backbone.layers() for block in layer]
        x, outputs = self.backbone.stem(self.normalise(images)), []
        for block in blocks[: -self._count]:
            x = block(x)
        for use, block in enumerate(blocks[-self._count :]):
            outputs.append(RaBlock(block, self.backbone, self.linear, use)(x, rows))
            x = outputs[-1].z
        return outputs


# Names in the published programs' files, and here; those of the wide network come second.
_PUBLISHED = (
    (r"fc\.", "linear."),
    (r"block(\d+)\.layer\.", r"layer\1."),
    (r"(.*)\.convShortcut\.", r"\1.shortcut.0."),
)


def from_published(state: Mapping[str, Tensor], *, ra_blocks: int = 2) -> dict[str, Tensor]:
    """The state dict of an `RaClassifier` from one of the published programs, whose images are not normalised.

    That is a network with reverse attention behind its last `ra_blocks` blocks, which its file does not say. The second
    copy of the first stage, `sub_block1`, which the published wide network has and does not use, is left out.
    """
    wide = any(key.startswith("block1.") for key in state)
    names = [*_PUBLISHED, (r"bn1\.", "bn.")] if wide else _PUBLISHED
    found = {}
    for key, value in state.items():
        if not key.startswith("sub_block1."):
            for theirs, ours in names:
                key = re.sub(f"^{theirs}", ours, key)
            found[key] = value
    channels = len(state["conv1.weight"][0])
    plain = {"input_mean": torch.zeros(channels, 1, 1), "input_std": torch.ones(channels, 1, 1)}
    return found | plain | {"ra_blocks": torch.tensor(ra_blocks)}
