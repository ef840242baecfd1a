"""PGD and FGSM: golden images, linear models with known answers, and what holds for every attack."""

import re

import pytest
import torch
import torch.nn.functional as F

from common.attacks import apgd, fgsm, pgd
from common.attacks.ball import NORMS
from common.attacks.objectives import cross_entropy, judged, kl, margin
from common.attacks.search import value
from common.seed import generator
from tests.common.attacks.nets import Counting, Linear, digits, trained
from tests.common.attacks.test_ball import away, images
from tests.fake_gpu import FakeGpu

ATTACKS = {"pgd": pgd, "apgd": apgd}
EPS = {"linf": 0.1, "l2": 0.8}


# ------------------------------------------------------------------ golden images: reverse attention, several heads


def heads(g, x):
    """Final and auxiliary logits of the golden network in evaluation mode, one operation after the other."""

    def conv(x, name, stride=1):
        weight = g[f"net.{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(x, name):
        mean, var = g[f"net.{name}.running_mean"], g[f"net.{name}.running_var"]
        return F.batch_norm(x, mean, var, g[f"net.{name}.weight"], g[f"net.{name}.bias"])

    def block(x, name, stride):
        z = F.relu(norm(conv(x, f"{name}.conv1", stride), f"{name}.bn1"))
        z = norm(conv(z, f"{name}.conv2"), f"{name}.bn2")
        if f"net.{name}.shortcut.0.weight" in g:
            x = norm(conv(x, f"{name}.shortcut.0", stride), f"{name}.shortcut.1")
        return F.relu(z + x)

    weight, bias = g["net.fc.weight"], g["net.fc.bias"]
    z, auxiliary = F.relu(norm(conv(x, "conv1"), "bn1")), []
    strides, blocks = g["meta_strides"].tolist(), g["meta_blocks"].tolist()
    for stage, (stride, count) in enumerate(zip(strides, blocks, strict=True), 1):
        for k in range(count):
            z = block(z, f"layer{stage}.{k}", stride if k == 0 else 1)
            if stage == len(strides):
                auxiliary.append(z.mean((2, 3)) @ weight.T + bias)
                z = z * weight[auxiliary[-1].argmax(1)][:, :, None, None]
    return z.mean((2, 3)) @ weight.T + bias, auxiliary


def over_heads(g, loss):
    def loss_of_x(x, *data):
        final, auxiliary = heads(g, x)
        return loss(final, *data) + g["meta_cr_beta"] * torch.stack([loss(p, *data) for p in auxiliary]).mean(0)

    return loss_of_x


def attacked(g, loss_of_x, x, *data, start, steps=None):
    settings = {"eps": g["meta_eps"], "step": g["meta_step_size"], "steps": steps or g["meta_steps"], "keep": "last"}
    return pgd(loss_of_x, x, *data, start=start, **settings)


def assert_golden(found, expected):
    """At most 1 % of pixels differ: signs flip where a gradient is next to zero."""
    assert ((found - expected).abs() > 1e-5).float().mean() <= 0.01


def test_the_naive_network_is_the_golden_one(golden):
    g = golden("ancra_net")
    final, auxiliary = heads(g, g["x"])
    for found, name in zip((final, *auxiliary), ("final_logits", "aux0", "aux1"), strict=True):
        torch.testing.assert_close(found, g[f"eval_{name}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps, name", [(1, "x_adv_untargeted_1step"), (None, "x_adv_untargeted")])
def test_golden_untargeted_attack_on_all_heads(golden, steps, name):
    g = golden("ancra_net")
    start = g["x"] + 0.001 * g["noise_untargeted"]
    found = attacked(g, over_heads(g, cross_entropy), g["x"], g["y"], start=start, steps=steps)
    assert_golden(found, g[name])
    assert (found - g["x"]).abs().max() > 0.9 * g["meta_step_size"]


def test_golden_targeted_attack_on_negatives(golden):
    g = golden("ancra_net")
    x = g["x"][g["neg_index"]]
    towards = over_heads(g, lambda logits, labels: -cross_entropy(logits, labels))
    assert_golden(attacked(g, towards, x, g["y"], start=x + 0.001 * g["noise_targeted"]), g["x_neg_adv"])


def test_golden_attack_on_the_divergence_from_natural_images(golden):
    g = golden("ancra_net")
    final, auxiliary = heads(g, g["x"])

    def loss_of_x(x, *natural):
        logits = heads(g, x)
        terms = [kl(*pair) for pair in zip((logits[0], *logits[1]), natural, strict=True)]
        return terms[0] + g["meta_cr_beta"] * torch.stack(terms[1:]).mean(0)

    start = g["x"] + 0.001 * g["noise_untargeted"]
    found = attacked(g, loss_of_x, g["x"], final, *auxiliary, start=start)
    # At the start the divergence is next to 0, and the gradient of one image, 1e-12, is what rounding makes of it.
    x = start.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of_x(x, final, *auxiliary).sum(), x)
    sound = grad.abs().mean((1, 2, 3)) > 1e-11
    assert sound.sum() == 7
    assert_golden(found[sound], g["x_adv_trades_kl"][sound])


def test_normal_noise_is_not_clipped_before_the_first_gradient():
    seen = []

    def loss_of_x(x):
        seen.append(x.detach().clone())
        return x.flatten(1).sum(1)

    x = torch.zeros(4, 1, 8, 8)
    pgd(loss_of_x, x, eps=0.1, steps=2, start=0.001, keep="last", generator=generator(0, "noise"))
    noise = 0.001 * torch.randn(x.shape, generator=generator(0, "noise"))
    assert torch.equal(seen[0], noise) and seen[0].min() < 0 and seen[1].min() >= 0


def test_an_attack_that_starts_at_random_in_the_ball_sees_nothing_outside_it():
    for norm in NORMS:
        for attack in (pgd, apgd):
            seen, x = [], images()
            ball = NORMS[norm](x, 0.3)

            def loss_of_x(x):
                seen.append(ball.contains(x.detach()).all())  # noqa: B023
                return -x.flatten(1).sum(1)

            attack(loss_of_x, x, eps=0.3, steps=2, norm=norm)
            assert len(seen) == 4 and all(seen)


# ----------------------------------------------------------------------------------------------------- linear models


def test_the_linear_two_class_model_of_the_specification():
    net, x = Linear(torch.tensor([1.0, -1.0, 0.0])), torch.full((2, 3), 0.5)
    zero, one = torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long)
    away_from_0 = lambda x: cross_entropy(net(x), zero)  # noqa: E731
    towards_1 = lambda x: -cross_entropy(net(x), one)  # noqa: E731
    settings = {"eps": 8 / 255, "step": 0.007, "start": "none", "keep": "last"}
    for steps, moved in ((1, 0.007), (4, 0.028), (5, 8 / 255), (9, 8 / 255)):
        found = pgd(away_from_0, x, steps=steps, **settings)
        expected = x + moved * torch.tensor([-1.0, 1.0, 0.0])
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        assert torch.equal(found, pgd(towards_1, x, steps=steps, **settings))


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_worst_image_of_a_linear_model_within_linf_is_found(attack):
    x, w = images(), torch.randn(3, 8, 8, generator=generator(0, "w"))
    net, labels = Linear(w), torch.ones(len(x), dtype=torch.long)
    found = ATTACKS[attack](lambda x, y: margin(net(x), y), x, labels, eps=0.1, steps=20)
    torch.testing.assert_close(found, (x + 0.1 * w.sign()).clamp(0, 1), atol=1e-6, rtol=0)


