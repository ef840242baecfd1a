"""From flags to a finished run: what the training scripts do."""

import contextlib
import os
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from common.device import memory_errors, reuse_host_memory
from common.dist import World, processes, report_once
from common.errors import UserError
from common.files import disk_errors
from common.flags import Flags, Spec, build_parser, parse, print_dry_run
from common.run import NullRun, Run
from common.signals import stop_signals
from datasets import DataSource, ShiftSpec, Split, split_one_class
from datasets.pictures import loading_errors
from models import backbone_spec
from training import Mode, run_name
from training.loop import fit
from training.modes.setup import own_device
from training.recipe import Recipe


def launch(
    argv: Sequence[str] | None,
    *,
    script: str,
    modes: Mapping[str, Mode],
    specs: Iterable[type[Spec]],
    default_mode: str,
    weights: str,
    resume: str,
) -> None:
    """Carry out the run that the flags describe: look at its folder, read the data, build the recipe, train.

    weights, resume: names of the checkpoint files. A finished run is left alone, an unfinished one goes on.
    Raises: UserError before anything is written, RunStopped while training.
    """
    with report_once():
        flags = parse(argv, build_parser(script, modes, default_mode, specs))
        mode = modes[flags.mode]
        flags = flags.filled(mode.defaults)
        shifts = mode.shifts(flags)
    folder = Path(flags.log_root) / run_name(flags, mode)
    if flags.dry_run:
        if World.of(os.environ).is_main:
            views = mode.copies * shifts.count * flags.batch_size
            print_dry_run(flags, script=script, run_dir=folder, shifts=shifts.count, views_per_step=views)
        return
    reuse_host_memory()
    with processes(flags.device) as world:
        run = open_run(folder, flags, world, weights=weights, resume=resume, extensible=mode.extensible)
        if run is None:
            longer = f"; to train it for longer, --resume_path {folder} and another --suffix" if mode.extensible else ""
            print(f"{folder} is finished (epoch {flags.epochs}); --overwrite would run it anew{longer}")
            return
        recipe, split = _prepare(flags, mode, shifts, world)
        settings = {"epochs": flags.epochs, "batch_size": flags.batch_size * world.size, "seed": flags.seed}
        settings |= {"save_step": flags.save_step, "save_minutes": flags.save_minutes, "copies": mode.copies}
        with world.raise_together():
            run.open({"mode": flags.mode, "model": flags.model, "data": split.facts(recipe.data)})
        with disk_errors(folder), contextlib.closing(run), stop_signals() as stop:
            several = f", {world.size} processes" if world.size > 1 else ""
            images = f"{len(recipe.data)} images of {split.normal_title}, {shifts.count} shifts"
            run.say(f"{folder.name}: {images}, epochs up to {flags.epochs}{several}")
            with memory_errors(_remedy(flags)), loading_errors():
                fit(recipe, run, **settings, stop=stop, world=world)
            run.say(f"wrote {folder / weights}")


def open_run(
    folder: Path, flags: Flags, world: World, *, weights: str, resume: str, extensible: bool = False
) -> Run | None:
    """The run of this folder, with the state that it goes on from in all processes; None where it is finished.

    Raises: UserError for a folder that is something else.
    """
    run = None
    with world.raise_together():
        if world.is_main:
            run = Run(
                folder,
                flags,
                weights=weights,
                resume=resume,
                replace=flags.overwrite,
                processes=world.size,
                extensible=extensible,
            )
    finished, state = world.broadcast_object(None if run is None else (run.finished, run.state)) or (False, None)
    return None if finished else run or NullRun(folder, flags, state)


def _prepare(flags: Flags, mode: Mode, shifts: ShiftSpec, world: World) -> tuple[Recipe, Split]:
    """Read the data and build the recipe, with the same weights in all processes."""
    backbone = backbone_spec(flags.model)
    with world.raise_together(), memory_errors(_remedy(flags)), loading_errors():
        if flags.compile:
            _check_compiler(own_device(flags, world))
        source = DataSource.of(flags, flags.dataset, training=True)
        size, fixed = backbone.image_size, backbone.fixed_size
        split = split_one_class(flags.dataset, source, flags.one_class_idx, size, fixed=fixed)
        recipe = mode.build(flags, split, shifts, world)
    world.broadcast(recipe.model.state_dict().values())
    return recipe, split


def _check_compiler(device: torch.device) -> None:
    """Raises: UserError where what --compile makes cannot be compiled: C++ for a CPU, C for what launches on a GPU."""
    variable, usual = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    names = shlex.split(os.environ.get(variable, ""))[:1] or usual
    if not any(map(shutil.which, names)):
        raise UserError(f"--compile: no compiler ({' or '.join(names)}); install one, or leave --compile out")


def _remedy(flags: Flags) -> str:
    """Which flags make a step smaller."""
    values = flags.as_dict()
    pieces = values["micro_batch"] or values["batch_size"]
    half = f"give --micro_batch {max(1, pieces // 2)} (the gradient of the whole in pieces, batch norm by piece)"
    smaller = half if pieces > 1 else ""
    dictionary = f"lower --sr_dict_size {values['sr_dict_size']}" if values["mode"] == "cocsr_dict" else ""
    passes = f"--ood_batch_size {values['ood_batch_size']} for k-means" if values["ini_sr_dict_train"] else ""
    last = f"lower --batch_size {values['batch_size']}"
    return ", or ".join(text for text in (smaller, dictionary, passes, last) if text)
