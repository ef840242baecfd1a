import math
import warnings

import pytest
import torch
from torch import nn

from common.errors import UserError
from training.optim import OPTIMIZERS, Lars, OptimSpec, warm_up


def stated_rule(weights, gradients, lr, wd, trust=0.001, eps=1e-8, momentum=0.9):
    """LARS as the specification states it, in plain numbers."""
    weights = [w.flatten().tolist() for w in weights]
    buffers = [[0.0] * len(w) for w in weights]
    for step in gradients:
        for w, buffer, g in zip(weights, buffers, (g.flatten().tolist() for g in step), strict=True):
            w_norm, g_norm = math.sqrt(sum(x * x for x in w)), math.sqrt(sum(x * x for x in g))
            scale = trust * w_norm / (g_norm + wd * w_norm + eps) if w_norm > 0 and g_norm > 0 else 1.0
            for i in range(len(w)):
                buffer[i] = momentum * buffer[i] + scale * (g[i] + wd * w[i])
                w[i] -= lr * buffer[i]
    return weights


@pytest.mark.parametrize("wd", [0.0, 1e-6, 0.1])
def test_lars_follows_the_stated_rule_for_50_steps(wd):
    torch.manual_seed(0)
    start = [torch.randn(7, 3), torch.zeros(4), torch.randn(5), torch.full((2,), 1e-12)]
    start = [w.double() for w in start]
    gradients = [[torch.randn_like(w) * 10 ** (s % 5 - 2) for w in start] for s in range(50)]
    for s in range(0, 50, 7):
        gradients[s][2].zero_()
    parameters = [nn.Parameter(w.clone()) for w in start]
    optimizer = Lars(parameters, 0.5, weight_decay=wd)
    for step in gradients:
        for p, g in zip(parameters, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    for p, expected in zip(parameters, stated_rule(start, gradients, 0.5, wd), strict=True):
        torch.testing.assert_close(p.detach().flatten(), torch.tensor(expected, dtype=p.dtype), atol=1e-12, rtol=1e-12)


def test_lars_leaves_tensors_without_gradient_alone():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Lars([used, unused], 1.0, weight_decay=0.1)
    used.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(unused, torch.ones(2)) and not torch.equal(used, torch.ones(2))


def test_lars_goes_on_from_its_state_dict():
    def run(steps, optimizer, p):
        for s in steps:
            p.grad = torch.full_like(p, float(s))
            optimizer.step()

    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    whole = Lars([p], 0.1)
    run(range(1, 7), whole, p)
    first = Lars([q], 0.1)
    run(range(1, 4), first, q)
    second = Lars([q], 0.1)
    second.load_state_dict(first.state_dict())
    run(range(4, 7), second, q)
    assert torch.equal(p, q)


def spec(**changes) -> OptimSpec:
    values = {"optimizer": "lars", "lr_scheduler": "cosine", "lr_init": 0.1, "weight_decay": 0.0}
    return OptimSpec(**{**values, "warmup": 10, "epochs": 1000, **changes})


def test_schedule_agrees_with_the_warmup_package_over_1000_epochs():
    scheduler = pytest.importorskip("warmup_scheduler", reason="the oracle is in requirements-dev.txt")
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
    steps, worst = 4, 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
        theirs = scheduler.GradualWarmupScheduler(optimizer, multiplier=10.0, total_epoch=10, after_scheduler=after)
        for n in range(1000 * steps):
            theirs.step(n / steps)
            worst = max(worst, abs(optimizer.param_groups[0]["lr"] - spec().lr(n / steps)))
    assert worst < 1e-5


def test_schedule_at_points_known_by_hand():
    lr = spec().lr
    assert [lr(0), lr(5), lr(10)] == pytest.approx([0.1, 0.55, 1.0])
    assert lr(510) == pytest.approx(0.5)  # half a cosine after warm-up
    assert lr(1000) == pytest.approx(2.5e-4, rel=0.02)  # not zero: the cosine ends 10 epochs later
    step = spec(lr_scheduler="step_decay").lr
    assert [step(509.9), step(510), step(760)] == pytest.approx([1.0, 0.1, 0.01])
    assert spec(lr_scheduler="step_decay", optimizer="adam").lr(510) == pytest.approx(0.3)
    assert warm_up(0, 0, lambda e: 1.0) == 10


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "torchlars"])
def test_every_optimiser_has_its_rate_its_momentum_and_its_weight_decay(name):
    """Of one weight: a step without a gradient decays it, or with momentum goes on; the rate scales both."""

    def after(lr: float, decay: float, gradients: list[float]) -> float:
        w = nn.Parameter(torch.full((3,), 2.0))
        optimizer = spec(optimizer=name, lr_init=lr, weight_decay=decay).build([w])
        for gradient in gradients:
            w.grad = torch.full((3,), gradient)
            optimizer.step()
        return float(w.detach()[0])

    assert after(0.01, 0.0, [0.0]) == 2.0
    decayed, twice = 2 - after(0.01, 0.5, [0.0]), 2 - after(0.02, 0.5, [0.0])
    # Adam makes a step of the size of the rate of whatever gradient there is.
    assert decayed == pytest.approx(0.01 if name == "adam" else 0.01 * 0.5 * 2, rel=1e-4)
    assert twice == pytest.approx(2 * decayed, rel=1e-4)
    first, second = 2 - after(0.01, 0.0, [1.0]), after(0.01, 0.0, [1.0]) - after(0.01, 0.0, [1.0, 0.0])
    share = {"adam": 0.9 * 0.1 / 0.19 / (0.999 * 0.001 / (1 - 0.999**2)) ** 0.5}.get(name, 0.9)
    assert second == pytest.approx(share * first, rel=2e-3) and first > 0


def test_cosine_to_zero_ends_at_zero_however_long_the_warmup():
    short = spec(lr_scheduler="cosine_to_zero", epochs=24, warmup=4).lr
    assert short(0) == pytest.approx(0.1) and short(4) == pytest.approx(1) and short(24) == pytest.approx(0, abs=1e-12)
    assert short(14) == pytest.approx(0.5)
    assert spec(epochs=24, warmup=4).lr(24) == pytest.approx(0.0670, abs=1e-4)  # as published
    share = spec(lr_scheduler="cosine_to_zero", epochs=20, warmup_share=0.05).lr
    assert share(1) == pytest.approx(1) and share(20) == pytest.approx(0, abs=1e-12)
    with pytest.raises(UserError, match="leaves nothing of 10 epochs"):
        spec(lr_scheduler="cosine_to_zero", epochs=10)