def test_fgsm_finds_the_worst_image_of_a_linear_model_within_linf():
    x, w = images(), torch.randn(3, 8, 8, generator=generator(0, "w"))
    net, labels = Linear(w), torch.ones(len(x), dtype=torch.long)
    assert torch.equal(fgsm(judged(net), x, labels, eps=0.1), (x + 0.1 * w.sign()).clamp(0, 1))


def worst_of_l2(x, w, eps):
    """x + t w, clipped to [0, 1], with the largest t that keeps to the ball: by bisection in float64."""
    x, w = x.double().flatten(1), w.double().flatten()
    low, high = torch.zeros(len(x), 1, dtype=torch.float64), torch.full((len(x), 1), 1e3, dtype=torch.float64)
    for _ in range(100):
        t = (low + high) / 2
        inside = ((x + t * w).clamp(0, 1) - x).norm(dim=1, keepdim=True) <= eps
        low, high = torch.where(inside, t, low), torch.where(inside, high, t)
    return (x + low * w).clamp(0, 1)


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_worst_image_of_a_linear_model_within_l2_is_found_at_the_border_of_0_to_1_too(attack):
    x, w = images(), torch.randn(3, 8, 8, generator=generator(0, "w"))
    net, labels = Linear(w), torch.ones(len(x), dtype=torch.long)
    for eps, within in ((0.5, 1e-5), (2.0, 1e-4)):
        found = ATTACKS[attack](lambda x, y: margin(net(x), y), x, labels, eps=eps, steps=100, norm="l2")
        exact = worst_of_l2(x, w, eps)
        gain = ((found - x).flatten(1) @ w.flatten()) / ((exact - x.flatten(1)).float() @ w.flatten())
        assert gain.min() > 1 - within, gain
        assert gain.max() < 1 + 1e-5


