import dataclasses

import torch
from torch import nn

from common.files import load_tensors
from tests.training.test_loop import go, make
from training.average import MovingAverage


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()


def moved(net, step):
    with torch.no_grad():
        for k, tensor in enumerate((*net.parameters(), net[1].running_mean)):
            tensor.fill_(step * 10 + k)
        net[1].num_batches_tracked.fill_(step)


def test_the_average_follows_its_rule_from_the_first_step_on():
    """A decay that grows as (1 + n) / (10 + n) up to its value; counts are copied."""
    net = network()
    average, by_hand = MovingAverage(net, 0.3), [p.detach().clone() for p in net.parameters()]
    mean = net[1].running_mean.clone()
    for step in range(6):
        moved(net, step)
        average.update(net)
        decay = min(0.3, (1 + step) / (10 + step))
        assert (decay == 0.3) == (step >= 3)
        by_hand = [decay * own + (1 - decay) * p.detach() for own, p in zip(by_hand, net.parameters(), strict=True)]
        mean = decay * mean + (1 - decay) * net[1].running_mean
        for own, expected in zip(average.net.parameters(), by_hand, strict=True):
            torch.testing.assert_close(own, expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(average.net[1].running_mean, mean, atol=1e-12, rtol=0)
        assert average.net[1].num_batches_tracked == step
    assert not average.net.training and net.training and not any(p.requires_grad for p in average.net.parameters())


def test_it_goes_on_from_its_state_dict():
    net = network()
    whole, first = MovingAverage(net, 0.9), MovingAverage(net, 0.9)
    for step in range(2):
        moved(net, step)
        whole.update(net)
        first.update(net)
    second = MovingAverage(network(), 0.9)
    second.load_state_dict(first.state_dict())
    moved(net, 5)
    whole.update(net)
    second.update(net)
    for own, expected in zip(second.net.state_dict().values(), whole.net.state_dict().values(), strict=True):
        assert torch.equal(own, expected)


def with_average(folder, epochs):
    recipe, run, _ = make(folder, epochs)
    return dataclasses.replace(recipe, average=MovingAverage(recipe.model, 0.5)), run


def test_a_run_keeps_the_average_and_goes_on_bit_for_bit(tmp_path):
    """The file of weights has the average, that of the state both: 2 epochs and 2 more make 4."""
    recipe, run = with_average(tmp_path / "whole", 4)
    weights = go(recipe, run, 4)
    kept = load_tensors(tmp_path / "whole" / "w", flag="load_path")
    assert all(torch.equal(kept[name], own) for name, own in recipe.average.net.state_dict().items())
    assert not torch.equal(kept["weight"], weights[0])
    first, run = with_average(tmp_path / "parts", 4)
    go(first, run, 2)
    second, run = with_average(tmp_path / "parts", 4)
    assert all(torch.equal(a, b) for a, b in zip(go(second, run, 4), weights, strict=True))
    parts = load_tensors(tmp_path / "parts" / "w", flag="load_path")
    assert all(torch.equal(parts[name], value) for name, value in kept.items())


def test_training_is_the_same_with_an_average(tmp_path):
    averaged, run = with_average(tmp_path / "a", 3)
    recipe, plain, _ = make(tmp_path / "b", 3)
    for own, expected in zip(go(averaged, run, 3), go(recipe, plain, 3), strict=True):
        assert torch.equal(own, expected)
