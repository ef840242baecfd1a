import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from common.seed import generator
from models.sparse import kmeans as module
from models.sparse.kmeans import kmeans
from tests.fake_gpu import FakeGpu, in_changing_order


def correlated(n: int = 600, features: int = 24, sets: int = 1, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, features + 1).pow(-0.7)
    return torch.randn(sets, n, features, generator=gen) * scale


def clusters(count: int, each: int, features: int = 16, width: float = 0.01) -> tuple[Tensor, Tensor]:
    """Points (1, count * each, F) about far points (count, F)."""
    gen = torch.Generator().manual_seed(1)
    far = torch.randn(count, features, generator=gen)
    noise = torch.randn(count * each, features, generator=gen)
    return (far.repeat_interleave(each, 0) + width * noise)[None], far


def inertia(x_NF: Tensor, c_MF: Tensor) -> float:
    return float(torch.cdist(x_NF.double(), c_MF.double()).square().amin(1).sum())


def run(x: Tensor, centres: int, seed: int = 0, **options: float) -> Tensor:
    return kmeans(x, centres, generator=generator(seed, "test"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("points", ["correlated", "clusters"])
def test_inertia_within_one_percent_of_scikit_learns_best_of_ten(points, seed):
    x = correlated(seed=seed) if points == "correlated" else clusters(40, 15, width=0.3)[0]
    theirs = KMeans(60, n_init=10, random_state=seed).fit(x[0].numpy()).inertia_
    assert inertia(x[0], run(x, 60, seed)[0]) <= 1.01 * theirs


@pytest.mark.parametrize("width", [0.01, 1e-4])
def test_recovers_well_separated_clusters(width):
    x, _ = clusters(30, 20, width=width)
    means = x[0].unflatten(0, (30, 20)).mean(1)
    distance, who = torch.cdist(means.double(), run(x, 30)[0].double()).min(1)
    assert distance.max() < 0.01 * width and len(who.unique()) == 30


def test_finds_structure_inside_clusters_too_far_apart_for_half_precision():
    x, _ = clusters(4, 150, width=1e-3)
    theirs = KMeans(40, n_init=10, random_state=0).fit(x[0].double().numpy()).inertia_
    assert inertia(x[0], run(x, 40)[0]) <= 1.02 * theirs


def test_centres_are_the_means_of_their_points_and_none_is_empty():
    x = correlated(2000, 32)
    c = run(x, 100, tol=0)[0]
    labels = torch.cdist(x[0].double(), c.double()).argmin(1)
    assert len(labels.unique()) == 100
    means = torch.stack([x[0, labels == m].mean(0) for m in range(100)])
    torch.testing.assert_close(c, means, atol=1e-5, rtol=0)


def test_a_cluster_without_points_goes_on_from_the_farthest_point(monkeypatch):
    x, far = clusters(10, 20)
    start = torch.cat([far[:9], torch.full((1, 16), 100.0)])
    monkeypatch.setattr(module, "_start", lambda points, *_: (start.clone(), points.square))
    # The start is given in units of the points: centre and scale are what they are for this set.
    mean = x[0].mean(0)
    scale = (x[0] - mean).abs().amax()
    start = (start - mean) / scale
    found = run(x, 10, rounds=0)[0]
    assert torch.cdist(far.double(), found.double()).amin(1).max() < 0.02


@pytest.mark.parametrize(("points", "distinct"), [(1, 1), (5, 5), (20, 20), (50, 3), (300, 12), (300, 1)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_fewer_points_than_centres_and_duplicates(points, distinct, offset):
    different = torch.randn(distinct, 6, generator=torch.Generator().manual_seed(0)) + offset
    x = different[torch.arange(points) % distinct][None]
    c = run(x, 20)
    assert c.shape == (1, 20, 6) and c.isfinite().all()
    assert torch.cdist(different.double(), c[0].double()).amin(1).max() < 1e-5 + 1e-6 * offset


def test_sets_do_not_know_each_other():
    x = correlated(sets=3) * torch.tensor([1.0, 1e-3, 50.0])[:, None, None]
    gen = generator(0, "test")
    one_by_one = torch.cat([kmeans(part, 30, generator=gen) for part in x.split(1)])
    assert torch.equal(run(x, 30), one_by_one)
    assert kmeans(x[:0], 30, generator=gen).shape == (0, 30, 24)


def test_depends_on_the_seed_alone():
    x = correlated()
    first = run(x, 30)
    torch.manual_seed(123)
    assert torch.equal(first, run(x, 30))
    assert not torch.equal(first, run(x, 30, seed=1))


@pytest.mark.parametrize(("factor", "offset"), [(1e-4, 0.0), (1e-15, 0.0), (1e25, 0.0), (1.0, 1e3)])
def test_units_and_offsets_do_not_matter(factor, offset):
    # On a grid, so that x + 1e3 is exact.
    x = (correlated() * 2**10).round() / 2**10
    moved = x * factor + offset
    back = (run(moved, 60).double() - offset) / factor
    assert inertia(x[0], back[0]) == pytest.approx(inertia(x[0], run(x, 60)[0]), rel=2e-3)
    assert inertia(x[0], back[0]) < 1.01 * KMeans(60, n_init=3, random_state=0).fit(x[0].numpy()).inertia_


def test_blocks_give_the_same(monkeypatch):
    x = correlated()
    whole = inertia(x[0], run(x, 60)[0])
    sizes = []
    mm = torch.mm

    def watched(a, b, *, out):
        sizes.append(out.numel())
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", watched)
    assert inertia(x[0], run(x, 60, block=1000)[0]) == pytest.approx(whole, rel=2e-3)
    assert max(sizes) <= 1000


def test_does_not_depend_on_the_number_of_threads():
    x, before = correlated(3000, 64), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(inertia(x[0], run(x, 100, rounds=3, steps=5)[0]))
    finally:
        torch.set_num_threads(before)
    assert found[0] == pytest.approx(found[1], rel=2e-3)


@pytest.mark.parametrize("fast", [False, True])
def test_with_and_without_bfloat16_products(monkeypatch, fast):
    x = correlated()
    monkeypatch.setattr(module, "_has_fast_bfloat16", lambda device: fast)
    theirs = KMeans(60, n_init=10, random_state=0).fit(x[0].numpy()).inertia_
    assert inertia(x[0], run(x, 60)[0]) <= 1.01 * theirs


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keeps_the_dtype(dtype):
    x = correlated().to(dtype)
    c = run(x, 30)
    assert c.dtype == dtype
    assert inertia(x[0], c[0]) == pytest.approx(inertia(x[0], run(x.float(), 30)[0]), rel=0.02)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_refuses_what_is_not_finite_and_shapes_that_do_not_fit(bad):
    x = correlated()
    for wrong in (x[0], x[:, :0]):
        with pytest.raises(ValueError, match="K, N, F"):
            run(wrong, 3)
    with pytest.raises(ValueError, match="centres"):
        run(x, 0)
    x[0, 5, 5] = bad
    with pytest.raises(ValueError, match="finite"):
        run(x, 3)


def crowded(centres: int = 8, apart: float = 1e-3) -> tuple[module._Points, Tensor, Tensor]:
    """Points about far clusters, of which the first has two centres `apart`, and the last two, near others, none.

    Returns points, the clusters' means, and the centres.
    """
    gen = torch.Generator().manual_seed(0)
    far = 3 * torch.randn(centres - 1, 16, generator=gen)
    means = torch.cat([far, far[1:3] + 0.5 * torch.randn(2, 16, generator=gen)])
    x = means.repeat_interleave(20, 0) + 0.01 * torch.randn(20 * len(means), 16, generator=gen)
    means, x = means - x.mean(0), x - x.mean(0)
    return module._Points(x, 2**22), means, torch.cat([means[:1] - apart, means[:1] + apart, means[1 : centres - 1]])


@pytest.mark.parametrize("centres", [8, 20])
@pytest.mark.parametrize("apart", [1e-3])
def test_of_two_centres_in_one_cluster_one_is_swapped_and_one_stays(apart, centres):
    """Either is hardly missed while the other is there; both would leave the cluster to nobody."""
    points, means, c = crowded(centres, apart)
    for seed in range(10):
        order = torch.randperm(centres, generator=generator(seed, "order"))
        new = module._round(points, c[order], generator(seed, "test"))
        moved = (new - c[order]).norm(dim=1) > 0.2
        assert moved[order < 2].sum() == 1 and torch.cdist(means[:1], new).min() < 0.1


def test_swaps_find_what_lloyd_alone_cannot(monkeypatch):
    points, means, start = crowded()
    monkeypatch.setattr(module, "_start", lambda some, *_: (start / scale, points.square / scale**2))
    scale = points.x.abs().max()
    swapped, lloyd = (inertia(points.x, run(points.x[None], 8, rounds=rounds)[0]) for rounds in (3, 0))
    assert swapped < 0.5 * lloyd


def test_the_best_of_several_starts_is_kept(monkeypatch):
    x, far = clusters(6, 30)
    ends = [far + 1.0, far + 3.0, far, far + 2.0, far - 1.0, far - 2.0, far - 3.0, far + 0.5]
    mean = x[0].mean(0)
    scale = (x[0] - mean).abs().amax()
    left = iter(ends)
    monkeypatch.setattr(module, "_one_start", lambda *_: (next(left) - mean) / scale)
    torch.testing.assert_close(run(x, 6)[0], far, atol=1e-5, rtol=0)
    assert next(left, None) is None


def test_points_are_drawn_in_proportion_to_their_weights():
    weight = torch.tensor([0.0, 1.0, 0.0, 3.0, 6.0, 0.0])
    drawn = module._draw(weight, 20_000, generator(0, "test")).bincount(minlength=6)
    torch.testing.assert_close(drawn / 20_000, weight / 10, atol=0.01, rtol=0)
    assert drawn[[0, 2, 5]].sum() == 0
    assert len(module._draw(torch.zeros(4), 10, generator(0, "test"))) == 10  # any, where there is nothing to choose by


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("centres", [20, 60])
def test_on_a_gpu_every_sum_has_its_order_and_nothing_is_float64(kind, centres, monkeypatch):
    """And the centres are those of the CPU, whose k-means here looks at no scores in bfloat16 either."""
    monkeypatch.setattr(module, "_has_fast_bfloat16", lambda device: False)
    x = correlated(400, sets=2)
    with FakeGpu(kind, forbidden=in_changing_order) as gpu:
        found = run(x.to(gpu.device), centres)
        assert found.device == gpu.device
    torch.testing.assert_close(found, run(x, centres), atol=1e-5, rtol=0)
