"""Stage 1: train a network on images of one class (or of an unlabelled set). `--help` lists the flags."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.errors import command

if TYPE_CHECKING:
    from training.launch import MakeObserver, Script


def train(argv: Sequence[str] | None, script: "Script", observe: "MakeObserver | None" = None) -> None:
    """Carry out the run that the flags describe. A finished run is left alone, an unfinished one goes on.

    observe: makes what evaluates the network while it trains.
    """
    from common.dist import processes
    from common.flags import DeviceSpec
    from program import SPECS
    from training import launch

    job = launch.read_job(argv, script, SPECS)
    if launch.dry_run(job):
        return
    with processes(job.flags.of(DeviceSpec).device) as world:
        run = launch.open_run(job, world)
        if run is None:
            return
        split = launch.read_split(job.flags, world, backbone=job.mode.backbone)
        recipe = launch.build_recipe(job, split, world)
        observer = observe(job, recipe, split, world) if observe else None
        launch.train(job, run, recipe, split, world, observer)


@command
def main(argv: Sequence[str] | None = None) -> None:
    from training import STAGE1
    from training.launch import Script

    train(argv, Script("train.py", STAGE1, "simclr", "last.model", "last.resume"))


if __name__ == "__main__":
    sys.exit(main())
