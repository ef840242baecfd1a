"""What the benchmark of SDNets compares is compared here at small sizes: the released layer, counts, ratios."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import sdnet
from benchmarks.released_csc import ReleasedCSC2d
from common.device import autocast
from tests.fake_gpu import FakeGpu

CPU = torch.device("cpu")
OFF = autocast("off", CPU)
FLAGS = "--model 8 --batch_size 2 --repeats 1".split()


def released_layer(g, **changes) -> ReleasedCSC2d:
    """The layer of a golden file in float64, before its first forward pass."""
    atoms, channels, kernel, _ = g["weight"].shape
    settings = {"lam": float(g["lam"]), "mu": float(g["mu"]), **changes}
    layer = ReleasedCSC2d(channels, atoms, kernel, int(g["stride"]), int(g["padding"]), **settings).double()
    layer.power = g["v0"]
    with torch.no_grad():
        layer.weight.copy_(g["weight"])
    return layer


@pytest.mark.parametrize("name", ["sdnet_a", "sdnet_b"])
def test_the_released_layer_gives_the_known_answers(golden, name):
    g = golden(name)
    cases = {
        "code_k1": {"steps": 1},
        "code_k2": {},
        "code_kx_released": {"steps": int(g["k_extra"])},
        "code_k2_lam_hi": {"lam": float(g["lam_hi"])},
    }
    for key, changes in cases.items():
        layer = released_layer(g, **changes)
        torch.testing.assert_close(layer(g["x"]), g[key], atol=1e-9, rtol=0, msg=key)
        assert layer.eta == pytest.approx(float(g["step"]), rel=1e-9)
    layer, x = released_layer(g), g["x"].clone().requires_grad_()
    (layer(x) * g["cotangent"]).sum().backward()
    torch.testing.assert_close(x.grad, g["grad_x_k2"], atol=1e-9, rtol=0)
    torch.testing.assert_close(layer.weight.grad, g["grad_weight_k2"], atol=1e-9, rtol=0)
    residual, penalty = layer.read()
    squares = float(g["mu"]) / 2 * float(g["code_k2"].square().sum())
    assert residual == pytest.approx(float(g["residual_sq_k2"]), rel=1e-9)
    assert penalty == pytest.approx(float(g["lam"]) * float(g["l1_k2"]) + squares, rel=1e-9)


def test_the_released_layer_takes_the_step_before_it_projects_in_every_forward_pass(golden):
    g = golden("sdnet_a")
    layer = released_layer(g).eval()
    with torch.no_grad():
        layer.weight.mul_(2)
    layer(g["x"])
    assert layer.eta == pytest.approx(float(g["step"]) / 4, rel=1e-6)
    torch.testing.assert_close(layer.weight.detach(), g["weight"], atol=1e-12, rtol=0)
    first = layer.reads
    layer(g["x"])
    assert layer.eta == pytest.approx(float(g["step"]), rel=1e-2) and 2 <= layer.reads - first < first


def test_both_formulations_agree():
    assert re.search(r"sdnet8 \S+e-0[6-9], sdnet8_all \S+e-0[6-9]$", sdnet.check("8", 2))


def test_a_formulation_that_is_wrong_is_not_timed(monkeypatch):
    own = ReleasedCSC2d.synthesise
    monkeypatch.setattr(ReleasedCSC2d, "synthesise", lambda layer, z: 1.01 * own(layer, z))
    with pytest.raises(AssertionError, match="sdnet8: loss or gradients differ"):
        sdnet.check("8", 2)


def test_a_step_of_ours_waits_for_no_device_and_a_released_one_does():
    with FakeGpu() as gpu:
        data = sdnet.Data.of(2, gpu.device)
        ours = sdnet.Step("sdnet8_all", data, OFF)
        theirs = sdnet.ReleasedStep("_all", "8", data, OFF)
        gpu.waits.clear()
        ours()
        assert not gpu.waits
        assert theirs.reads() == len(gpu.waits) > 7 * 4


def test_steps_train_atoms_of_norm_one():
    step = sdnet.Step("sdnet8", sdnet.Data.of(4, CPU), OFF)
    weight = step.net.backbone.conv1.weight
    before, loss = weight.detach().clone(), step.loss().item()
    for _ in range(5):
        step()
    assert step.loss().item() < loss and not torch.equal(weight, before)
    torch.testing.assert_close(weight.flatten(1).norm(dim=1), torch.ones(16))


class Product(sdnet.Step):
    """100 x 50 inputs, one linear layer, squares: all that is counted is known."""

    def __init__(self) -> None:
        self.net, self.images = nn.Linear(50, 30, bias=False), torch.rand(100, 50)
        self.data = SimpleNamespace(images=self.images)
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.1, momentum=0.9)
        self.sizes: dict = {}

    def loss(self):
        return self.net(self.images).square().sum()


def test_memory_is_that_of_what_is_held_and_made():
    step = Product()
    step()
    found = sdnet.memory(step)
    assert found.saved == 4 * (100 * 50 + 100 * 30)
    weight, output = 4 * 50 * 30, 4 * 100 * 30
    # Weight, momentum and gradient, twice while it is made; the output, and what its gradient is made of.
    assert 3 * weight + 2 * output <= found.peak <= 4 * weight + 3 * output + 100


def test_recomputing_saves_one_code_of_the_stem():
    data = sdnet.Data.of(4, CPU)
    saved = []
    for recompute in (None, False):
        step = sdnet.Step("sdnet8", data, OFF, recompute=recompute)
        step()
        saved.append(sdnet.memory(step).saved)
    assert saved[1] - saved[0] == 4 * (4 * 16 * 32 * 32)


def test_ratios_are_of_neighbours():
    found = sdnet.Ratio.of([1.0, 2.0, 4.0], [2.0, 5.0, 6.0])
    assert found == (2.0, 1.5, 2.5, 2.0)
    assert str(found) == "2.00 (1.50 to 2.50; 2.00)"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_table(device, capsys):
    with FakeGpu():
        assert sdnet.main([*FLAGS, "--device", device, "--only", "sdnet8", "sdnet8, released"]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^\| (\w+8.*?) +\|", printed, re.M) == ["resnet8", "sdnet8", "sdnet8, released"]
    assert re.search(r"^sdnet8, released: \d+ reads of the device in a step$", printed, re.M)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--repeats", "0"], "must be > 0"),
        (["--batch_size", "1"], "--batch_size > 1"),
        (["--only", "resnet9"], "--only resnet9: unknown"),
        (["--device", "cuda", "--process_time"], "--process_time"),
    ],
)
def test_flags_that_measure_nothing_are_refused(flags, message, capsys):
    with FakeGpu():
        assert sdnet.main([*FLAGS, *flags]) == 2
    assert message in capsys.readouterr().err
