"""The parts of a training script, in the order in which `train.py` uses them: flags, run, data, recipe, training."""

import contextlib
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision.utils  # noqa: F401  Now, on all ranks, and not on the main one alone when it shows views.

from common.device import memory_errors, reuse_host_memory
from common.dist import World, report_once
from common.errors import UserError
from common.files import disk_errors
from common.flags import Flags, RunSpec, Spec, WeightsSpec, build_parser, parse, print_dry_run
from common.run import NullRun, Run, epoch_of, recorded_flags
from common.signals import stop_signals
from datasets import Split, one_class
from datasets.pictures import loading_errors
from datasets.views import PassSpec
from models import ModelSpec, model_size
from models.checkpoint import find_weights, recorded_sizes
from models.sparse.dictionary import SparseSpec
from training import Mode, run_name
from training.keeper import Observer
from training.loop import fit
from training.micro_batch import MicroBatchSpec
from training.modes.setup import own_device
from training.named import named, told
from training.optim import LengthSpec
from training.recipe import Recipe
from training.specs import CompileSpec, StepSpec


class Script(NamedTuple):
    """A training script. modes: its table. weights, resume: names of the checkpoint files in a run folder."""

    name: str
    modes: Mapping[str, Mode]
    default_mode: str
    weights: str
    resume: str


class Job(NamedTuple):
    """What the flags ask for. folder: of the run. recorded: flags of the weights that the mode starts from."""

    script: Script
    flags: Flags
    mode: Mode
    folder: Path
    recorded: Mapping[str, Any]


# (job, recipe, split, world) -> an evaluation while training runs.
MakeObserver = Callable[[Job, Recipe, Split, World], Observer]


def read_job(argv: Sequence[str] | None, script: Script, specs: Iterable[type[Spec]]) -> Job:
    """Parse the command line. A flag that was not given has the value of --recipe or else the mode's default, else what
    the weights that the mode starts from have recorded, where its spec says so, else its own default.

    Raises: UserError for flags that do not parse, or that contradict the weights.
    """
    with report_once():
        own = [spec for mode in script.modes.values() for spec in mode.specs]
        flags = parse(argv, build_parser(script.name, script.modes, script.default_mode, [*own, *specs]))
        flags, recipe = named(flags, script.modes)
        mode = script.modes[flags.mode]
        flags = one_class.with_table(flags)
        flags, recorded = _inherited(flags, mode)
        flags = flags.filled({**mode.defaults, **recipe})
        flags = flags.filled({"epochs": mode.length(flags)}) if mode.length else flags
        mode.shifts(flags)
        folder = Path(flags.of(RunSpec, only=["log_root"]).log_root) / run_name(flags, mode)
    reuse_host_memory()
    return Job(script, flags, mode, folder, recorded)


def _inherited(flags: Flags, mode: Mode) -> tuple[Flags, Mapping[str, Any]]:
    """The flags with what the weights that the mode starts from have recorded, and that."""
    start = mode.start
    path = getattr(flags.of(WeightsSpec, only=[start.flag]), start.flag) if start else None
    # A dry run may name weights that are yet to be trained.
    if start is None or not path or (flags.of(RunSpec, only=["dry_run"]).dry_run and not Path(path).exists()):
        return flags, {}
    file = find_weights(path, start.files, flag=start.flag)
    recorded = recorded_flags(file)
    flags = flags.inherited(recorded, file, flag=start.flag)
    if start.more_epochs is not None:
        flags = flags.filled({"epochs": (epoch_of(file, flag=start.flag) or 0) + start.more_epochs})
    return flags, recorded


def dry_run(job: Job) -> bool:
    """With --dry_run, print what would run as one JSON object. Returns: whether that was all that was asked for."""
    if not job.flags.of(RunSpec, only=["dry_run"]).dry_run:
        return False
    if World.of(os.environ).is_main:
        shifts = job.mode.shifts(job.flags).count
        views = job.mode.views(job.flags) * shifts * job.flags.of(StepSpec).batch_size
        print_dry_run(job.flags, script=job.script.name, run_dir=job.folder, shifts=shifts, views_per_step=views)
    return True


def open_run(job: Job, world: World) -> Run | None:
    """The run of the job's folder, with the state that it goes on from, on all ranks; None where it is finished.

    Raises: UserError for a folder that is something else.
    """
    run, mode = None, job.mode
    with world.raise_together():
        if world.is_main:
            run = Run(
                job.folder,
                job.flags,
                weights=job.script.weights,
                resume=job.script.resume,
                replace=job.flags.of(RunSpec, only=["overwrite"]).overwrite,
                processes=world.size,
                extensible=mode.extensible,
            )
    finished, state = world.broadcast_object(None if run is None else (run.finished, run.state)) or (False, None)
    if not finished:
        return run or NullRun(job.folder, job.flags, state)
    longer = f"; to train it for longer, --resume_path {job.folder} and another --suffix" if mode.extensible else ""
    assert state is not None
    print(f"{job.folder} is finished (epoch {state['epoch']}); --overwrite would run it anew{longer}")
    if run and run.moved:
        print(f"note: {', '.join(run.moved)}: not read, and not compared; for other data give another --suffix")
    return None


