"""What a checkpoint of an autoencoder holds: the network, and the two parts of the data it was trained on."""

import torch
from torch import Tensor, nn


class RobustNet(nn.Module):
    """An autoencoder with the parts L and S (rows, n) of its training data, by image, and the threshold in use.

    Networks that were trained without a sparse part have none: rows is 0, and so is the threshold.
    shape: (channels, H, W) of an image, None for tables.
    """

    L: Tensor
    S: Tensor
    threshold: Tensor
    image_shape: Tensor

    def __init__(
        self, autoencoder: nn.Module, rows: int, features: int, shape: tuple[int, int, int] | None = None
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.register_buffer("L", torch.zeros(rows, features))
        self.register_buffer("S", torch.zeros(rows, features))
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float64))
        self.register_buffer("image_shape", torch.tensor(shape or (), dtype=torch.long))

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(channels, H, W) of an image, None for tables."""
        return tuple(self.image_shape.tolist()) or None  # type: ignore[return-value]

    def forward(self, rows: Tensor) -> Tensor:
        """Reconstructions of rows (B, n)."""
        return self.autoencoder(rows)
