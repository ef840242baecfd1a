"""APGD against a loop that follows one image, known checkpoints, and the code of its authors."""

import pytest
import torch

from common.attacks import apgd, apgd_targeted
from common.attacks.apgd import checkpoints
from common.attacks.ball import NORMS
from common.attacks.objectives import judged, margin, targeted_margin
from common.seed import generator
from models.mode import frozen
from tests.common.attacks.nets import Counting, digits, trained
from tests.common.attacks.test_ball import away, nearest
from tests.common.attacks.test_pgd import each_alone


def test_checkpoints_of_a_hundred_steps_are_the_published_ones():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(10) == [3, 5, 6, 7, 8, 9, 10]  # 2.2, 4.1, 5.7, 7, 8, 8.7, 9.3, 9.9, rounded up.
    assert checkpoints(1) == [1]


def follow(loss_of_x, x0, start, *, eps, steps, norm):
    """The algorithm for one image, step by step, in words of its paper. Returns (last image, step sizes)."""

    def projected(v):
        return (v.clamp(x0 - eps, x0 + eps) if norm == "linf" else nearest(v, x0, eps)).clamp(0, 1)

    def at(x):
        x = x.clone().requires_grad_()
        loss = loss_of_x(x)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        return float(loss.detach()), grad.sign() if norm == "linf" else grad / grad.norm()

    eta, sizes, halved_at_last, raised = 2 * eps, [], False, 0
    x = projected(start)
    f, s = at(x)
    best_x, best_f, best_s = x, f, s
    last_best, last = best_f, 0
    before = x
    for k in range(1, steps + 1):
        z = projected(x + eta * s)
        new = z if k == 1 else projected(x + 0.75 * (z - x) + 0.25 * (x - before))
        before, x = x, new
        new_f, s = at(x)
        raised += new_f > f
        f = new_f
        if f > best_f:
            best_x, best_f, best_s = x, f, s
        if k in checkpoints(steps):
            first = raised < 0.75 * (k - last)
            second = not halved_at_last and best_f == last_best
            halved_at_last = first or second
            if halved_at_last:
                eta, x, f, s = eta / 2, best_x, best_f, best_s
            last_best, last, raised = best_f, k, 0
            sizes.append(eta)
    return best_x, sizes


@pytest.mark.parametrize("norm", NORMS)
def test_every_image_takes_the_steps_of_the_published_algorithm(norm):
    """In float64, so that both take the same way; images differ in their step sizes."""
    x = digits()[2][:6].double()
    y = each_alone(x.float()).argmax(1)
    start = away(x.float(), 0.05).double().clamp(0, 1)
    settings = {"eps": {"linf": 0.1, "l2": 2.0}[norm], "steps": 25, "norm": norm}

    def loss_of(labels):
        return lambda x: margin(each_alone_64(x), labels)

    found = apgd(lambda x, y: loss_of(y)(x), x, y, start=start, **settings)
    sizes = []
    for k in range(len(x)):
        image, own = x[k : k + 1], y[k : k + 1]
        expected, steps = follow(loss_of(own), image, start[k : k + 1], **settings)
        assert abs(loss_of(own)(found[k : k + 1]) - loss_of(own)(expected)) < 1e-4, k
        torch.testing.assert_close(found[k : k + 1], expected, atol=1e-4, rtol=0)
        sizes.append(tuple(steps))
    assert len(set(sizes)) > 2, sizes


def each_alone_64(x):
    w = torch.randn(10, 1, 8, 8, generator=generator(0, "each alone")).double()
    hidden = (x[:, None] * w).sum(4).sin().sum((2, 3))
    return torch.stack([hidden * 2, hidden.cos() + hidden], 2).sum(2)


# What is left of about 60 to 80 % after the attacks of their authors, over 100 images.
HARD = {"dense": 0.1, "conv": 0.08, "robust": 0.15}


def left(net, found, y):
    return int((net(found).argmax(1) == y).sum())


