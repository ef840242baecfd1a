"""What a GPU would refuse or wait for: whole commands, training steps and benchmarks on a fake one (`tests.fake_gpu`).

With a real GPU, `bash scripts/test.sh -m gpu` compares steps and scores with those of the CPU.
"""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torchvision.utils  # noqa: F401  Not within a fake GPU: it imports the compiler, which looks at what is faked.

import benchmarks.__main__ as table
import eval as evaluate
import train
import train_cocsr
import tsne
from benchmarks import augmentation, ceilings, coding, compare, conditioning, dictionary, floors, growth, kmeans, stage1
from benchmarks.ceilings import Ceilings
from common.device import pick_device
from common.dist import SINGLE
from common.errors import UserError
from common.flags import build_parser, parse
from common.seed import generator
from datasets import SHIFTS, DataSource, Loading, Table, split_one_class
from datasets.augment import AlignedSpec
from datasets.corrupt import corrupt_pixels, draw_noise
from datasets.one_class import SplitSpec
from datasets.shifts import ShiftSpec
from datasets.views import train_views
from evals.attack import ATTACKS
from models.sparse import kmeans as k_means
from program import SPECS
from tests.conftest import SHIFT, TINY
from tests.datasets.test_pictures import photographs
from tests.fake_gpu import FakeGpu, in_changing_order, on_gpu
from training import STAGE1, STAGE2
from training.loop import batches, descend, set_lr


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("index", ["", ":0"])
def test_the_device_that_is_picked_is_the_one_that_tensors_report(kind, index):
    with FakeGpu(kind):
        device = pick_device(kind + index)
        assert torch.zeros(2, device=device).device == device == torch.device(kind, 0)
    assert pick_device("cpu") == pick_device("cpu:0") == torch.zeros(2).device


def test_auto_takes_the_gpu_and_a_gpu_that_is_not_there_is_reported():
    with FakeGpu():
        assert pick_device("auto") == torch.device("cuda:0")
        with pytest.raises(UserError, match=r"--device cuda:1: this machine has 1 GPU\(s\)"):
            pick_device("cuda:1")
    with FakeGpu("mps"), pytest.raises(UserError, match="--device mps:1: it cannot be used"):
        pick_device("mps:1")


def test_the_gpu_that_is_picked_is_the_current_one(monkeypatch):
    """Else torch would answer for another GPU whether there is bf16, and hold pinned memory there."""
    current = []
    with FakeGpu():
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        pick_device("cuda:0")
    assert current == [torch.device("cuda", 0)]


# ------------------------------------------------------------------------------------------- what the fake refuses

