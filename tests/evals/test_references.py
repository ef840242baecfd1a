"""Reference partners: which training images they are, which draw has which, and whose views they are mixed into."""

import shutil

import pytest
import torch

import eval as evaluate
import tsne
from datasets.augment import AlignedSpec
from datasets.sets import image_set
from datasets.shifts import ShiftSpec
from datasets.views import DrawSpec
from evals import EVALS, TSNES, embed, extract
from evals.extract import concatenate, draw_means, reference_pool
from evals.scores import SCORES
from evals.specs import TsneSpec
from tests.conftest import SHIFT, TINY

PLAIN = AlignedSpec(color_jitter_strength=0.0, resize_factor=1.0, resize_fix=True)


def grays(n: int, of: int = 0):
    """Images of n levels of grey."""
    levels = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1) + of
    return image_set(levels.expand(n, 3, 8, 8).contiguous(), torch.zeros(n))


def references_of_draws(seed: int, batch_size: int, draws: int = 30) -> torch.Tensor:
    """(T, N): which of ten references each draw mixes with each of seven images, told by its grey."""
    pool = (torch.arange(10.0) / 10).view(10, 1, 1, 1).expand(10, 3, 8, 8)
    spec = DrawSpec(ShiftSpec("bmix", 1.0).functions(), PLAIN, seed=seed, batch_size=batch_size)
    seen: list[torch.Tensor] = []

    def outputs(views: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append((views[:, 1].mean((1, 2, 3)) * 10).round().long())
        return {"x": views.mean((2, 3, 4))[..., None]}

    concatenate(draw_means(outputs, grays(7, 100), spec, draws, label="test", references=pool))
    batches = [seen[i : i + draws] for i in range(0, len(seen), draws)]  # all draws of a batch come together
    return torch.cat([torch.stack(batch) for batch in batches], 1)


def test_every_draw_has_a_reference_of_its_own_the_same_for_all_images():
    found = references_of_draws(0, 7)
    assert found.shape == (30, 7) and (found == found[:, :1]).all()
    assert len(found[:, 0].unique()) > 6  # ten of which thirty were drawn
    assert torch.equal(found, references_of_draws(0, 3))
    assert not torch.equal(found, references_of_draws(1, 7))


def test_the_pool_is_drawn_by_the_seed_alone_without_repetition():
    train = grays(200)
    pools = []
    for n, seed in enumerate((0, 0, 1)):
        torch.manual_seed(n)  # whatever was drawn before
        pools.append((reference_pool(train, 50, seed)[:, 0, 0, 0] * 255).round().long())
    assert torch.equal(pools[0], pools[1]) and not torch.equal(pools[0], pools[2])
    assert all(len(pool.unique()) == 50 for pool in pools)
    assert pools[0].max() > 120  # from all over the set


# Of the networks of stage 1 and 2.
MIXED = {"simclr_CSI", "cocsr_dict"}
FITTED = [
    mode
    for mode, row in EVALS.items()
    if any(SCORES[name].fitted for name in row.scores) and MIXED & set(row.trained_by)
]


@pytest.fixture
def mixed(monkeypatch) -> dict[str, int | None]:
    """How many references each set is mixed with, by the set's label."""
    seen: dict[str, int | None] = {}
    real = draw_means

    def watched(*args, label, references=None, **settings):
        seen[label] = None if references is None else len(references)
        return real(*args, label=label, references=references, **settings)

    monkeypatch.setattr(extract, "draw_means", watched)
    return seen


def evaluated(script, mode: str, run, place, *more: str) -> None:
    """Evaluate a copy of a run folder."""
    folder = shutil.copytree(run, place / "run")
    sparse = ["--invert_sr_feature_norm"] if "cocsr" in run.name else []
    small = ["--sr_dict_size", "8", "--sr_fit_steps", "3"] if "multi_sr" in mode else []
    args = [*TINY, *SHIFT, *sparse, *small, "--mode", mode, "--load_path", str(folder), "--device", "cpu", *more]
    assert script.main(args) == 0


@pytest.mark.parametrize("mode", FITTED)
def test_references_are_mixed_into_test_images_of_the_modes_that_say_so(mode, stage1, stage2, mixed, tmp_path):
    run = stage2 if EVALS[mode].trained_by == ("cocsr_dict",) else stage1
    evaluated(evaluate, mode, run, tmp_path, "--refmix_batch_size", "9")
    assert mixed == {"training images": None, "digits test images": 9 if mode.endswith("refmix") else None}


@pytest.mark.parametrize(
    "mode", [mode for mode, row in TSNES.items() if MIXED & set(row.trained_by) and TsneSpec in row.specs]
)
def test_references_of_pictures(mode, stage1, stage2, mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "project", lambda *_: {})
    monkeypatch.setattr("evals.report.draw_points", lambda *args, **facts: None)
    run = stage2 if TSNES[mode].trained_by == ("cocsr_dict",) else stage1
    evaluated(tsne, mode, run, tmp_path, "--refmix_batch_size", "9")
    assert mixed == {"training images": None, "digits test images": 9 if mode.endswith("refmix") else None}
