"""k-means of features for the start of dictionaries, against ten starts of scikit-learn's KMeans.

Letters: N points, F feature size, M centres.
"""

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from benchmarks.compare import Part
from common.seed import generator
from models.sparse.kmeans import kmeans

POINTS, FEATURES, CENTRES = 5000, 512, 512
STARTS = 10


def correlated(points: int = POINTS, features: int = FEATURES) -> Tensor:
    """Gaussian features (N, F) without clusters, of low effective rank, as those of a network are."""
    gen = generator(0, "benchmark k-means correlated")
    turn = torch.linalg.qr(torch.randn(features, features, generator=gen)).Q
    return torch.randn(points, features, generator=gen) / torch.arange(1, features + 1) @ turn


def clustered(points: int = POINTS, features: int = FEATURES, clusters: int = 300) -> Tensor:
    """A mixture (N, F) of Gaussians of unequal weights, each with its own width in each direction."""
    gen = generator(0, "benchmark k-means clustered")
    means = torch.randn(clusters, features, generator=gen) * torch.arange(1, features + 1).pow(-0.25)
    weights = torch.rand(clusters, generator=gen).square() + 0.05
    widths = 0.15 * (0.7 * torch.randn(clusters, features, generator=gen)).exp()
    labels = torch.multinomial(weights, points, replacement=True, generator=gen)
    return means[labels] + widths[labels] * torch.randn(points, features, generator=gen)


def part(device: torch.device, x_NF: Tensor | None = None, name: str = "k-means start") -> Part:
    """One start of ours on `device` against the best of ten; on correlated features, or on those given."""
    x_NF = correlated() if x_NF is None else x_NF
    on_device = x_NF[None].to(device)

    def ours() -> Tensor:
        return kmeans(on_device, CENTRES, generator=generator(0, "benchmark k-means"))[0]

    def published() -> Tensor:
        found = KMeans(CENTRES, n_init=STARTS, random_state=0).fit(x_NF.numpy())
        return torch.from_numpy(found.cluster_centers_)

    def check(mine: Tensor, theirs: Tensor) -> str:
        a, b = inertia(x_NF, mine.cpu()), inertia(x_NF, theirs)
        assert a <= 1.01 * b, f"inertia {a:.6g}, theirs {b:.6g}"
        return f"inertia {a:.6g}, best of {STARTS} {b:.6g}: {100 * (a / b - 1):+.2f} %"

    size = f"{x_NF.shape[0]} x {x_NF.shape[1]}, {CENTRES} centres"
    return Part(name, size, ours, published, check)


def parts(device: torch.device) -> list[Part]:
    """Both kinds of features."""
    return [part(device), part(device, clustered(), "k-means start, clustered features")]


def inertia(x_NF: Tensor, c_MF: Tensor) -> float:
    """The sum of squared distances to the nearest centre, in float64."""
    return float(torch.cdist(x_NF.double(), c_MF.double()).square().amin(1).sum())