REFUSED = {
    "a sum of both devices": lambda x: x + torch.ones(3),
    "a product of both devices": lambda x: torch.ones(2, 3) @ x,
    "tensors of both devices side by side": lambda x: torch.cat([x, torch.ones(3)]),
    "a scalar of the GPU on the CPU": lambda x: torch.ones(3) * x.sum(),
    "a scalar of the CPU side by side with others": lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    "a change of a CPU tensor": lambda x: torch.ones(()).add_(x.sum()),
    "indices of the GPU into a CPU tensor": lambda x: torch.ones(3)[x.long()],
    "values of the CPU at indices": lambda x: x.index_put_((x.long(),), torch.ones(3)),
    "pinning": lambda x: x.pin_memory(),
    "NumPy": lambda x: x.numpy(),
    "NumPy, by itself": lambda x: np.asarray(x),
    "a generator of the CPU": lambda x: torch.rand(3, device=x.device, generator=torch.Generator()),
    "a generator of the GPU for a CPU tensor": lambda x: torch.rand(3, generator=torch.Generator(x.device)),
    "a generator of the CPU, in place": lambda x: x.uniform_(generator=torch.Generator()),
    "another GPU": lambda x: torch.ones(3, device="cuda:1"),
    "fused steps with a count on the CPU": lambda x: torch._fused_adam_(
        *([x], [x.clone()], [x.clone()], [x.clone()], [], [torch.tensor(1.0)]),
        **{"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8, "amsgrad": False},
        maximize=False,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_fake_gpu_refuses(name):
    with FakeGpu(), pytest.raises((RuntimeError, TypeError), match="device|pin|convert"):
        REFUSED[name](torch.zeros(3, device="cuda"))


def test_the_fake_gpu_takes_what_cuda_takes():
    with FakeGpu() as gpu:
        x = torch.arange(6.0, device="cuda")
        for y in (
            x * torch.tensor(2.0),
            x[torch.tensor([5, 0])],
            x.where(x > 2, torch.tensor(0.0)),
            x.clone().fill_(3),
        ):
            assert y.device == gpu.device
        assert x[torch.tensor([5, 0])].tolist() == [5, 0] and float((x * torch.tensor(2.0)).sum()) == 30
        assert x.cpu().numpy().sum() == 15 and x.cpu().device == torch.device("cpu")
        weight = torch.ones(6, requires_grad=True)
        (weight.to("cuda") * x).sum().backward()
        assert weight.grad.tolist() == x.tolist() and not on_gpu(weight.grad)
    assert torch.zeros(1).device.type == "cpu"


WAITING = {
    "a value": lambda x: float(x[0]),
    "a condition": lambda x: bool(x.any()),
    "a list": lambda x: x.tolist(),
    "a copy to the CPU": lambda x: x.cpu(),
    "a blocking copy from the CPU": lambda x: torch.ones(3).to(x.device),
    "a constant": lambda x: torch.tensor([1.0], device=x.device),
    "a mask": lambda x: x[x > 0],
    "indices on the CPU": lambda x: x[torch.tensor([0, 1])],
    "places": lambda x: x.nonzero(),
}


@pytest.mark.parametrize("name", WAITING)
def test_the_fake_gpu_counts_what_waits(name):
    with FakeGpu() as gpu:
        x = torch.zeros(3, device="cuda")
        y = torch.ones(3).to(x.device, non_blocking=True) + x * 2
        assert y.sum().device == gpu.device and not gpu.waits
        WAITING[name](x)
        assert gpu.waits


def test_the_fake_apple_gpu_refuses_float64():
    with FakeGpu("mps"):
        x = torch.zeros(3, device="mps")
        for make in (
            lambda: x.double(),
            lambda: torch.ones(3, dtype=torch.float64).to("mps"),
            lambda: x.to(torch.float64),
        ):
            with pytest.raises(TypeError, match="float64"):
                make()
        assert torch.ones(3, dtype=torch.float64).to(x).dtype == torch.float32 and x.cpu().double().sum() == 0


# ------------------------------------------------------------------------------------------------ training steps


def waits(arguments, memory=2**34):
    """What the second step of an epoch, as the flags say, waits for."""
    modes = STAGE1 | STAGE2
    parser = build_parser("test", modes, "simclr_CSI", SPECS)
    labelled = any(argument.startswith("sup") for argument in arguments)
    flags = parse([*(TINY[:-2] if labelled else TINY), *arguments], parser)
    with FakeGpu(memory=memory) as gpu:
        split = split_one_class(
            "digits", DataSource.of(flags, "digits", training=True), flags.of(SplitSpec).one_class_idx, 8
        )
        mode = modes[flags.mode]
        recipe = mode.build(flags, split, SINGLE)
        found = batches(recipe.data, 16, loading=recipe.loading, seed=0, epoch=1)
        for _ in range(2):
            gpu.waits.clear()
            set_lr(recipe, 0.5)
            watched = descend(recipe, next(found), SINGLE)
        assert {value.device for value in watched.values()} == {gpu.device}
        assert all(on_gpu(p) and (p.grad is None or on_gpu(p.grad)) for p in recipe.model.parameters())
        return list(gpu.waits)


@pytest.mark.parametrize("shift", [name for name in SHIFTS if name != "none"])
def test_a_step_of_stage_1_neither_waits_nor_mixes_devices(shift):
    assert not waits(["--mode", "simclr_CSI", "--shift_trans_type", shift])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--mode", "simclr"],
        ["--mode", "rot_trans"],
        ["--mode", "rot_trans", "--micro_batch", "5"],
        ["--mode", "sup_simclr_CSI"],
        ["--mode", "simclr", "--model", "sdnet8_all"],
        [*SHIFT, "--mode", "simclr_CSI", "--micro_batch", "5"],
        [*SHIFT, "--mode", "simclr_CSI", "--optimizer", "sgd"],
        [*SHIFT, "--mode", "simclr_CSI", "--optimizer", "adam"],
    ],
)
def test_nor_do_other_modes_and_optimisers(arguments):
    assert not waits(arguments)


def test_nor_does_a_step_on_images_that_stay_in_host_memory():
    assert not waits([*SHIFT, "--mode", "simclr_CSI"], memory=0)


@pytest.mark.parametrize("memory", [2**34, 0])
def test_nor_does_loading_rows(memory):
    images = split_one_class("digits", DataSource(), 3, None).train(1)
    noisy = Table.of_images(images).with_noise(draw_noise(122, 1, 64, 5, "normal", generator(0, "x")), b"x")
    with FakeGpu(memory=memory) as gpu:
        data = noisy.to(gpu.device)
        assert all(on_gpu(x) is (memory > 0) for x in (data.rows, data.clean, data.mask))
        found = batches(data, 16, loading=Loading(flip=False), seed=0, epoch=1)  # type: ignore[arg-type]
        next(found)
        gpu.waits.clear()
        batch = next(found)
        assert on_gpu(batch.images) and on_gpu(batch.index) and not gpu.waits
        assert torch.equal(batch.images[0].cpu(), noisy.rows[batch.index.cpu()])


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_noise_is_the_same_on_every_device(kind):
    images = torch.rand(5, 3, 4, 4, generator=generator(0, "x"))
    expected = corrupt_pixels(images, 4, "normal", generator(1, "x"))
    with FakeGpu(kind) as gpu:
        found = corrupt_pixels(images.to(gpu.device), 4, "normal", generator(1, "x"))
        assert all(map(on_gpu, found))
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sr_dict_size", "40"],
        ["--sr_dict_size", "100"],
        ["--sr_dict_size", "300"],
        ["--micro_batch", "5"],
        ["--loss_sr_deep_supervision", "9,19"],
        ["--freeze_sr_dict"],
        ["--loss_dict_constr_mode", "1", "--invert_sr_feature_norm"],
    ],
)
def test_nor_does_a_step_of_stage_2(stage1, arguments):
    assert not waits([*SHIFT, "--mode", "cocsr_dict", "--resume_path", str(stage1), "--epochs", "9", *arguments])


