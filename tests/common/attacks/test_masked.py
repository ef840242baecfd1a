"""Signs of masked gradients, each by numbers that show it and by numbers next to them that do not."""

from functools import partial

import pytest
import torch

from common.attacks import masked, pgd
from common.attacks.objectives import dlr, judged
from tests.common.attacks.nets import digits, trained

SIGNS = [
    (partial(masked.attack_above_natural, 0.85, 0.89), 0.04, True),
    (partial(masked.attack_above_natural, 0.85, 0.85), 0.0, False),
    (partial(masked.more_steps_leave_more, {20: 0.5, 40: 0.48, 100: 0.53}), 0.05, True),
    (partial(masked.more_steps_leave_more, {100: 0.47, 20: 0.5, 40: 0.472}), -0.002, False),
    (partial(masked.more_steps_leave_more, {20: 0.5, 40: 0.502}), 0.002, False),
    (partial(masked.more_steps_leave_more, {20: 0.5, 40: 0.501}, slack=0), 0.001, True),
    (partial(masked.one_step_stronger, 0.55, 0.6), 0.05, True),
    (partial(masked.one_step_stronger, 0.6, 0.602), 0.002, False),
    (partial(masked.gradient_free_stronger, 0.503, 0.5), 0.003, True),
    (partial(masked.gradient_free_stronger, 0.502, 0.5), 0.002, False),
    (partial(masked.left_at_eps_1, 0.001), 0.001, True),
    (partial(masked.left_at_eps_1, 0.0), 0.0, False),
    (partial(masked.zero_gradients, 0.01), 0.01, True),
    (partial(masked.zero_gradients, 0.0), 0.0, False),
    (partial(masked.transfer_stronger, 0.6, 0.5), 0.1, True),
    (partial(masked.transfer_stronger, 0.5, 0.6), -0.1, False),
]


@pytest.mark.parametrize("sign, number, shows", SIGNS)
def test_a_sign_shows_where_its_number_says_so(sign, number, shows):
    found = sign()
    assert found.number == pytest.approx(number) and found.shows is shows


def test_there_are_seven_signs_of_seven_names():
    assert len({sign().name for sign, _, _ in SIGNS}) == 7


def test_the_line_names_what_shows_first_and_every_number():
    shown, hidden = masked.zero_gradients(0.52), masked.attack_above_natural(0.99, 0.94)
    line = masked.health_line([hidden, shown])
    assert line == "MASKED GRADIENTS: images without gradient 52.0 %; no sign: left under attack above natural -5.0 %"
    assert masked.health_line([hidden]) == "no sign: left under attack above natural -5.0 %"
    assert masked.health_line([shown]) == "MASKED GRADIENTS: images without gradient 52.0 %"


@pytest.mark.parametrize("number", [-0.1, 1.1, float("nan"), 89])
def test_what_is_no_share_is_refused(number):
    with pytest.raises(ValueError, match=r"what is left must be a share in \[0, 1\]"):
        masked.gradient_free_stronger(number, 0.5)
    with pytest.raises(ValueError, match=r"what is left must be a share in \[0, 1\]"):
        masked.more_steps_leave_more({20: 0.5, 40: number})
    with pytest.raises(ValueError, match="two numbers of steps are needed"):
        masked.more_steps_leave_more({20: 0.5})


def test_the_share_of_images_without_gradient_is_exact():
    """Of five images two have logits so far apart that even the probability of the other class is exactly 0, as that of
    the second is not, though its own is exactly 1; one has a gradient that is NaN."""
    gaps = torch.tensor([1.0, 20, 300, 1000, 5]).view(5, 1)
    x, y = torch.full((5, 4), 0.5), torch.zeros(5, dtype=torch.long)

    def logits_of_x(x):
        gap = gaps[: len(x)] * x.sum(1, keepdim=True)
        gap = torch.cat([gap[:4], gap[4:] + (gap[4:] - gap[4:]).sqrt()])  # The gradient of a root at 0, times 0.
        return torch.cat([gap, -gap], 1)

    assert masked.zero_gradient_share(logits_of_x, x, y) == 3 / 5
    assert masked.zero_gradient_share(logits_of_x, x[:4], y[:4]) == 2 / 4
    assert masked.zero_gradient_share(logits_of_x, x[:1], y[:1]) == 0
    with pytest.raises(ValueError, match="a share of no images"):
        masked.zero_gradient_share(logits_of_x, x[:0], y[:0])


def test_a_network_with_saturated_logits_shows_it_and_dlr_does_not_mind():
    """The classic: logits times 1000 make a plain network look robust to a cross-entropy attack."""
    net, (_, _, x, y) = trained("conv"), digits()
    x, y = x[:50], y[:50]
    loud = lambda x: 1000 * net(x)  # noqa: E731
    assert masked.zero_gradient_share(net, x, y, micro_batch=20) == 0
    share = masked.zero_gradient_share(loud, x, y, micro_batch=20)
    assert share > 0.8 and masked.zero_gradient_share(loud, x, y, loss=dlr) == 0
    left = []
    for logits_of_x, loss in ((loud, None), (loud, dlr)):
        of_x = judged(logits_of_x, loss) if loss else judged(logits_of_x)
        found = pgd(of_x, x, y, eps=0.15, steps=10, start="none")
        left.append(float((net(found).argmax(1) == y).float().mean()))
    assert left[0] > 0.7 > 0.4 > left[1]
    assert masked.transfer_stronger(*left).shows and masked.zero_gradients(share).shows
