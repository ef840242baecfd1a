"""From flags to written results: what the evaluation scripts do."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from common.device import memory_errors, reuse_host_memory
from common.dist import World, processes, report_once
from common.files import disk_errors
from common.flags import DeviceSpec, Flags, RunSpec, Spec, WeightsSpec, build_parser, parse, print_dry_run
from datasets import one_class
from datasets.views import PassSpec
from evals import Eval, mode_of_run
from evals.specs import ImagesSpec, PlaceSpec


def launch(
    argv: Sequence[str] | None,
    *,
    script: str,
    modes: Mapping[str, Eval],
    specs: Iterable[type[Spec]],
    default_mode: str,
) -> None:
    """Carry out the evaluation that the flags name, or with --dry_run print what it would be.

    default_mode: where no --mode is given and the training mode of --load_path is not known.
    """
    with report_once():
        flags = parse(argv, build_parser(script, modes, default_mode, specs))
        World.of(os.environ)  # What is wrong with the launcher comes first.
        load_path = flags.of(WeightsSpec, only=["load_path"]).load_path
        flags = flags.filled({"mode": mode_of_run(modes, load_path) or default_mode})
        flags = one_class.with_table(flags)
        row = modes[flags.mode]
        flags = flags.filled(row.defaults)
        only_look = flags.of(RunSpec, only=["dry_run"]).dry_run
        # A dry run may name weights that are yet to be trained.
        if not only_look or (load_path and Path(load_path).exists()):
            flags = row.inherited(flags)
    if only_look:
        if World.of(os.environ).is_main:
            _dry_run(flags, script, row)
        return
    reuse_host_memory()
    place = Path(flags.of(PlaceSpec).out or load_path or "")
    remedy = f"lower --ood_batch_size {flags.as_dict()['ood_batch_size']}"
    with processes(flags.of(DeviceSpec, only=("device",)).device) as world, memory_errors(remedy), disk_errors(place):
        evaluate(flags, row, world)


def evaluate(flags: Flags, row: Eval, world: World) -> None:
    """Load, measure, write. Every rank measures; the main rank writes."""
    begun = time.monotonic()
    with world.raise_together():
        trained = row.load(flags, world)
    results = row.measure(trained)
    if ImagesSpec in row.specs:
        flags.of(ImagesSpec)  # It has an effect, though the writer reads it later.
    for line in flags.unread_notes():
        print(line)
    for result in results:
        if world.is_main:
            row.write(result, trained, begun)


def _dry_run(flags: Flags, script: str, row: Eval) -> None:
    shifts = row.views(flags)
    load_path = flags.of(WeightsSpec, only=("load_path",)).load_path
    place = Path(load_path or flags.of(RunSpec, only=("log_root",)).log_root)
    folder = place.parent if place.suffix in (".model", ".cocsr_model", ".safetensors") else place
    print_dry_run(
        flags, script=script, run_dir=folder, shifts=shifts, views_per_step=shifts * flags.of(PassSpec).ood_batch_size
    )
