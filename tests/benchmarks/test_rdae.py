"""What the benchmark of robust autoencoders compares is compared here at small sizes, and how it counts."""

import re
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import rdae
from benchmarks.ceilings import Ceilings
from tests.fake_gpu import FakeGpu

CPU = torch.device("cpu")
SMALL = rdae.Size(images=50, layers=(12, 8, 5), batch=9, epochs=2)
FLAGS = "--images 50 --layers 12 8 5 --batch_size 9 --epochs 1 --entries 30 --repeats 1".split()


def test_all_sides_agree():
    assert "weights after training differ by" in rdae.check(SMALL, CPU)


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("soft", lambda v, t: v - v.clamp(-1.01 * t, 1.01 * t), "soft differs"),
        ("soft_group", lambda v, t, dim: 1.01 * rdae.column_loop(v, t), "soft_group differs"),
        ("loader_training", lambda net, rows, size, orders: None, "weights differ"),
    ],
)
def test_a_side_that_is_wrong_is_not_timed(name, wrong, message, monkeypatch):
    monkeypatch.setattr(rdae, name, wrong)
    with pytest.raises(AssertionError, match=message):
        rdae.check(SMALL, CPU)


def test_operations_are_those_of_a_step():
    ours = rdae.gradients(SMALL, CPU)
    with FlopCounterMode(display=False) as counter:
        ours.net.losses(SMALL.data(CPU)[:9]).mean().backward()
    assert rdae.operations(SMALL) == counter.get_total_flops() == 2 * 9 * (3 * 2 * (12 * 8 + 8 * 5) - 12 * 8)


def test_a_round_has_as_many_steps_as_batches():
    assert SMALL.steps == 12 and len(rdae.slides_training(rdae.slides_net(SMALL.layers), SMALL.data(CPU), SMALL)) == 12
    assert rdae.Size().steps == 390


def test_medians_leave_the_first_call_out():
    """Lower bounds only, which hold however busy the machine is."""
    calls: list[str] = []

    def side(name: str, seconds: float) -> None:
        time.sleep(seconds if calls.count(name) else 0)
        calls.append(name)

    sides = {"a": lambda: side("a", 0.02), "b": lambda: side("b", 0.01)}
    found = rdae.Clock(CPU).alternate(sides, repeats=3)
    assert calls == ["a", "b"] * 4 and found["a"] >= 0.02 and found["b"] >= 0.01


def test_seconds_of_the_process_are_not_those_it_waits():
    assert rdae.Clock(CPU, of_process=True)(lambda: time.sleep(0.05)) < 0.04


def test_the_loop_over_entries_is_scaled_to_all_of_them(monkeypatch):
    monkeypatch.setattr(rdae.Clock, "__call__", lambda clock, run: 1.0)
    found = rdae.operators(SMALL, rdae.Clock(CPU), repeats=1, entries=30)
    assert found == {"entries": (1.0, 50 * 12 / 30), "columns": (1.0, 1.0), "rows": (1.0, 1.0)}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_tables(device, monkeypatch, capsys):
    monkeypatch.setattr(rdae.Ceilings, "of", lambda device: Ceilings(1e9, 1e9, 0.0, 1e9))
    with FakeGpu():
        assert rdae.main([*FLAGS, "--device", device]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"^\| (ours|loader|slides) ", printed, re.M)) == 3
    assert len(re.findall(r"^\| (entries|columns|rows) ", printed, re.M)) == 3
    assert "50 images, 12-8-5, batch 9, 1 thread(s)" in printed


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--repeats", "0"], "must be > 0"),
        (["--layers", "12"], "--layers needs two sizes at least"),
        (["--images", "3"], "--images must be > 3"),
        (["--device", "cuda", "--process_time"], "--process_time"),
    ],
)
def test_flags_that_measure_nothing_are_refused(flags, message, capsys):
    with FakeGpu():
        assert rdae.main([*FLAGS, *flags]) == 2
    assert message in capsys.readouterr().err