def read_split(flags: Flags, world: World, *, backbone: bool = True) -> Split:
    """The data set and what of it is normal. backbone: whether that of --model decides the size of images.

    Raises: UserError on all ranks where one has an error.
    """
    with world.raise_together(), loading_errors():
        if flags.of(CompileSpec).compile:
            _check_compiler(own_device(flags, world))
        size, fixed = model_size(flags, backbone=backbone)
        return one_class.read_split(flags, training=True, model_size=size, fixed=fixed)


def build_recipe(job: Job, split: Split, world: World) -> Recipe:
    """What is trained, with the same weights on all ranks."""
    with world.raise_together(), memory_errors(_remedy(job)), loading_errors():
        recipe = job.mode.build(job.flags, split, world)
    world.broadcast(recipe.model.state_dict().values())
    if recipe.average is not None:
        world.broadcast(recipe.result.state_dict().values())
    return recipe


def train(job: Job, run: Run, recipe: Recipe, split: Split, world: World, observer: Observer | None = None) -> None:
    """Open the run and train the recipe in it.

    Raises: UserError before anything is written, RunStopped while training.
    """
    flags, folder = job.flags, job.folder
    steps, epochs = flags.of(StepSpec), flags.of(LengthSpec).epochs
    settings: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": steps.batch_size * world.size,
        "seed": flags.seed,
    }
    settings |= {"save_step": steps.save_step, "save_minutes": steps.save_minutes}
    with world.raise_together():
        run.open(_facts(job, split, recipe))
    with disk_errors(folder), contextlib.closing(run), stop_signals() as stop:
        shifts = job.mode.shifts(flags).count
        kinds = [f"{len(recipe.data)} {'rows' if split.spec.table else 'images'} of {split.title}"]
        kinds += [f"{shifts} shifts"] if shifts > 1 else []
        kinds += [f"epochs up to {epochs}"] + ([f"{world.size} processes"] if world.size > 1 else [])
        run.say(f"{folder.name}: {', '.join(kinds)}")
        if (line := told(flags, job.mode.defaults)) is not None:
            run.say(line)
        for name, (there, here) in flags.differences(job.recorded).items():
            run.say(f"note: the weights to start from were trained with --{name} {there}, this run has {here}")
        with memory_errors(_remedy(job)), loading_errors():
            fit(recipe, run, **settings, stop=stop, observer=observer, world=world)
        run.say(f"wrote {folder / job.script.weights}")


def _facts(job: Job, split: Split, recipe: Recipe) -> dict[str, object]:
    """What weights say of their origin."""
    flags = job.flags
    model = {"model": flags.of(ModelSpec, only=["model"]).model} if job.mode.backbone else {}
    # Sizes that came with weights to start from are not in the flags.
    sizes = {name: size for name, size in recorded_sizes(recipe.model).items() if name in flags.as_dict()}
    recorded = {**flags.recorded(), **sizes, **recipe.recorded}
    return {"mode": recorded["mode"], **model, "data": split.facts(recipe.data), "flags": recorded}


def _check_compiler(device: torch.device) -> None:
    """Raises: UserError where what --compile makes cannot be compiled: C++ for a CPU, C for what launches on a GPU."""
    variable, usual = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    names = shlex.split(os.environ.get(variable, ""))[:1] or usual
    if not any(map(shutil.which, names)):
        raise UserError(f"--compile: no compiler ({' or '.join(names)}); install one, or leave --compile out")


def _remedy(job: Job) -> str:
    """Which flags make a step smaller."""
    values, specs = job.flags.as_dict(), job.mode.specs
    images = values["micro_batch"] or values["batch_size"]
    half = f"give --micro_batch {max(1, images // 2)} (the gradient of the whole batch, batch norm by micro-batch)"
    smaller = half if images > 1 and MicroBatchSpec in specs else ""
    dictionary = f"lower --sr_dict_size {values['sr_dict_size']}" if SparseSpec in specs else ""
    passes = (
        f"--ood_batch_size {values['ood_batch_size']} for k-means"
        if PassSpec in specs and values["ini_sr_dict_train"]
        else ""
    )
    last = f"lower --batch_size {values['batch_size']}"
    return ", or ".join(text for text in (smaller, dictionary, passes, last) if text)