@pytest.mark.parametrize("kind", HARD)
def test_as_many_images_are_left_as_by_the_code_of_its_authors(kind):
    """By both losses; at equal budgets, and from other random starts: hence up to two images of 100 more or fewer."""
    base = pytest.importorskip("pyautoattack.autopgd_base")
    net, (_, _, x, y) = trained(kind), digits()
    x, y = x[:100], y[:100]
    settings = {"n_iter": 15, "norm": "Linf", "eps": HARD[kind], "device": "cpu", "seed": 0}
    with frozen(net), torch.no_grad():
        theirs = left(net, base.APGDAttack(net, loss="ce", **settings).perturb(x, y), y)
        ours = left(net, apgd(judged(net), x, y, eps=HARD[kind], steps=15), y)
        assert abs(ours - theirs) <= 2 and 30 < theirs < 85, (ours, theirs)
        targeted = left(net, base.APGDAttack_targeted(net, n_target_classes=2, **settings).perturb(x, y), y)
        of_targets = left(net, apgd_targeted(net, x, y, eps=HARD[kind], steps=15, targets=2), y)
        assert abs(of_targets - targeted) <= 2 and of_targets <= ours, (of_targets, targeted, ours)


def test_targets_are_tried_in_turn_and_what_is_fooled_drops_out():
    net = Counting(trained("conv"))
    _, _, x, y = digits()
    x, y = x[:60], y[:60]
    wrong = int((net(x).argmax(1) != y).sum())
    net.forward_passes.clear()
    apgd_targeted(net, x, y, eps=0.08, steps=6, targets=3)
    sizes = net.forward_passes
    assert sizes[:3] == [60, 60, 60 - wrong] and len(sizes) == 2 + 3 * 7
    assert sizes[2] > sizes[9] >= sizes[16] > 0


def test_an_image_that_only_the_second_target_reaches_is_fooled():
    def logits_of_x(x):  # Class 1 is the likeliest besides 0, but cannot grow.
        return torch.tensor([2, 1.9, 1, 0]) + x * torch.tensor([0, 0, 3.0, 0])

    x, y = torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)
    for targets, fooled in ((1, False), (2, True)):
        settings = {"eps": 0.5, "steps": 4, "start": "none", "targets": targets, "loss": targeted_margin}
        found = apgd_targeted(logits_of_x, x, y, **settings)
        assert (logits_of_x(found).argmax(1) == 2).tolist() == [fooled] * 2


def test_all_other_classes_are_targets_where_there_are_fewer_and_the_margin_is_raised_with_three():
    net = trained("conv")
    _, _, x, _ = digits()
    three = Counting(lambda x: net(x)[:, :3])
    y = three(x[:20]).argmax(1)
    three.forward_passes.clear()
    found = apgd_targeted(three, x[:20], y, eps=1e-4, steps=2)
    assert len(three.forward_passes) == 2 + 2 * 3
    assert (margin(three(found), y) > margin(three(x[:20]), y)).float().mean() > 0.9


def test_the_targeted_attack_is_repeatable_and_in_micro_batches_the_same():
    _, _, x, _ = digits()
    x = x[:30]
    y = each_alone(x).argmax(1)
    settings = {"eps": 0.02, "steps": 4, "targets": 3, "generator": None}
    whole = apgd_targeted(each_alone, x, y, **settings)
    assert torch.equal(whole, apgd_targeted(each_alone, x, y, **settings))
    assert torch.equal(whole, apgd_targeted(each_alone, x, y, micro_batch=7, **settings))
    assert not torch.equal(whole, apgd_targeted(each_alone, x, y, **{**settings, "generator": generator(1, "t")}))
    assert apgd_targeted(each_alone, x[:0], y[:0], **settings).shape == (0, 1, 8, 8)


def test_a_step_size_is_halved_where_the_largest_loss_did_not_grow_unless_it_was_halved_last_time():
    """Losses by script, whatever the image: after a fall, each step raises them, but never to where they began."""
    script = [10.0, *range(1, 8), *range(1, 8), *range(1, 8), *range(1, 20)]
    x, eps, steps = torch.full((1, 1), 0.5), 0.1, 30
    assert checkpoints(steps)[:3] == [7, 13, 18]

    def seen_by(run, before=()):
        seen, losses = [], iter([*before, *script])

        def loss_of_x(x):
            seen.append(float(x.detach()))
            return (x - x.detach())[:, 0] + next(losses)  # Its gradient points up.

        run(loss_of_x)
        return seen

    ours = seen_by(lambda loss: apgd(loss, x, eps=eps, steps=steps, start="none"), before=script[:1])[1:]
    theirs = seen_by(lambda loss: follow(loss, x, x, eps=eps, steps=steps, norm="linf"))
    assert ours == pytest.approx(theirs)
    # Back to the first image, from where the step before leads half of the way down again; the border; back.
    assert ours[7:9] == pytest.approx([0.6, 0.55]) and ours[13:15] == pytest.approx([0.6, 0.6])
    assert ours[18:20] == pytest.approx([0.6, 0.5 + 0.75 * 0.05 - 0.25 * 0.1])