# ---------------------------------------------------------------------------------------------------- benchmarks

PARTS = {
    "dictionary": lambda device: dictionary.part(device, dictionary.Size(2, 12, 10, 6, 8)),
    "kmeans": lambda device: kmeans.part(device, kmeans.correlated(80, 8)),
    "coding": lambda device: coding.part(device, coding.Size(120, 2, 3, 12, 10)),
    "augmentation": augmentation.part,
    "stage1": lambda device: stage1.part(device, on_gpu=4),
    "stage1_bf16": lambda device: stage1.part(device, on_gpu=4, bf16=True),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_the_benchmarks(name, monkeypatch, capsys):
    monkeypatch.setattr(table, "PARTS", PARTS)
    monkeypatch.setattr(table, "apart", lambda run, *args, **settings: run(*args, **settings))
    monkeypatch.setattr(table.Ceilings, "of", lambda device: Ceilings(1e9, 1e9, 1e9, 1e9))
    monkeypatch.setattr(compare, "_QUICK", 0.0)
    monkeypatch.setattr(kmeans, "CENTRES", 10)
    with FakeGpu():
        assert not table.main(["--repeats", "1", "--only", name])
    assert capsys.readouterr().out.startswith("fake GPU, torch")


def test_ceilings(monkeypatch):
    made = ceilings._convolution
    monkeypatch.setattr(ceilings, "_convolution", lambda device, images: made(device, 1))
    with FakeGpu() as gpu:
        found = Ceilings.of(gpu.device, size=64, repeats=1)
    assert min(found.product, found.convolution, found.bf16, found.copy) > 0 and found.product != found.convolution


def test_floors(monkeypatch, capsys):
    monkeypatch.setattr(floors.Ceilings, "of", lambda device: Ceilings(1e9, 1e9, 1e9, 1e9))
    monkeypatch.setattr(floors, "convolutions", lambda run, device: (run() or 1.0, 2.0, 100))
    monkeypatch.setattr(floors, "_ATOMS", 16)
    with FakeGpu():
        assert not floors.main(["--model", "resnet8", "--images", "4", "--repeats", "1"])
    assert capsys.readouterr().out.startswith("fake GPU, torch")


@pytest.mark.parametrize(
    "run",
    [
        lambda device: growth.evaluation(device, images=8, draws=2, shifts=8)(),
        lambda device: growth.training_step(device, images=8, shifts=8)(),
        lambda device: growth._course("stage 1", device, 8, 8),
        lambda device: growth._course("stage 2", device, 8, 8),
        lambda device: conditioning.errors(*conditioning.inputs(20, device, 16, 8), 1.0),
    ],
)
def test_what_else_is_measured(run, monkeypatch):
    monkeypatch.setattr(growth, "_MEETING", [SimpleNamespace(wait=lambda: None)])
    with FakeGpu():
        run(pick_device("cuda"))


# ------------------------------------------------------------------------------------------------ whole commands

PLAIN = [*TINY, "--amp", "off"]
SHIFTED = [*PLAIN, *SHIFT]
SPARSE = ["--epochs", "4", "--invert_sr_feature_norm"]
NOISY = [*TINY, "--layers", "16", "8", "--outliers", "9", *"--corrupt normal --corrupt_pixels 4".split()]
LABELLED = [*TINY[:-4], "--batch_size", "400", "--amp", "off"]
# Without those of pyautoattack, which asks the driver for the state of its generators, and the longest ones.
_ELSEWHERE = {"pyautoattack", "source", "operators of MeanSparse"}
OWN_ATTACKS = [name for name, row in ATTACKS.items() if not _ELSEWHERE & set(row.needs) and row.steps < 40]
# By mode: the script, its flags, and the mode whose run it starts from, with the flag that says so.
COMMANDS = {
    "simclr_CSI": (train, [*SHIFTED, *"--simclr_dim 32 --epochs 2".split()], None),
    "rot_trans": (train, [*PLAIN, "--epochs", "1"], None),
    "sup_simclr": (train, [*LABELLED, "--epochs", "1"], None),
    "sup_linear": (train, [*LABELLED, "--epochs", "1"], "--load_path sup_simclr"),
    "supervised": (train, [*LABELLED, "--epochs", "1", "--model", "sdnet8"], None),
    "adv_trades": (train, [*LABELLED, *"--epochs 1 --ra --anc --num_steps 2".split()], None),
    "cocsr_dict": (
        train_cocsr,
        [*SHIFTED, *SPARSE, *"--sr_dict_size 24 --ini_sr_dict_train".split()],
        "--resume_path simclr_CSI",
    ),
    "simclr_CSI, continued": (train, [*SHIFTED, *"--epochs 3 --suffix more".split()], "--resume_path simclr_CSI"),
    "ood_pre_refmix": (
        evaluate,
        [*SHIFTED, *"--ood_score CSI knn ocsvm --ood_samples 2".split()],
        "--load_path simclr_CSI",
    ),
    "ood_pre_cocsr_refmix": (evaluate, [*SHIFTED, *SPARSE[2:], "--ood_samples", "2"], "--load_path cocsr_dict"),
    "ood_pre_multi_sr": (
        evaluate,
        [*SHIFTED, *"--sr_dict_size 16 --sr_fit_steps 10".split()],
        "--load_path simclr_CSI",
    ),
    "rot_trans, with images set aside": (train, [*PLAIN, *"--epochs 1 --held_out 20 --suffix held".split()], None),
    "level_dict": (
        train_cocsr,
        ["--amp", "off", "--sr_dict_size", "16"],
        "--resume_path rot_trans, with images set aside",
    ),
    "ood_levels": (evaluate, ["--amp", "off"], "--load_path level_dict"),
    "rot_trans, evaluated": (evaluate, PLAIN, "--load_path rot_trans"),
    "test_acc": (evaluate, LABELLED, "--load_path sup_linear"),
    "attack": (
        evaluate,
        [*LABELLED, *"--attack_images 12 --attack_steps 2".split(), "--attacks", *OWN_ATTACKS],
        "--load_path adv_trades",
    ),
    "test_acc, under reverse attention": (evaluate, LABELLED, "--load_path adv_trades"),
    "test_acc, of an SDNet": (evaluate, [*LABELLED, "--model", "sdnet8"], "--load_path supervised"),
    "rdae": (train, [*NOISY, *"--rounds 2 --inner_epochs 2 --reinit --threshold 1".split()], None),
    "vae": (train, [*NOISY, *"--epochs 2 --likelihood gaussian".split()], None),
    "rdae_outliers": (evaluate, NOISY, "--load_path rdae"),
    "rdae_denoise": (evaluate, NOISY, "--load_path vae"),
    "ood_reconstruction": (evaluate, NOISY, "--load_path rdae"),
    "ood_pre_tsne_dict": (tsne, [*SHIFTED, *SPARSE[2:], "--tsne_points", "20"], "--load_path cocsr_dict"),
}


class Commands:
    """The commands on one device: each is carried out once, and before it the one whose run it starts from."""

    def __init__(self, logs: Path, device: str, gpu=nullcontext):
        self.logs, self.device, self.gpu = logs, device, gpu
        self.folders: dict[str, Path] = {}
        self.found: dict[str, dict[str, float]] = {}

    def __call__(self, name: str) -> dict[str, float]:
        """What it found, by name: losses by epoch, AUROCs, accuracies; pictures count as 0."""
        if name in self.found:
            return self.found[name]
        script, flags, start = COMMANDS[name]
        flags = [*flags, "--mode", name.split(",")[0], "--device", self.device]
        if start:
            flag, start = start.split(maxsplit=1)
            self(start)
            flags += [flag, str(self.folders[start])]
        if script in (train, train_cocsr):
            flags += ["--log_root", str(self.logs)]
        before = set(self.logs.rglob("*"))
        with self.gpu():
            assert not script.main(flags)
        new = set(self.logs.rglob("*")) - before
        self.folders[name] = next((path for path in new if path.is_dir()), self.folders.get(start))
        self.found[name] = {key: value for path in new for key, value in _numbers(path)}
        return self.found[name]


def _numbers(path: Path):
    if path.suffix == ".png":
        yield path.name, 0.0
    for row in map(json.loads, path.read_text().splitlines()) if path.suffix == ".jsonl" else ():
        yield from ((f"{row['epoch']} {tag}", value) for tag, value in row.items() if "loss" in tag or "sr/" in tag)
    if path.name.startswith(("result", "accuracy")):
        found = json.loads(path.read_text())
        assert found["device"] != "fake GPU" or found["peak_memory_gib"] == 0.002
        numbers = ("accuracy", "ece", "worst_case", "roc_auc", "threshold", "code_accuracy")
        values = found["auroc"] if "auroc" in found else {name: found[name] for name in numbers if name in found}
        yield from ((f"{path.name} {name}", value) for name, value in values.items())


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    # Its k-means may look at scores in bfloat16, that on a GPU does not.
    return Commands(
        tmp_path_factory.mktemp("cpu"), "cpu", lambda: patch.object(k_means, "_has_fast_bfloat16", lambda device: False)
    )


@pytest.fixture(scope="module")
def on_gpu_with_images(tmp_path_factory):
    return Commands(tmp_path_factory.mktemp("cuda"), "cuda", lambda: FakeGpu(forbidden=in_changing_order))


@pytest.fixture(scope="module")
def on_gpu_without_images(tmp_path_factory):
    """On a GPU with so little memory that images stay in the host's."""
    return Commands(tmp_path_factory.mktemp("auto"), "auto", lambda: FakeGpu(memory=0))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_the_gpu_finds_what_the_cpu_finds(name, on_cpu, on_gpu_with_images):
    assert on_gpu_with_images(name) == pytest.approx(on_cpu(name), rel=1e-3, abs=2e-3)
    assert on_cpu(name) or name == "level_dict"  # which has no epochs: `ood_levels` looks at what it made


@pytest.mark.parametrize(
    "name", ["simclr_CSI", "sup_simclr", "cocsr_dict", "ood_pre_refmix", "ood_pre_cocsr_refmix", "rdae"]
)
def test_and_so_it_does_where_images_stay_in_host_memory(name, on_cpu, on_gpu_without_images):
    assert on_gpu_without_images(name) == pytest.approx(on_cpu(name), rel=1e-3, abs=2e-3)


def test_pictures_that_are_decoded_while_training_runs(tmp_path):
    photographs(tmp_path / "data", {"one_class_train/acorn": 5, "one_class_train/tank": 4})
    flags = "--mode simclr_CSI --dataset imagenet --one_class_idx 0 --model resnet8 --image_size 16 --epochs 1".split()
    places = ["--data_path", str(tmp_path / "data"), "--log_root", str(tmp_path / "logs")]
    with FakeGpu():
        assert not train.main([*flags, *SHIFT, *places, "--batch_size", "4", "--num_worker", "0", "--device", "auto"])


# ------------------------------------------------------------------------------------------------ with a real GPU


def gpu(test):
    """A test for a real GPU: `pytest -m gpu`."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")(test))


@gpu
def test_views_on_a_gpu_are_those_of_the_same_draws_on_the_cpu(monkeypatch):
    """Draws of a GPU's generator, carried to the CPU."""
    from datasets import views

    spec = AlignedSpec()
    shifts = ShiftSpec("rot_bmix", 0.2).functions(spec)
    images = torch.randint(0, 256, (2, 8, 3, 32, 32), dtype=torch.uint8, generator=generator(0, "test"))
    kept = []

    def render(images, shifts, sub_views, numbers, spec, batch):
        kept.append(numbers)
        return views.render_views(images, shifts, sub_views, numbers, spec, batch)

    on_gpu = train_views(images.cuda(), shifts, spec, generator(0, "test", device="cuda"), render)
    numbers = type(kept[0])(kept[0].colours.cpu(), kept[0].tries.cpu())
    sub_views = [[None for _ in shifts] for _ in images]
    on_cpu = views.render_views(images, shifts, sub_views, numbers, spec, 8)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-4, rtol=0)