# ------------------------------------------------------------------------------------- what holds for every attack


@pytest.fixture
def net():
    return trained("conv")


@pytest.fixture
def batch():
    """40 test images of digits and their labels."""
    _, _, x, y = digits()
    return x[:40], y[:40]


def test_attacks_fool_most_images_that_noise_does_not(net, batch):
    x, y = batch
    noise = away(x, 0.1, 3).clamp(0, 1)
    right = (net(noise).argmax(1) == y).float().mean()
    for attack in ATTACKS.values():
        found = attack(judged(net), x, y, eps=0.15, steps=20)
        assert right > 0.9 and (net(found).argmax(1) == y).float().mean() < 0.3


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", [*ATTACKS, "fgsm", "last"])
def test_images_stay_in_the_ball_and_in_0_to_1(net, batch, attack, norm):
    x, y = batch
    settings = {"eps": EPS[norm], "norm": norm}
    if attack == "fgsm":
        found = fgsm(judged(net), x, y, **settings)
    elif attack == "last":
        found = pgd(judged(net), x, y, steps=5, keep="last", start=0.5, **settings)
    else:
        found = ATTACKS[attack](judged(net), x, y, steps=10, restarts=2, **settings)
    distance = NORMS[norm].distance(found, x)
    assert distance.max() <= EPS[norm] + 1e-6 and found.min() >= 0 and found.max() <= 1
    assert distance.median() > 0.9 * EPS[norm]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("loss", [cross_entropy, margin])
def test_the_loss_is_never_below_that_of_the_images_themselves(net, batch, attack, norm, loss):
    x, y = batch
    # Steps and noise that do harm: only the first image is good.
    for sign, eps in ((1, 0.02), (1, 1.0), (-1, 0.3)):
        of_x = lambda x, y: sign * loss(net(x), y)  # noqa: B023, E731
        found = ATTACKS[attack](of_x, x, y, eps=eps, steps=2, norm=norm)
        assert (value(of_x, found, [y]).loss >= value(of_x, x, [y]).loss).all()


def test_of_several_images_that_fool_the_one_with_the_largest_loss_is_kept():
    """One pixel that goes up by 0.1 a step; the loss has its peak at 0.3, and only pixels above 0.5 fool."""
    x = torch.tensor([[0.0], [0.0]])

    def loss_of_x(x, above):
        p = x[:, 0]
        climbing = p + (-(p - 0.3).abs() - p).detach()  # Its gradient is 1 everywhere.
        return climbing, p > above

    settings = {"eps": 0.8, "step": 0.1, "steps": 8, "start": "none"}
    found = pgd(loss_of_x, x, torch.tensor([0.55, 0.9]), **settings)
    torch.testing.assert_close(found, torch.tensor([[0.6], [0.3]]))
    assert torch.equal(pgd(lambda x, above: loss_of_x(x, above)[0], x, torch.zeros(2), **settings)[0], found[1])
    last = pgd(loss_of_x, x, torch.zeros(2), keep="last", **settings)
    torch.testing.assert_close(last, torch.tensor([[0.8], [0.8]]))


def test_a_start_is_kept_where_it_is_best_and_inside():
    """The loss falls with every step; of three starts the last two lie outside."""

    def loss_of_x(x, y):
        return (x - 2 * (x - x.detach())).flatten(1).sum(1)  # The gradient points the wrong way.

    x = torch.full((3, 1), 0.5)
    start = torch.tensor([[0.6], [0.8], [1.1]])
    found = pgd(loss_of_x, x, torch.zeros(3), eps=0.2, step=0.05, steps=1, start=start)
    torch.testing.assert_close(found, torch.tensor([[0.6], [0.7], [0.7]]))


