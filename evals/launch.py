"""From flags to an evaluation: what the evaluation scripts do."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from common.device import memory_errors, reuse_host_memory
from common.dist import World, processes, report_once
from common.files import disk_errors
from common.flags import Spec, build_parser, parse, print_dry_run
from evals import EvalMode


def launch(
    argv: Sequence[str] | None,
    *,
    script: str,
    modes: Mapping[str, EvalMode],
    specs: Iterable[type[Spec]],
    default_mode: str,
) -> None:
    """Carry out the evaluation mode that the flags name, or with --dry_run say what it would be."""
    with report_once():
        flags = parse(argv, build_parser(script, modes, default_mode, specs))
    reuse_host_memory()
    mode = modes[flags.mode]
    if not flags.dry_run:
        remedy = f"lower --ood_batch_size {flags.ood_batch_size}"
        place = Path(flags.out or flags.load_path or flags.log_root)
        with processes(flags.device) as world, memory_errors(remedy), disk_errors(place):
            mode.run(flags, world)
        return
    if not World.of(os.environ).is_main:
        return
    shifts = len(mode.evidence.shifts(flags, flags.ood_score or [flags.mode]))
    place = Path(flags.load_path or flags.log_root)
    folder = place.parent if place.suffix in (".model", ".cocsr_model", ".safetensors") else place
    print_dry_run(flags, script=script, run_dir=folder, shifts=shifts, views_per_step=shifts * flags.ood_batch_size)
