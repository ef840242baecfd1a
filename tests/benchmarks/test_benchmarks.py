"""What benchmarks compare is compared here at small sizes, and how they count; nothing is timed."""

import contextlib
import multiprocessing
import os
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

import benchmarks.__main__ as table
from benchmarks import augmentation, coding, compare, dictionary, floors, growth, stage1
from benchmarks.ceilings import Ceilings
from benchmarks.floors import ByteCounter, convolutions

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "part",
    [
        lambda: dictionary.part(CPU, dictionary.Size(2, 12, 10, 6, 8)),
        lambda: dictionary.part(CPU, dictionary.Size(2, 8, 20, 6, 8)),
        lambda: coding.part(CPU, coding.Size(120, 2, 3, 12, 10)),
        lambda: coding.cross_part(CPU, coding.Size(120, 1, 3, 12, 10)),
        lambda: coding.cross_draws_part(CPU, coding.Size(120, 3, 3, 12, 10)),
        lambda: augmentation.part(CPU),
        lambda: stage1.part(CPU, "resnet8", images=8),
    ],
)
def test_both_sides_agree(part):
    found = part()
    assert found.check(found.ours(), found.published())


def test_a_side_that_is_wrong_is_not_timed():
    found = coding.part(CPU, coding.Size(20, 2, 3, 12, 10))
    with pytest.raises(AssertionError):
        found.check(found.ours() * 1.01, found.published())
    views = augmentation.part(CPU)
    with pytest.raises(AssertionError, match="other distribution"):
        views.check(views.ours() ** 2, views.published())


def sleeping(device: torch.device) -> compare.Part:
    """The published side sleeps 10 ms, and three times as long in a process of its own."""
    a = torch.rand(50, 60)
    seconds = 0.03 if multiprocessing.parent_process() else 0.01
    published = partial(time.sleep, seconds)
    return compare.Part("p", "s", lambda: time.sleep(0.002) or a @ a.T, published, lambda x, y: "same", 1e6)


def test_rows_say_what_was_measured():
    found = compare.compare(sleeping, CPU, repeats=3)
    assert found.rounds == 3 and found.remark == "same" and found.work == 2 * 50 * 60 * 50
    # Lower bounds only, which hold however busy the machine is; a side in another's place falls short of its own.
    assert found.published_s >= 0.03 and found.published_kept_s >= 0.01 and found.ours_s >= 0.002
    assert found.ours_bytes >= 50 * 50 * 4
    assert found.share(found.work / found.ours_s, 1e12) == pytest.approx(1)
    assert found.share(1e15, 1e6 / found.ours_s / 2) == pytest.approx(2)


def test_a_part_is_measured_in_a_process_of_its_own():
    assert compare.apart(os.getpid) != os.getpid()


def test_peak_is_what_lives_at_one_time():
    def run():
        for _ in range(3):
            x = torch.zeros(2**18)  # 1 MiB
            del x
        y = torch.zeros(2**19)
        return y

    result, peak = compare.peak_bytes(run, CPU)
    assert result.shape == (2**19,) and 2**21 <= peak < 2**21 + 2**16


def test_counted_operations_of_the_dictionary_step_are_those_of_its_formula():
    size = dictionary.Size(3, 16, 12, 7, 9)
    D, s = size.inputs(CPU)
    bank = dictionary.bank_of(D, size.steps)
    with FlopCounterMode(display=False) as counter:
        dictionary.ours(bank, s)
    products = 3 * (size.steps - 1) * 2 * size.atoms**2 * size.batch * size.shifts
    # Beside the steps: the system, the start, the loss, the gap and their gradients, some twenty products.
    assert products < counter.get_total_flops() < products + 25 * 2 * 16**2 * 12 * size.shifts


def test_bytes_are_of_what_is_read_and_written_but_views():
    x = torch.zeros(100)
    with ByteCounter() as counter:
        y = x.view(10, 10).T[:5]
        assert counter.total == 0
        z = x + 1  # reads and writes 400 bytes
        assert counter.total == 800
        z.mul_(2)
        assert counter.total >= 1600
        torch.cat([y, y])
    assert counter.total >= 1600 + 2 * 200 + 400