def test_the_last_image_is_that_of_a_plain_loop(net, batch):
    x, y = batch
    adv = x + 0.001 * torch.randn(x.shape, generator=generator(0, "start"))
    expected = adv.clone()
    for _ in range(5):
        expected.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(net(expected), y, reduction="sum"), expected)
        expected = (expected.detach() + 0.02 * grad.sign()).clamp(0, 1)
        expected = torch.minimum(torch.maximum(expected, x - 0.06), x + 0.06)
    given = adv.clone()
    found = pgd(judged(net), x, y, eps=0.06, step=0.02, steps=5, start=given, keep="last")
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert torch.equal(given, adv)  # What was given to start from is as it was.


@pytest.mark.parametrize("norm", NORMS)
def test_with_momentum_gradients_of_mean_1_add_up(net, batch, norm):
    x, labels = batch
    mu, settings = 0.7, {"eps": 0.1, "steps": 4, "step": 0.03, "norm": norm, "start": "none", "keep": "last"}
    found = pgd(judged(net), x, labels, momentum=mu, **settings)
    y, drift = x.clone(), torch.zeros_like(x)
    for _ in range(4):
        y = y.detach().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(net(y), labels, reduction="sum"), y)
        drift = mu * drift + grad / grad.abs().mean((1, 2, 3), keepdim=True)
        length = drift.flatten(1).norm(dim=1)[:, None, None, None]
        y = NORMS[norm](x, 0.1).project_(y.detach() + 0.03 * (drift.sign() if norm == "linf" else drift / length))
    torch.testing.assert_close(found, y, atol=1e-5, rtol=0)
    assert (found - pgd(judged(net), x, labels, **settings)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="momentum must lie in"):
        pgd(judged(net), x, labels, momentum=1.1, **settings)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_network_and_its_images_are_left_as_they_were(batch, attack):
    net = trained("conv")
    x, y = batch[0].clone(), batch[1]
    parameters = list(net.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    try:
        ATTACKS[attack](judged(net), x, y, eps=0.1, steps=3)
        ATTACKS[attack](judged(net), x, y, eps=0.1, steps=3, norm="l2")
        assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)
        assert [p.grad is None for p in parameters] == [k != 1 for k in range(len(parameters))]
        assert (parameters[1].grad == 1).all()
    finally:
        parameters[0].requires_grad_(True)
        parameters[1].grad = None
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(module.training for module in net.modules())
    assert torch.equal(x, batch[0]) and not x.requires_grad


def test_only_the_images_get_a_gradient(batch):
    """Of a parameter not even the gradient is computed: its node in the backward pass is never reached."""

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.clone()

        @staticmethod
        def backward(ctx, grad):
            raise AssertionError("a gradient of the parameter was computed")

    w = torch.ones(1, 8, 8, requires_grad=True)
    pgd(lambda x, y: (x * Watched.apply(w)).flatten(1).sum(1), *batch, eps=0.1, steps=2)


@pytest.mark.parametrize("attack", ATTACKS)
def test_without_gradients_around_it_an_attack_finds_the_same(net, batch, attack):
    found = ATTACKS[attack](judged(net), *batch, eps=0.1, steps=3)
    with torch.no_grad():
        assert torch.equal(ATTACKS[attack](judged(net), *batch, eps=0.1, steps=3), found)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_two_calls_agree_to_the_bit(net, batch, attack, norm):
    def found(seed=0):
        settings = {"norm": norm, "restarts": 2, "generator": generator(seed, "attack")}
        return ATTACKS[attack](judged(net), *batch, eps=EPS[norm] / 4, steps=6, **settings)

    assert torch.equal(found(), found()) and not torch.equal(found(), found(1))
    alike = [ATTACKS[attack](judged(net), *batch, eps=EPS[norm] / 4, steps=2) for _ in range(2)]
    assert torch.equal(*alike)


