"""From flags to written results: what the evaluation scripts do."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.device import memory_errors, reuse_host_memory
from common.dist import World, processes, report_once
from common.files import disk_errors
from common.flags import Flags, Tables, build_parser, parse, pick, print_dry_run
from datasets import DATASETS, SHIFTS
from datasets.outliers import OUTLIERS
from evals import Eval, default_mode
from models import BACKBONES


def launch(argv: Sequence[str] | None, *, script: str, evals: Mapping[str, Eval], usual: str) -> None:
    """Carry out the evaluation that the flags name, or with --dry_run print what it would be.

    usual: the mode where no --mode is given and the training of --load_path is not known.
    """
    with report_once():
        flags = parse(argv, build_parser(script, evals, usual, Tables(DATASETS, OUTLIERS, BACKBONES, SHIFTS)))
        flags = flags.filled({"mode": default_mode(evals, flags.load_path, usual)})
    row = evals[flags.mode]
    if flags.dry_run:
        if World.of(os.environ).is_main:
            _dry_run(flags, script, row)
        return
    reuse_host_memory()
    place = Path(flags.out or flags.load_path or flags.log_root)
    remedy = f"lower --ood_batch_size {flags.ood_batch_size}"
    with processes(flags.device) as world, memory_errors(remedy), disk_errors(place):
        evaluate(flags, row, world)


def evaluate(flags: Flags, row: Eval, world: World) -> None:
    """Load, measure, write. Every rank measures; the main rank writes."""
    begun = time.monotonic()
    with world.raise_together():
        trained = row.load(flags, world)
    results = row.measure(trained)
    for spec in row.specs:
        pick(spec, flags)
    for line in flags.unread_notes():
        print(line)
    for result in results:
        if world.is_main:
            row.write(result, trained, begun)


def _dry_run(flags: Flags, script: str, row: Eval) -> None:
    shifts = row.views(flags)
    place = Path(flags.load_path or flags.log_root)
    folder = place.parent if place.suffix in (".model", ".cocsr_model", ".safetensors") else place
    print_dry_run(flags, script=script, run_dir=folder, shifts=shifts, views_per_step=shifts * flags.ood_batch_size)
