"""What a GPU would refuse or wait for.

Without one, steps run on the `meta` device of torch: tensors there have no values, so that reading one, or mixing
devices, is an error. With one, steps and scores are compared with those of the CPU.
"""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import augmentation, coding, dictionary, floors, growth, stage1
from common.device import autocast, pick_device
from common.dist import ALONE
from common.flags import Tables, build_parser, parse
from common.seed import generator
from datasets import DATASETS, SHIFTS, DataSource, split_one_class
from datasets.augment import AlignedSpec
from datasets.sets import image_set
from datasets.shifts import ShiftSpec
from datasets.views import train_views
from models import BACKBONES
from models.sparse.kmeans import kmeans
from tests.conftest import SHIFT, TINY
from training import STAGE1, STAGE2
from training.loop import batches, descend
from training.modes import setup

META = torch.device("meta")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0", "cpu", "cpu:0", "mps"])
def test_the_device_that_is_picked_is_the_one_that_tensors_report(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with FakeTensorMode():
        device = pick_device(name)
        assert torch.empty(2, device=device).device == device


class Draws:
    """A generator of a device, which may be meta: torch has none there."""

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        self.own = None if self.device.type == "meta" else _GENERATOR(device)

    def manual_seed(self, seed):
        if self.own is not None:
            self.own.manual_seed(seed)
        return self


_GENERATOR = torch.Generator


def _drawn(function):
    @functools.wraps(function)
    def draw(*args, generator=None, **settings):
        if not isinstance(generator, Draws):
            return function(*args, **settings)
        wanted = torch.device(settings.get("device") or "cpu")
        assert wanted.type == generator.device.type, f"a generator on {generator.device} draws for {wanted}"
        return function(*args, **({} if generator.own is None else {"generator": generator.own}), **settings)

    return draw


@pytest.fixture
def meta(monkeypatch):
    """Generators, autocast and fused optimisers that take the meta device; modes that train on it."""
    for name in ("rand", "randn", "randint", "randperm"):
        monkeypatch.setattr(torch, name, _drawn(getattr(torch, name)))
    monkeypatch.setattr(torch, "Generator", Draws)
    real = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda kind, *a, **k: real("cpu" if kind == "meta" else kind, *a, **k))
    for name in ("Adam", "SGD"):
        made = getattr(torch.optim, name)
        monkeypatch.setattr(torch.optim, name, lambda *a, made=made, fused=None, **k: made(*a, **k))
    monkeypatch.setattr(setup, "pick_device", lambda *args: META)
    return META


def test_reading_a_value_is_an_error_here(meta):
    with pytest.raises(RuntimeError, match="meta"):
        float(torch.rand(3, device=meta, generator=generator(0, "test", device=meta)).sum())
    with pytest.raises(AssertionError, match="draws for"):
        torch.rand(3, device=meta, generator=generator(0, "test"))


def steps(arguments, count=2):
    """A few steps of training as the flags say."""
    modes = STAGE1 | STAGE2
    parser = build_parser("test", modes, "simclr_CSI", Tables(DATASETS, (), BACKBONES, SHIFTS))
    labelled = any(argument.startswith("sup") for argument in arguments)
    flags = parse([*(TINY[:-2] if labelled else TINY), "--image_size", "32", "--amp", "bf16", *arguments], parser)
    split = split_one_class("digits", DataSource.of(flags, "digits", training=True), flags.one_class_idx, 32)
    mode = modes[flags.mode]
    recipe = mode.build(flags, split, mode.shifts(flags), ALONE)
    found = batches(recipe.data, 16, copies=mode.copies, seed=0, epoch=1)
    for _, batch in zip(range(count), found, strict=False):
        recipe.before_step(0.5)
        watched = descend(recipe, batch, ALONE)
    return watched


@pytest.mark.parametrize("shift", [name for name in SHIFTS if name != "none"])
def test_a_step_of_stage_1_neither_waits_nor_mixes_devices(meta, shift):
    watched = steps(["--mode", "simclr_CSI", "--shift_trans_type", shift])
    assert {value.device.type for value in watched.values()} == {"meta"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--mode", "simclr"],
        ["--mode", "rot_trans"],
        ["--mode", "rot_trans", "--micro_batch", "5"],
        ["--mode", "sup_simclr_CSI"],
        [*SHIFT, "--mode", "simclr_CSI", "--micro_batch", "5"],
        [*SHIFT, "--mode", "simclr_CSI", "--optimizer", "sgd"],
        [*SHIFT, "--mode", "simclr_CSI", "--optimizer", "adam"],
    ],
)
def test_nor_do_other_modes_and_optimisers(meta, arguments):
    steps(arguments)


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
def test_nor_does_a_step_of_stage_2(meta, stage1, arguments):
    steps([*SHIFT, "--mode", "cocsr_dict", "--resume_path", str(stage1), "--epochs", "9", *arguments])


