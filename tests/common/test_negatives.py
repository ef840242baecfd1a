"""Which images become negatives: against loops, and the known answers."""

import pytest
import torch

from common.negatives import NONE, STRATEGIES, StrategySpec, pick_negatives
from tests.fake_gpu import FakeGpu


def gen(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def batch(n=24, classes=5, seed=0):
    logits = torch.randn(n, classes, generator=gen(seed))
    return logits, torch.randint(classes, (n,), generator=gen(seed + 1))


def test_known_answers(golden):
    g = golden("ancra_ops")
    for strategy in ("soft", "hard", "easy"):
        found = pick_negatives(g["pick_logits"], g["pick_label"], strategy=strategy, generator=gen())[:, 0]
        known = g[f"pick_{strategy}"]
        assert torch.equal(found[known >= 0], known[known >= 0]) and (known >= 0).sum() > 5
        assert (g["pick_label"][found] != g["pick_label"]).all() and (found >= 0).all()


def test_the_example_of_the_specification():
    logits = torch.zeros(4, 3)
    logits[:, 0] = torch.tensor([2.0, 1.5, -1.0, 0.9])
    logits[2, 1], labels = 5, torch.tensor([0, 1, 1, 2])  # predictions 0, 0, 1, 0
    found = pick_negatives(logits, labels, strategy="hard", generator=gen())[:, 0].tolist()
    assert found[0] == 1  # of 1 and 3
    assert found[1] in (0, 3)  # nothing is taken for class 1 but an image of class 1: at random


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("strategy", ["soft", "hard", "easy"])
@pytest.mark.parametrize("count", [1, 3, 30])
def test_candidates_are_those_of_a_loop(strategy, count, seed):
    logits, labels = batch(seed=seed)
    named = logits.argmax(1)
    fits = {
        "soft": lambda i, j: named[j] == named[i],
        "hard": lambda i, j: named[j] == labels[i],
        "easy": lambda i, j: named[j] != labels[i] and named[j] != named[i],
    }[strategy]
    found = pick_negatives(logits, labels, strategy=strategy, count=count, generator=gen())
    assert found.shape == (24, count)
    for i in range(24):
        candidates = [j for j in range(24) if labels[j] != labels[i] and fits(i, j)]
        best = sorted(candidates, key=lambda j: -float(logits[j, labels[i]]))[:count]
        if best:
            assert found[i].tolist() == best + [NONE] * (count - len(best))
        else:
            assert found[i, 0] >= 0 and labels[found[i, 0]] != labels[i]


@pytest.mark.parametrize("count, per_class", [(1, 1), (3, 1), (4, 2), (3, 3)])
def test_random_ones_are_of_distinct_other_classes_that_have_enough_members(count, per_class):
    logits, labels = batch(30)
    labels[labels == 4] = 0
    labels[7] = 4  # a class with one member
    for seed in range(20):
        found = pick_negatives(logits, labels, strategy="random", count=count, per_class=per_class, generator=gen(seed))
        for i, row in enumerate(found.tolist()):
            chosen = [j for j in row if j != NONE]
            assert len(set(chosen)) == len(chosen)
            classes = [int(labels[j]) for j in chosen]
            assert int(labels[i]) not in classes and (per_class == 1 or 4 not in classes)
            assert all(classes.count(c) == per_class for c in classes)
            assert len(chosen) == count


def test_classes_are_drawn_evenly_and_so_are_their_members():
    labels = torch.tensor([0, 1, 1, 1, 2])
    drawn = torch.cat(
        [pick_negatives(torch.zeros(5, 3), labels, strategy="random", generator=gen(s))[:1] for s in range(3000)]
    )
    share = drawn.flatten().bincount(minlength=5) / 3000
    torch.testing.assert_close(share, torch.tensor([0, 1 / 6, 1 / 6, 1 / 6, 1 / 2]), atol=0.03, rtol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_batch_of_one_class_has_none(strategy):
    found = pick_negatives(torch.randn(4, 3), torch.ones(4, dtype=torch.long), strategy=strategy, generator=gen())
    assert (found == NONE).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_draws_agree_and_nothing_waits_for_the_device(strategy):
    logits, labels = batch()
    one, two = (pick_negatives(logits, labels, strategy=strategy, generator=gen(3)) for _ in range(2))
    assert torch.equal(one, two)
    with FakeGpu() as gpu:
        on_gpu = logits.to(gpu.device), labels.to(gpu.device)
        gpu.waits.clear()
        pick_negatives(*on_gpu, strategy=strategy, generator=gen(3, gpu.device))
        assert not gpu.waits


def test_settings_out_of_range_are_refused():
    logits, labels = batch()
    with pytest.raises(ValueError, match="strategies are random"):
        pick_negatives(logits, labels, strategy="hardest", generator=gen())
    with pytest.raises(ValueError, match="2 negatives of a class do not make 3"):
        pick_negatives(logits, labels, strategy="random", count=3, per_class=2, generator=gen())


def test_a_strategy_says_who_is_chosen_and_whether_they_are_attacked():
    assert [(spec.rule, spec.attacked) for spec in map(StrategySpec, ("hard", "random_adv"))] == [
        ("hard", False),
        ("random", True),
    ]
    assert StrategySpec() == StrategySpec("random_adv")
