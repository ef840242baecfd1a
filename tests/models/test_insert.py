"""Operators before activations: one for each use, in the right place, and no other change."""

import pytest
import torch
from torch import Tensor, nn

from models.checkpoint import build_net
from models.insert import insert_before_activations
from models.resnet import BasicBlock, ResNet
from tests.models.test_reference import with_statistics
from tests.models.test_resnet import ACTIVATED, activations, fresh, images


class Shift(nn.Module):
    """x + by, with what it received kept."""

    def __init__(self, name: str, by: float = 0.0):
        super().__init__()
        self.name, self.seen = name, []
        self.register_buffer("by", torch.tensor(by))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return x + self.by


@pytest.mark.parametrize("name", ACTIVATED)
def test_operators_that_change_nothing_leave_outputs_gradients_and_weights_bit_for_bit(name):
    results, names = [], []
    for insert in (False, True):
        net, x = fresh(name).train(), images(size=32).requires_grad_()
        keys = list(net.state_dict())
        if insert:
            assert insert_before_activations(net, lambda at: names.append(at) or nn.Identity()) is net
        h = net(x)
        h.square().sum().backward()
        assert list(net.state_dict()) == keys
        results.append([h, x.grad, *(p.grad for p in net.parameters()), *net.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(set(names)) == len(names) == activations(name)


@pytest.mark.parametrize("name", ACTIVATED)
def test_each_use_has_an_operator_of_its_own_that_sees_what_the_activation_would_have_seen(name):
    plain, x = with_statistics(fresh(name)), images(size=32)
    expected: dict[str, Tensor] = {}
    for at, module in plain.named_modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(lambda _, args, at=at: expected.update({at: args[0].clone()}))
    net = with_statistics(fresh(name))
    operators: dict[str, Shift] = {}
    insert_before_activations(net, lambda at: operators.setdefault(at, Shift(at)))
    with torch.inference_mode():
        plain(x), net(x)
    assert set(operators) == set(expected)
    for at, operator in operators.items():
        (seen,) = operator.seen
        assert torch.equal(seen, expected[at])
    assert set(net.state_dict()) - set(plain.state_dict()) == {f"{at}.0.by" for at in operators}


def test_an_operator_acts_before_the_sum_is_rectified_and_before_the_inner_activation():
    net = with_statistics(ResNet(BasicBlock, (1,), (4,)))
    shifts = {"act1": 0.25, "layer1.0.act1": -0.5, "layer1.0.act2": 1.0}
    insert_before_activations(net, lambda name: Shift(name, shifts[name]))
    block, x = net.layer1[0], images()
    with torch.inference_mode():
        y = (net.bn1(net.conv1(x)) + 0.25).clamp(min=0)
        inner = block.bn2(block.conv2((block.bn1(block.conv1(y)) - 0.5).clamp(min=0)))
        torch.testing.assert_close(net(x), (inner + y + 1).clamp(min=0).mean((2, 3)), atol=1e-6, rtol=1e-6)


def test_an_operator_whose_gradient_needs_its_output_is_differentiated():
    net = with_statistics(ResNet(BasicBlock, (1,), (4,))).double()
    insert_before_activations(net, lambda name: nn.Tanh())
    x = images(size=4)[:1].double().requires_grad_()
    assert torch.autograd.gradcheck(net, (x,), atol=1e-6)


def test_inserted_operators_are_part_of_a_feature_networks_state_dict():
    nets = [build_net("feature", "resnet8", n_classes=2, simclr_dim=8, n_shifts=2, seed=seed).eval() for seed in (0, 1)]
    for net, by in zip(nets, (0.5, 0.0), strict=True):
        insert_before_activations(net.backbone, lambda name, by=by: Shift(name, by))
    state = nets[0].state_dict()
    assert float(state["act1.0.by"]) == float(state["layer3.0.act2.0.by"]) == 0.5 and len(state) == 64 + 7
    nets[1].load_state_dict(state)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(nets[0](x).z, nets[1](x).z)


def test_what_cannot_be_inserted_into_raises():
    net = insert_before_activations(fresh("resnet8"), lambda name: nn.Identity())
    with pytest.raises(ValueError, match="already been inserted"):
        insert_before_activations(net, lambda name: nn.Identity())
    with pytest.raises(ValueError, match="no activation module"):
        insert_before_activations(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), lambda name: nn.Identity())
    shared = nn.ReLU()
    twice = nn.Sequential(nn.Linear(2, 2), shared, nn.Linear(2, 2), shared)
    with pytest.raises(ValueError, match="1 and 3 are one activation module"):
        insert_before_activations(twice, lambda name: nn.Identity())
    assert twice[1] is shared  # as it was


def test_kinds_choose_which_activations_are_preceded():
    net = nn.Sequential(nn.ReLU(), nn.SiLU(), nn.Tanh())
    names: list[str] = []
    insert_before_activations(net, lambda name: names.append(name) or nn.Identity(), kinds=(nn.Tanh, nn.SiLU))
    assert names == ["1", "2"] and isinstance(net[0], nn.ReLU)