def test_convolutions_have_a_part_of_the_time_and_the_operations_of_their_formula():
    layer, x, y = torch.nn.Conv2d(4, 8, 3, padding=1), torch.rand(5, 4, 6, 6), torch.rand(90, 80)
    spent, all_, work = convolutions(lambda: (layer(x).sum().backward(), y @ y.T), CPU)
    # Forward, and the gradient of the weights; the input needs none.
    assert work == 2 * (2 * 5 * 8 * 36 * 4 * 9)
    assert 0 < spent < all_


def test_on_a_gpu_the_time_of_convolutions_is_that_of_their_kernels_counted_once(monkeypatch):
    """The profiler tells a kernel's time twice: of the operation that launched it, and of the kernel."""

    def event(key, kind, microseconds):
        return SimpleNamespace(key=key, device_type=kind, self_device_time_total=microseconds)

    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    events = [event("aten::cudnn_convolution", cpu, 300), event("aten::add_", cpu, 700)]
    events += [event("sm80_xmma_fprop", cuda, 300), event("elementwise_kernel", cuda, 700)]
    record = SimpleNamespace(key_averages=lambda: events)
    monkeypatch.setattr(floors, "profile", lambda use_device: contextlib.nullcontext(record))
    monkeypatch.setattr(floors, "wait", lambda device: None)
    x = torch.ones(2, 2)
    spent, all_, _ = convolutions(lambda: x @ x, torch.device("cuda", 0))
    assert (spent, all_) == pytest.approx((3e-4, 1e-3))


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_timing_waits_for_a_gpu(kind, monkeypatch):
    said = []
    monkeypatch.setattr(getattr(torch, kind), "synchronize", lambda *device: said.append("waited"))
    compare.timed(lambda: said.append("ran"), torch.device(kind, 0))
    assert said == ["waited", "ran", "waited"]


def failing(device: torch.device) -> compare.Part:
    raise ValueError("this part is broken")


def test_a_part_that_fails_is_reported_and_the_others_are_shown(monkeypatch, capsys):
    monkeypatch.setattr(table, "PARTS", {"broken": failing, "sleeping": sleeping})
    monkeypatch.setattr(table.Ceilings, "of", lambda device: Ceilings(1e9, 1e9, 0.0, 1e9))
    assert table.main(["--repeats", "1"]) == 1
    said = capsys.readouterr()
    assert "failed: broken (ValueError: this part is broken)" in said.err and "| same" in said.out


def test_ceilings_are_positive_and_reported():
    found = Ceilings.of(CPU, size=64, repeats=1)
    assert found.product > 0 and found.copy > 0 and found.convolution == found.product and found.bf16 == 0
    assert "GFLOP/s, copy" in str(found) and "bf16" not in str(found)


def test_exponent_is_the_slope_in_logarithms():
    assert growth.exponent([3, 6, 12, 24]) == pytest.approx(1)
    assert growth.exponent([1, 4, 16, 64]) == pytest.approx(2)


def test_growth_runs_make_scores_and_gradients():
    scores = growth.evaluation(CPU, images=5, draws=2, shifts=3)()
    assert scores.shape == (5,) and scores.isfinite().all()
    growth.training_step(CPU, images=4)()


@pytest.mark.parametrize("name", ["stage 1", "stage 2"])
def test_stability_compares_tenths(name):
    row = growth.stability(name, CPU, 80)
    assert row[0] == f"{name}, 80 steps" and row[3].endswith(" %") and len(row) == 7


def test_a_course_that_fails_leaves_nobody_waiting(monkeypatch):
    barrier = threading.Barrier(2)
    monkeypatch.setattr(growth, "_MEETING", [barrier])
    with pytest.raises(KeyError):
        growth.course("stage 3", CPU, 72, 8)
    assert barrier.broken


def test_published_dictionary_step_knows_own_blocks_only():
    """The masks of the published side take the block diagonal: another shift's features do not matter to D_k."""
    D, s = dictionary.Size(2, 6, 5, 4, 5).inputs(CPU, torch.float64)
    _, gradient = dictionary.published(D, s, 5)
    _, other = dictionary.published(D, torch.stack([s[0], F.normalize(s[1] + 1, dim=0)]), 5)
    torch.testing.assert_close(gradient[0], other[0], atol=1e-12, rtol=0)
    assert (gradient[1] - other[1]).abs().max() > 1e-3