def _images(n, device):
    return image_set(torch.zeros(n, 3, 32, 32, dtype=torch.uint8), torch.zeros(n)).to(device)


def _recipe_step(make, copies, device):
    recipe = make(device)
    descend(recipe, next(batches(recipe.data, 8, copies=copies, seed=0, epoch=1)), ALONE)


BENCHMARKS = {
    "augmentation": lambda device: augmentation.part(device, 8).ours(),
    "stage 1": lambda device: stage1_part(device, bf16=False),
    "stage 1, bf16": lambda device: stage1_part(device, bf16=True),
    "dictionary": lambda device: dictionary.part(device, dictionary.Size(2, 12, 10, 6, 8)).ours(),
    "coding": lambda device: coding.part(device, coding.Size(100, 2, 3, 12, 10)).ours(),
    "growth, evaluation": lambda device: growth.evaluation(device, images=8, draws=2, shifts=8)(),
    "growth, step": lambda device: growth.training_step(device, images=8, shifts=8)(),
    "growth, stage 1": lambda device: _recipe_step(growth.stage1, 2, device),
    "growth, stage 2": lambda device: _recipe_step(growth.stage2, 1, device),
    **{
        f"floors, {name}": lambda device, make=make: make("resnet8", _images(8, device), autocast("bf16", device))()
        for name, make in floors.PHASES.items()
    },
}


def stage1_part(device, bf16):
    return stage1.part(device, "resnet8", 8, bf16=bf16).ours()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_nor_do_benchmarks(meta, name):
    BENCHMARKS[name](meta)


# ------------------------------------------------------------------------------------------------- with a GPU


@GPU
def test_views_on_a_gpu_are_those_of_the_same_draws_on_the_cpu(monkeypatch):
    """Draws of a GPU's generator, carried to the CPU."""
    from datasets import views

    spec = AlignedSpec()
    shifts = ShiftSpec("rot_bmix", 0.2).functions(spec)
    copies = torch.randint(0, 256, (2, 8, 3, 32, 32), dtype=torch.uint8, generator=generator(0, "test"))
    kept = []

    def render(copies, shifts, looks, numbers, spec, batch):
        kept.append(numbers)
        return views.render_views(copies, shifts, looks, numbers, spec, batch)

    on_gpu = train_views(copies.cuda(), shifts, spec, generator(0, "test", device="cuda"), render)
    numbers = type(kept[0])(kept[0].colours.cpu(), kept[0].tries.cpu())
    looks = [[None for _ in shifts] for _ in copies]
    on_cpu = views.render_views(copies, shifts, looks, numbers, spec, 8)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-4, rtol=0)


@GPU
def test_dictionary_step_and_k_means_on_a_gpu():
    size = dictionary.Size(2, 24, 20, 16, 40)
    D, s = size.inputs(torch.device("cpu"), torch.float64)
    expected = dictionary.ours(dictionary.bank_of(D, size.steps), s)
    found = dictionary.ours(dictionary.bank_of(D.cuda(), size.steps), s.cuda())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-9, rtol=1e-9)
    x = torch.randn(1, 500, 16, generator=generator(0, "test"))
    centres = [kmeans(x.to(device), 20, generator=generator(0, "test"))[0].cpu() for device in ("cuda", "cpu")]
    a, b = (torch.cdist(x[0], c).amin(1).square().sum() for c in centres)
    assert abs(a / b - 1) < 0.02


@GPU
def test_the_whole_chain_on_a_gpu(tmp_path):
    import eval as evaluate
    import train
    import train_cocsr

    run = [*TINY, *SHIFT, "--device", "cuda", "--log_root", str(tmp_path)]
    assert not train.main([*run, "--mode", "simclr_CSI", "--epochs", "2"])
    (first,) = tmp_path.iterdir()
    assert not train_cocsr.main([*run, "--mode", "cocsr_dict", "--resume_path", str(first), "--epochs", "4"])
    (second,) = (path for path in tmp_path.iterdir() if path != first)
    assert not evaluate.main([*run, "--mode", "ood_pre_cocsr_refmix", "--load_path", str(second)])
    assert list(second.glob("result_*.json"))
