"""From flags to an evaluation: what the evaluation scripts do."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from common.device import reuse_host_memory
from common.flags import Flags, build_parser, parse, pick, print_dry_run
from datasets import DATASETS, SHIFTS, ShiftSpec
from models import BACKBONES


def launch(
    argv: Sequence[str] | None, *, script: str, modes: Mapping[str, Callable[[Flags], None]], default_mode: str
) -> None:
    """Carry out the evaluation mode that the flags name, or with --dry_run say what it would be."""
    parser = build_parser(script, modes, default_mode, datasets=DATASETS, models=BACKBONES, shifts=SHIFTS)
    flags = parse(argv, parser)
    reuse_host_memory()
    if not flags.dry_run:
        modes[flags.mode](flags)
        return
    shifts = pick(ShiftSpec, flags).count
    place = Path(flags.load_path or flags.log_root)
    folder = place.parent if place.suffix in (".model", ".cocsr_model", ".safetensors") else place
    print_dry_run(flags, script=script, run_dir=folder, shifts=shifts, views_per_step=shifts * flags.ood_batch_size)
