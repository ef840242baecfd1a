"""A network for a while: frozen, and afterwards as it was."""

import pytest
import torch
from torch import nn

from models.mode import frozen


def test_a_frozen_network_hands_gradients_through_and_collects_none():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    net[0].weight.requires_grad_(False)
    x = torch.rand(4, 3, requires_grad=True)
    with frozen(net):
        assert not any(p.requires_grad for p in net.parameters())
        net(x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True]


def test_an_error_leaves_it_as_it_was():
    net = nn.Linear(3, 2)
    with pytest.raises(KeyError), frozen(net):
        raise KeyError
    assert all(p.requires_grad for p in net.parameters())
