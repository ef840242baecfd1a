"""From flags to a finished run: what the training scripts do."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from common.device import memory_errors, reuse_host_memory
from common.files import disk_errors
from common.flags import Flags, Tables, build_parser, not_negative, parse, print_dry_run, run_name
from common.run import Run
from datasets import DATASETS, SHIFTS, DataSource, split_one_class
from datasets.outliers import OUTLIERS
from models import BACKBONES, backbone_spec
from training import Mode
from training.loop import fit


def launch(
    argv: Sequence[str] | None,
    *,
    script: str,
    modes: Mapping[str, Mode],
    default_mode: str,
    weights: str,
    resume: str,
) -> None:
    """Carry out the run that the flags describe: look at its folder, read the data, build the recipe, train.

    weights, resume: names of the checkpoint files. A finished run is left alone, an unfinished one goes on.
    Raises: UserError before anything is written, RunStopped while training.
    """
    flags = parse(argv, build_parser(script, modes, default_mode, Tables(DATASETS, OUTLIERS, BACKBONES, SHIFTS)))
    reuse_host_memory()
    not_negative(save_minutes=flags.save_minutes)
    mode = modes[flags.mode]
    shifts = mode.shifts(flags)
    folder = Path(flags.log_root) / run_name(flags)
    if flags.dry_run:
        views = mode.copies * shifts.count * flags.batch_size
        print_dry_run(flags, script=script, run_dir=folder, shifts=shifts.count, views_per_step=views)
        return
    run = Run(folder, flags, weights=weights, resume=resume, replace=flags.overwrite)
    if run.finished:
        print(f"{folder} is finished (epoch {flags.epochs}); --overwrite would run it anew")
        return
    backbone = backbone_spec(flags.model)
    split = split_one_class(
        flags.dataset,
        DataSource.of(flags, flags.dataset, training=True),
        flags.one_class_idx,
        backbone.image_size,
        fixed=backbone.fixed_size,
    )
    with memory_errors(_remedy(flags)):
        recipe = mode.build(flags, split, shifts)
    settings = {"epochs": flags.epochs, "batch_size": flags.batch_size, "seed": flags.seed}
    settings |= {"save_step": flags.save_step, "save_minutes": flags.save_minutes, "copies": mode.copies}
    run.open()
    with disk_errors(folder), contextlib.closing(run), stop_signal() as stop:
        run.say(f"{folder.name}: {len(recipe.data)} images, {shifts.count} shifts, epochs up to {flags.epochs}")
        with memory_errors(_remedy(flags)):
            fit(recipe, run, **settings, stop=stop)
        run.say(f"wrote {run.weights}")


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come, which clusters send some time before they kill. Outside the main thread: never."""
    asked: list[int] = []
    own = os.getpid()

    def ask(number: int, frame: object) -> None:
        if os.getpid() == own:
            asked.append(number)
        else:  # a process that loads pictures, and that only copied this handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    try:
        before = signal.signal(signal.SIGTERM, ask)
    except ValueError:
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, before)


def _remedy(flags: Flags) -> str:
    """Which flags make a step smaller."""
    values = flags.as_dict()
    pieces = values["micro_batch"] or values["batch_size"]
    smaller = f"give --micro_batch {max(1, pieces // 2)} (the same gradient in smaller pieces)" if pieces > 1 else ""
    dictionary = f"lower --sr_dict_size {values['sr_dict_size']}" if values["mode"] == "cocsr_dict" else ""
    passes = f"--ood_batch_size {values['ood_batch_size']} for k-means" if values["ini_sr_dict_train"] else ""
    last = f"lower --batch_size {values['batch_size']}"
    return ", or ".join(text for text in (smaller, dictionary, passes, last) if text)
