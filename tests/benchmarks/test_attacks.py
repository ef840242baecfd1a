"""The benchmark of attacks at small sizes: its sides, its table, and what it refuses."""

import re

import pytest
import torch

from benchmarks import attacks
from benchmarks.sdnet import Data
from common import attacks as ours
from common.device import autocast
from tests.common.attacks.nets import Counting
from tests.fake_gpu import FakeGpu

CPU = torch.device("cpu")
FLAGS = "--image_size 8 --batch_size 3 --steps 2 --repeats 1".split()


def attacked(steps=4):
    return attacks.Attacked("resnet8", Data.of(3, CPU, 8), autocast("off", CPU), steps)


def test_the_ceiling_is_as_many_passes_as_an_attack_has_steps():
    one = attacked()
    counted = Counting(one.net)
    sides = one.sides()
    one.net = counted
    passes = {}
    for name, run in sides.items():
        counted.forward_passes.clear()
        counted.backward_passes.clear()
        run()
        passes[name] = len(counted.forward_passes), len(counted.backward_passes)
    exact = dict.fromkeys([attacks.CEILING, attacks.LIVE, attacks.LOOP, "pgd, last", "pgd, last, L2"], (4, 4))
    assert passes == exact | dict.fromkeys(["pgd, best", "apgd", "pgd, best, L2", "apgd, L2"], (6, 4))
    assert all(p.grad is None and p.requires_grad for p in one.net.parameters())


def test_pgd_is_the_plain_loop_and_another_attack_is_not_timed(monkeypatch):
    sides = attacked().sides()
    assert attacks.check(sides) == "pgd differs from the plain loop in 0 % of the pixels"
    monkeypatch.setattr(attacks, "pgd", lambda loss, x, *data, **settings: ours.pgd(loss, x, *data, **settings) + 0.01)
    with pytest.raises(AssertionError, match="pgd differs from the plain loop in 100.0 % of the pixels"):
        attacks.check(attacked().sides())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_table(device, capsys):
    with FakeGpu():
        assert attacks.main([*FLAGS, "--device", device]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (.+?) +\| (\d+) +\| (\d.\d\d) \(", printed, re.M)
    assert [name for name, _, _ in rows] == list(attacked().sides()) and rows[0][2] == "1.00"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--steps", "0"], "--steps and --repeats must be > 0"),
        (["--device", "cuda", "--process_time"], "--process_time"),
    ],
)
def test_flags_that_measure_nothing_are_refused(flags, message, capsys):
    with FakeGpu():
        assert attacks.main([*FLAGS, *flags]) == 2
    assert message in capsys.readouterr().err