@gpu
def test_dictionary_step_and_k_means_on_a_gpu():
    size = dictionary.Size(2, 24, 20, 16, 40)
    D, s = size.inputs(torch.device("cpu"), torch.float64)
    expected = dictionary.ours(dictionary.bank_of(D, size.steps), s)
    found = dictionary.ours(dictionary.bank_of(D.cuda(), size.steps), s.cuda())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-9, rtol=1e-9)
    x = torch.randn(1, 500, 16, generator=generator(0, "test"))
    centres = [
        k_means.kmeans(x.to(device), 20, generator=generator(0, "test"))[0].cpu() for device in ("cuda", "cuda", "cpu")
    ]
    a, _, b = (torch.cdist(x[0], c).amin(1).square().sum() for c in centres)
    assert abs(a / b - 1) < 0.02 and torch.equal(*centres[:2])


@pytest.fixture(scope="module")
def on_a_real_gpu(tmp_path_factory):
    return Commands(tmp_path_factory.mktemp("gpu"), "cuda")


@gpu
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_a_real_gpu(name, on_cpu, on_a_real_gpu):
    """Its draws are others, so that it finds other numbers of the same things."""
    assert on_a_real_gpu(name).keys() == on_cpu(name).keys()
    assert all(math.isfinite(value) for value in on_a_real_gpu(name).values())


@gpu
@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_the_benchmarks_on_a_real_gpu(name, monkeypatch):
    monkeypatch.setattr(kmeans, "CENTRES", 10)
    part = PARTS[name](torch.device("cuda", 0))
    assert part.check(part.ours(), part.published())