def each_alone(x):
    """(N, 10) logits of digits, not linear, of each image for itself to the bit."""
    w = torch.randn(10, 1, 8, 8, generator=generator(0, "each alone"))
    hidden = (x[:, None] * w).sum(4).sin().sum((2, 3))  # (N, 10)
    return torch.stack([hidden * 2, hidden.cos() + hidden], 2).sum(2)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_batch_is_as_many_batches_of_one(batch, attack, norm):
    x, y = batch[0][:8], each_alone(batch[0][:8]).argmax(1)
    start = away(x, 0.05).clamp(0, 1)
    settings = {"eps": EPS[norm], "steps": 30, "norm": norm}
    together = ATTACKS[attack](judged(each_alone), x, y, start=start, **settings)
    alone = [ATTACKS[attack](judged(each_alone), x[k : k + 1], y[k : k + 1], start=start[k : k + 1], **settings)
             for k in range(len(x))]  # fmt: skip
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("attack", [*ATTACKS, "last"])
def test_micro_batches_find_the_same(batch, attack):
    x = batch[0]
    y = each_alone(x).argmax(1)
    net = Counting(each_alone)
    run = ATTACKS.get(attack, pgd)
    settings = {"keep": "last"} if attack == "last" else {"restarts": 3}
    whole = run(judged(each_alone), x, y, eps=0.01, steps=4, **settings)
    parts = run(judged(net), x, y, eps=0.01, steps=4, micro_batch=7, **settings)
    assert torch.equal(whole, parts) and max(net.forward_passes) == 7


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_loss_that_knows_the_batch_finds_the_same_as_one_with_data(batch, attack):
    x, _ = batch
    y = each_alone(x).argmax(1)
    y[::3] += 1
    y %= 10
    net = Counting(each_alone)
    of_data = judged(each_alone)
    cut = ATTACKS[attack](of_data, x, y, eps=0.02, steps=3, restarts=3)
    closed = ATTACKS[attack](lambda x: judged(net)(x, y), x, eps=0.02, steps=3, restarts=3)
    assert torch.equal(cut, closed) and set(net.forward_passes) == {len(x)}


def test_what_is_fooled_drops_out(batch):
    x, _ = batch
    y = each_alone(x).argmax(1)
    y[:10] = (y[:10] + 1) % 10
    net = Counting(each_alone)
    found = pgd(judged(net), x, y, eps=0.01, steps=3, restarts=4)
    sizes = net.forward_passes
    assert sizes[0] == 40 and sizes[1] == 30 and len(sizes) == 1 + 4 * 4
    restarts = sizes[1::4]
    assert restarts == sorted(restarts, reverse=True) and restarts[-1] < 30
    assert torch.equal(found[:10], x[:10])
    net.forward_passes.clear()
    assert torch.equal(pgd(judged(net), x[:10], y[:10], eps=0.01, steps=3, restarts=4), x[:10])
    assert net.forward_passes == [10]


@pytest.mark.parametrize(
    "attack, settings, forward, backward",
    [
        (pgd, {"steps": 5, "keep": "last"}, 5, 5),
        (pgd, {"steps": 5}, 7, 5),
        (pgd, {"steps": 5, "restarts": 2}, 13, 10),
        (pgd, {"steps": 5, "norm": "l2"}, 7, 5),
        (apgd, {"steps": 5}, 7, 5),
        (apgd, {"steps": 5, "restarts": 2, "norm": "l2"}, 13, 10),
        (fgsm, {}, 1, 1),
    ],
)
def test_a_step_is_one_forward_and_one_backward_pass(net, batch, attack, settings, forward, backward):
    """Beside them: the images themselves, and the last images of a restart, forward only."""
    counting = Counting(net)
    attack(lambda x, y: cross_entropy(counting(x), y), *batch, eps=0.1, **settings)
    assert counting.forward_passes == [40] * forward and counting.backward_passes == [40] * backward


def on_gpu(gpu, net, x, y):
    import copy

    return copy.deepcopy(net).to(gpu.device), x.to(gpu.device), y.to(gpu.device)


@pytest.mark.parametrize("start", ["uniform", "none", 0.001])
@pytest.mark.parametrize("norm", NORMS)
def test_an_attack_of_training_never_waits_for_the_device(net, batch, norm, start):
    with FakeGpu() as gpu:
        net, x, y = on_gpu(gpu, net, *batch)
        gpu.waits.clear()
        found = pgd(judged(net), x, y, eps=0.1, steps=3, norm=norm, start=start, keep="last", micro_batch=16)
        fgsm(judged(net), x, y, eps=0.1, norm=norm)
        assert not gpu.waits and found.device == gpu.device


