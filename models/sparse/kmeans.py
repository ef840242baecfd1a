"""k-means in torch, for the starting atoms of dictionaries.

Dimension letters: see `models`; here N points in each of K sets, M centres.
"""

from collections.abc import Iterator

import torch
from torch import Generator, Tensor

# k-means++: points per centre that it samples from; centres drawn in one batch; proposals for each centre drawn.
_SEEN, _BATCH, _SPARE = 4, 32, 2
# Rounds of Lloyd and swaps before plain Lloyd, and the largest fraction of the centres that one round swaps.
_ROUNDS, _SWAPPED = 8, 0.25
# Small sets get several starts, of which the best is kept: at most _STARTS, and at most _SMALL scores N x M in all.
_STARTS, _SMALL = 8, 2**20
# Points proposed as centres in one round: as many as centres, but at least this many.
_PROPOSED = 256
# Steps between looks at convergence on a device, each of which waits for it.
_LOOK_EVERY = 4
# Elements of a block of scores.
_BLOCK = {"cpu": 2**22, "cuda": 2**26}
# Bfloat16 scores are used for swaps while the mean squared distance of points to their centre is above this fraction of
# the variance; their error is about 0.004 of it.
_ROUGH = 0.04


@torch.no_grad()
def kmeans(
    x_KNF: Tensor,
    centres: int,
    *,
    generator: Generator,
    tol: float = 1e-4,
    steps: int = 100,
    rounds: int = _ROUNDS,
    block: int | None = None,
) -> Tensor:
    """k-means of K sets of N points: centres (K, M, F) of low inertia, on the device and in the dtype of x.

    Each set is clustered separately: k-means++ (D^2 sampling) on some of the points; `rounds` rounds of a Lloyd step
    followed by swaps, which move the centres whose removal costs least to the points that gain most; then Lloyd steps
    until the mean squared move of the centres is at most `tol` times the variance (summed over features), or for
    `steps` steps. Small sets keep the best of several starts. A centre without points moves to one of the points
    farthest from their centres. In a set of fewer than M distinct points, centres coincide or have no points; none is
    NaN.

    generator: a CPU generator, so that the draws are the same on every device. It is used set by set, so clustering
    the sets in separate calls gives the same result as one call.
    block: largest number of elements of a block of scores (N x M at most). Memory holds one block and two copies of one
    set.

    Distances are compared as x'c - |c|^2 / 2 on centred and scaled points, so the result does not depend on units and
    offsets. On a CPU with bfloat16 products the rounds before Lloyd use them where they are precise enough.

    Raises: ValueError for shapes that do not fit and for non-finite points.
    Source: Arthur & Vassilvitskii 2007 for the start; the swaps are in the spirit of Fritzke, "Breathing k-means"
    (2020), with the gains of proposed centres in place of the errors of clusters.
    """
    if x_KNF.ndim != 3 or not x_KNF.shape[1] or centres < 1:
        raise ValueError(f"need (K, N, F) with N >= 1 and centres >= 1, got {tuple(x_KNF.shape)} and {centres}")
    block = block or _BLOCK.get(x_KNF.device.type, _BLOCK["cpu"])
    with torch.autocast(x_KNF.device.type, enabled=False):
        found = [_one_set(x, centres, generator, tol, steps, rounds, block) for x in x_KNF]
    return torch.stack(found) if found else x_KNF.new_empty(0, centres, x_KNF.shape[2])


