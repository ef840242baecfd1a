"""What attacks are tried on: linear models whose worst image is known, and small networks on digits."""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from common.attacks import pgd
from common.attacks.objectives import judged
from common.seed import generator


class Linear(nn.Module):
    """Logits (w x, -w x) of images; each image by itself, to the bit."""

    def __init__(self, w: Tensor):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        score = (x * self.w).flatten(1).sum(1)
        return torch.stack([score, -score], 1)


def conv_net(width: int = 12) -> nn.Module:
    """For digits of 8 x 8 pixels, with batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 10),
    )


def dense_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (1297, 1, 8, 8) in [0, 1] and labels, test images (500, 1, 8, 8) and labels, shuffled."""
    data = load_digits()
    images = torch.from_numpy(data.images.astype(np.float32) / 16)[:, None]
    order = torch.randperm(len(images), generator=generator(0, "digits"))
    images, labels = images[order], torch.from_numpy(data.target).long()[order]
    return images[:-500], labels[:-500], images[-500:], labels[-500:]


def train(net: nn.Module, epochs: int, *, eps: float = 0.0) -> nn.Module:
    """With Adam; eps > 0: on images of a PGD of three steps. In evaluation mode afterwards."""
    images, labels, _, _ = digits()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for epoch in range(epochs):
        for index in torch.randperm(len(images), generator=generator(epoch, "order")).split(100):
            x, y = images[index], labels[index]
            if eps:
                x = pgd(judged(net.eval()), x, y, eps=eps, steps=3, step=eps / 2, keep="last")
            loss = F.cross_entropy(net.train()(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    optimizer.zero_grad()
    return net.eval()


@functools.cache
@torch.enable_grad()
def trained(kind: str) -> nn.Module:
    """`dense`, `conv`, or `robust`: a convolutional one trained on attacked images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = dense_net() if kind == "dense" else conv_net()
        return train(net, 6, eps=0.15 if kind == "robust" else 0.0)


class Counting(nn.Module):
    """Counts images that go forward and gradients that come back."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.forward_passes: list[int] = []
        self.backward_passes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.forward_passes.append(len(x))
        if x.requires_grad:
            x = x.clone()
            x.register_hook(lambda grad: self.backward_passes.append(len(grad)))
        return self.net(x)