@pytest.mark.parametrize("attack", ATTACKS)
def test_other_attacks_wait_once_a_restart_and_once_to_check_the_images(net, batch, attack):
    with FakeGpu() as gpu:
        net, x, y = on_gpu(gpu, net, *batch)
        gpu.waits.clear()
        ATTACKS[attack](judged(net), x, y, eps=0.01, steps=4, restarts=3)
        assert len(gpu.waits) == 1 + 3


def test_the_attack_computes_in_float32_under_autocast(net, batch):
    x, y = batch
    seen = []

    def loss_of_x(x, y):
        logits = net(x)
        seen.append(logits.dtype)
        return judged(lambda x: logits)(x, y)

    with torch.autocast("cpu", torch.bfloat16):
        found = pgd(loss_of_x, x, y, eps=0.1, steps=3)
    assert found.dtype == torch.float32 and set(seen) == {torch.bfloat16}
    assert value(lambda x, y: net(x)[:, 0].bfloat16(), x, [y]).loss.dtype == torch.float32
    assert NORMS["linf"].distance(found, x).max() <= 0.1 + 1e-6


def test_nan_fools_nobody():
    """A network that breaks at larger pixels: neither is the broken image kept, nor does it count as fooled."""
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.long)

    def loss_of_x(x, y):
        total = x.flatten(1).sum(1)
        return torch.where(total > 2.5, torch.nan, total), total > 2.5

    for attack in ATTACKS.values():
        found = attack(loss_of_x, x, y, eps=0.5, steps=8)
        assert torch.isfinite(found).all() and (found.flatten(1).sum(1) <= 2.5).all()


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_images_are_no_work(attack):
    x = torch.zeros(0, 1, 8, 8)
    assert ATTACKS[attack](None, x, torch.zeros(0), eps=0.1, steps=3).shape == x.shape


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eps": -0.1}, "eps must be a number >= 0, got -0.1"),
        ({"eps": float("nan")}, "eps must be a number >= 0, got nan"),
        ({"norm": "l1"}, "norm must be one of linf, l2, got 'l1'"),
        ({"steps": 0}, "steps must be > 0, got 0"),
        ({"restarts": 0}, "restarts must be > 0, got 0"),
        ({"micro_batch": 0}, "micro_batch must be > 0, got 0"),
        ({"start": "random"}, "start must be uniform, none, a number or images, got 'random'"),
        ({"start": -1.0}, "start must be a standard deviation >= 0, got -1.0"),
        ({"start": torch.zeros(2, 1)}, r"start must have the images' shape (2, 3), got (2, 1)"),
        ({"start": "none", "restarts": 2}, "restarts > 1 from one and the same start"),
        ({"x": torch.tensor([[0.0, 1.5, 0]] * 2)}, "images must lie in [0, 1], got 0 to 1.5"),
        ({"x": torch.tensor([[0.0, torch.nan, 0]] * 2)}, "images must lie in [0, 1], got nan to nan"),
        ({"x": torch.zeros(2, 3, dtype=torch.uint8)}, "images must be float32 or float64, got torch.uint8"),
        ({"data": [torch.zeros(3)]}, "data must be tensors with one entry for each of the 2 images"),
        ({"data": [], "micro_batch": 1}, "micro_batch: without data the loss knows the batch as a whole"),
        ({"loss": lambda x, *data: x.sum()}, "a loss must be one number an image, (2,)"),
        ({"loss": lambda x, *data: (x.sum(1), x > 0)}, "a loss must be one number an image, (2,)"),
    ],
)
@pytest.mark.parametrize("attack", ATTACKS)
def test_what_no_attack_can_use_is_refused(attack, changes, message):
    settings = {"eps": 0.1, "steps": 2, **changes}
    x, loss = settings.pop("x", torch.zeros(2, 3)), settings.pop("loss", lambda x, *data: x.sum(1))
    data = settings.pop("data", [torch.zeros(2)])
    with pytest.raises(ValueError, match=re.escape(message)):
        ATTACKS[attack](loss, x, *data, **settings)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"step": -1.0}, "step must be a number >= 0, got -1.0"),
        ({"keep": "first"}, "keep must be one of best, last, got 'first'"),
        ({"keep": "last", "restarts": 2}, "restarts > 1 need keep='best'"),
    ],
)
def test_what_pgd_cannot_use_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pgd(lambda x: x.sum(1), torch.zeros(2, 3), eps=0.1, steps=2, **changes)
