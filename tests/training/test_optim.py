import math
import warnings

import pytest
import torch
from torch import nn

from common.errors import UserError
from training.optim import OPTIMIZERS, Lars, Muon, OptimSpec, orthogonalised, warm_up


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
        w = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
        optimizer = spec(optimizer=name, lr_init=lr, weight_decay=decay).build([w])
        for gradient in gradients:
            w.grad = torch.full((3,), gradient, dtype=torch.float64)
            optimizer.step()
        return float(w.detach()[0])

    assert after(0.01, 0.0, [0.0]) == 2.0
    decayed, twice = 2 - after(0.01, 0.5, [0.0]), 2 - after(0.02, 0.5, [0.0])
    # Adam makes a step of the size of the rate of whatever gradient there is; that of Muon has a hundredth of it.
    expected = {"adam": 0.01, "muon": 1e-4}.get(name, 0.01 * 0.5 * 2)
    assert decayed == pytest.approx(expected, rel=1e-4)
    assert twice == pytest.approx(2 * decayed, rel=1e-4)
    first, second = 2 - after(0.01, 0.0, [1.0]), after(0.01, 0.0, [1.0]) - after(0.01, 0.0, [1.0, 0.0])
    adam = 0.9 * 0.1 / 0.19 / (0.999 * 0.001 / (1 - 0.999**2)) ** 0.5
    share = {"adam": adam, "muon": adam}.get(name, 0.9)
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


def quintic(singular: torch.Tensor) -> torch.Tensor:
    """What five steps of the iteration make of singular values, one by one."""
    for _ in range(5):
        singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
    return singular


@pytest.mark.parametrize("shape", [(3, 20), (20, 3), (6, 6)])
def test_orthogonalised_keeps_singular_vectors_and_moves_singular_values_near_one(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    expected = U @ (quintic(S / matrix.norm())[:, None] * Vt)
    torch.testing.assert_close(orthogonalised(matrix), expected, atol=1e-10, rtol=0)
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert 0.5 < values.min() and values.max() < 1.3
    assert not orthogonalised(torch.zeros(2, 3)).isnan().any()


def test_muon_turns_filters_by_the_rate_keeps_their_norm_and_has_adam_for_the_rest():
    g = torch.Generator().manual_seed(0)
    filters = nn.Parameter(torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=g))
    bias = nn.Parameter(torch.randn(4, dtype=torch.float64, generator=g))
    twin, start = nn.Parameter(bias.detach().clone()), filters.detach().clone()
    muon, adam = Muon([filters, bias], 0.1, weight_decay=0.03), torch.optim.Adam([twin], 0.001, weight_decay=0.03)
    w, buffer = start.flatten(1), torch.zeros(4, 12, dtype=torch.float64)
    for _ in range(6):
        step = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=g)
        filters.grad, bias.grad = step, torch.randn(4, dtype=torch.float64, generator=g)
        twin.grad = bias.grad.clone()
        muon.step()
        adam.step()
        # The rule once more: Nesterov's momentum, its singular values, a step of the length of the rate.
        buffer = 0.6 * buffer + 0.4 * step.flatten(1)
        U, S, Vt = torch.linalg.svd(0.4 * step.flatten(1) + 0.6 * buffer, full_matrices=False)
        turn = U @ (quintic(S / S.norm())[:, None] * Vt)
        w = w - 0.1 * w.norm() * turn / turn.norm()
        w = w * start.norm() / w.norm()
        torch.testing.assert_close(filters.detach().flatten(1), w, atol=1e-9, rtol=0)
    assert filters.norm().item() == pytest.approx(start.norm().item(), rel=1e-12)
    torch.testing.assert_close(bias, twin, atol=1e-12, rtol=0)


def test_muon_goes_on_from_its_state_dict():
    def run(steps: range, optimizer: Muon, weights: list[nn.Parameter]) -> None:
        for s in steps:
            for w in weights:
                w.grad = torch.sin(torch.arange(w.numel()).view_as(w) + s)
            optimizer.step()

    def fresh() -> list[nn.Parameter]:
        return [nn.Parameter(torch.arange(24.0).view(2, 3, 2, 2)), nn.Parameter(torch.ones(5))]

    whole, parts = fresh(), fresh()
    run(range(6), Muon(whole, 0.1), whole)
    first = Muon(parts, 0.1)
    run(range(3), first, parts)
    second = Muon(parts, 0.1)
    second.load_state_dict(first.state_dict())
    run(range(3, 6), second, parts)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