def _one_set(x: Tensor, centres: int, generator: Generator, tol: float, steps: int, rounds: int, block: int) -> Tensor:
    dtype = x.dtype
    x = x.float() if dtype in (torch.float16, torch.bfloat16) else x
    mean = x.mean(0)
    x = x - mean
    scale = torch.stack(x.aminmax()).abs().amax().clamp_min(torch.finfo(x.dtype).tiny)
    if not scale.isfinite():
        raise ValueError("k-means of non-finite points")
    x /= scale
    shift = x.mean(0)  # What rounding left; it matters where the mean is much larger than the spread.
    x -= shift
    points = _Points(x, block)
    starts = max(1, min(_STARTS, _SMALL // (len(x) * centres)))
    c = _one_start(points, centres, generator, tol, steps, rounds)
    least = points.distance(points.nearest(c)[0]).sum() if starts > 1 else points.least
    for _ in range(starts - 1):
        other = _one_start(points, centres, generator, tol, steps, rounds)
        inertia = points.distance(points.nearest(other)[0]).sum()
        c = torch.where(inertia < least, other, c)
        least = torch.minimum(least, inertia)
    return ((c + shift) * scale + mean).to(dtype)


def _one_start(points: "_Points", centres: int, generator: Generator, tol: float, steps: int, rounds: int) -> Tensor:
    x = points.x
    order = torch.randperm(len(x), generator=generator)
    some = _Points(x[order[: _SEEN * centres].to(x.device)], points.block)
    c, away = _start(some, centres, generator)
    rough = points
    if rounds and _has_fast_bfloat16(x.device) and away.mean() > _ROUGH * some.square.mean():
        rough = _Points(x, points.block, torch.bfloat16)
    for _ in range(rounds):
        c = _round(rough, c, generator)
    return _lloyd(points, c, tol, steps)


class _Points:
    """One set: x (N, F) centred; square |x|^2; scores from copies in `product_dtype`, in blocks of at most `block`."""

    def __init__(self, x: Tensor, block: int, product_dtype: torch.dtype | None = None):
        self.x = x
        self.square = x.square().sum(1)
        # Squared distances below this are rounding.
        self.least = 16 * torch.finfo(x.dtype).eps * self.square.mean()
        self._product = x if product_dtype is None else x.to(product_dtype)
        self.block = block

    def scores(self, c: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of x and a buffer with their scores x'c - |c|^2 / 2, in the products' dtype: the larger, the nearer."""
        product = self._product
        half = (c.square().sum(1) / 2).to(product.dtype)
        c = c.to(product.dtype)
        rows = max(1, min(len(product), self.block // len(c)))
        buffer = product.new_empty(rows, len(c))
        for first in range(0, len(product), rows):
            part = product[first : first + rows]
            yield slice(first, first + rows), torch.mm(part, c.T, out=buffer[: len(part)]).sub_(half)

    def nearest(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """The best score (N,) and whose it is (N,)."""
        found = [score.max(1) for _, score in self.scores(c)]
        return torch.cat([f.values for f in found]).to(self.x.dtype), torch.cat([f.indices for f in found])

    def nearest_two(self, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best score (N,) and whose it is (N,), the second best (N,) and whose that is (N,)."""
        found = []
        for _, score in self.scores(c):
            first = score.max(1)
            second = score.scatter_(1, first.indices[:, None], -torch.inf).max(1)
            found.append((first.values, first.indices, second.values, second.indices))
        best, labels, runner_up, heirs = (torch.cat(part) for part in zip(*found, strict=True))
        return best.to(self.x.dtype), labels, runner_up.to(self.x.dtype), heirs

    def distance(self, best: Tensor) -> Tensor:
        """Squared distances (N,) of best scores; 0 where they are rounding."""
        d = self.square - 2 * best
        return d.masked_fill_(d < self.least, 0)

    def means(self, labels: Tensor, away: Tensor, c: Tensor) -> Tensor:
        """Means of each label's points, (M, F). A label without any takes one of the farthest, or else stays at c."""
        count = _sums(torch.ones_like(away), labels, len(c))
        empty = count == 0
        far = away.topk(min(len(c), len(away))).indices
        rank = (empty.cumsum(0) - 1).clamp_(0, len(far) - 1)
        # The first empty one gets the farthest point, the second the second; past the last different point, none.
        gets = empty & (away[far[rank]] > 0) & (empty.cumsum(0) <= len(far))
        slot = torch.where(gets, far[rank], len(away))
        padded = torch.cat([labels, labels[:1]])
        padded[slot] = torch.where(gets, torch.arange(len(c), device=c.device), padded[-1])
        labels = padded[:-1]
        count = _sums(torch.ones_like(away), labels, len(c))
        means = _sums(self.x, labels, len(c)) / count.clamp_min(1)[:, None]
        return torch.where((count > 0)[:, None], means, c)


def _lloyd(points: _Points, c: Tensor, tol: float, steps: int) -> Tensor:
    bound = tol * points.square.mean() * len(c)
    every = 1 if c.device.type == "cpu" else _LOOK_EVERY
    done = torch.zeros((), dtype=torch.bool, device=c.device)
    for step in range(steps):
        best, labels = points.nearest(c)
        new = points.means(labels, points.distance(best), c)
        still = (new - c).square().sum() <= bound
        c = torch.where(done, c, new)
        done = done | still
        if step % every == every - 1 and done:
            break
    return c


def _round(points: _Points, c: Tensor, generator: Generator) -> Tensor:
    """One step of Lloyd, and swaps of the centres that are missed least for points that gain most."""
    best, labels, second, heirs = points.nearest_two(c)
    away = points.distance(best)
    missed = _sums(2 * (best - second), labels, len(c)) if len(c) > 1 else torch.full_like(c[:, 0], torch.inf)
    new = points.means(labels, away, c)
    proposed = _draw(away, max(len(c), _PROPOSED), generator)
    owner = labels[proposed]
    # Halfway to the centre that it would relieve: nearer than the point itself to the mean of what it would take over.
    y = (points.x[proposed] + c[owner]) / 2
    gain = best.new_zeros(len(proposed))
    for rows, score in points.scores(y):
        gain += 2 * score.sub_(best[rows, None].to(score.dtype)).clamp_(min=0).sum(0, dtype=gain.dtype)
    # The best proposal of each cluster; of equal ones the last.
    most = torch.zeros_like(missed).scatter_reduce_(0, owner, gain, "amax")
    best_place = torch.where(gain == most[owner], torch.arange(len(y), device=c.device), 0)
    winner = owner.new_zeros(len(c)).scatter_reduce_(0, owner, best_place, "amax")
    pairs = max(1, round(_SWAPPED * len(c)))
    gains, at = most.topk(pairs)
    costs, gone = missed.topk(pairs, largest=False)
    # Who takes over the points of a centre must not go before it: of two that coincide, one has to stay.
    place = torch.full_like(winner, len(c)).index_copy_(0, gone, torch.arange(pairs, device=c.device))
    heir = torch.arange(len(c), device=c.device).scatter_reduce_(0, labels, heirs, "amax", include_self=False)
    swap = (gains > costs + points.least) & (place[heir[gone]] >= place[gone])
    new[gone] = torch.where(swap[:, None], y[winner[at]], new[gone])
    return new


def _start(points: _Points, centres: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Centres (M, F) drawn by k-means++, and the squared distances (N,) to the nearest.

    In batches: proposals are drawn in proportion to the distances so far, and from them, one at a time, the centres in
    proportion to what those before them in the batch left of it. That is D^2 sampling, but for the proposals' number.
    """
    x, square = points.x, points.square
    chosen = _draw(torch.ones_like(square), 1, generator)
    away = points.distance(points.nearest(x[chosen])[0]).index_fill_(0, chosen, 0)
    while len(chosen) < centres:
        batch = min(_BATCH, centres - len(chosen))
        proposed = _draw(away, _SPARE * batch, generator)
        y = x[proposed]
        between = (square[proposed, None] + square[proposed] - 2 * y @ y.T).clamp_(min=0).fill_diagonal_(0)
        uniform = torch.rand(batch, len(y), generator=generator, dtype=torch.float64)
        race = -uniform.to(x).log_().clamp_(max=-1e-30) * away[proposed].clamp_min(1e-30)
        left, taken = away[proposed], []
        for j in range(batch):
            taken.append((left / race[j]).argmax(0, keepdim=True))
            left = torch.minimum(left, between.index_select(0, taken[-1])[0])
        new = proposed[torch.cat(taken)]
        away = torch.minimum(away, points.distance(points.nearest(x[new])[0])).index_fill_(0, new, 0)
        chosen = torch.cat([chosen, new])
    return x[chosen], away


def _draw(weight: Tensor, count: int, generator: Generator) -> Tensor:
    """`count` indices, with replacement, in proportion to weights >= 0; any where all are 0."""
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    # On the CPU: sums along a CUDA tensor come in changing order, and Apple's GPUs have no float64.
    total = weight.cpu().double().cumsum(0)
    chosen = torch.searchsorted(total, uniform * total[-1], right=True).clamp_(max=len(weight) - 1)
    return chosen.to(weight.device)


def _sums(values: Tensor, labels: Tensor, count: int) -> Tensor:
    """Sums of the values (N, ...) of each label 0..count-1, in a fixed order: the same bits each time."""
    zeros = values.new_zeros(count, *values.shape[1:])
    if values.device.type == "cpu":
        return zeros.index_add_(0, labels, values)
    return zeros.index_put_((labels,), values, accumulate=True)  # By sorting, where index_add_ has atomic adds.


def _has_fast_bfloat16(device: torch.device) -> bool:
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))
