"""Stage 1: train a network on images of one class (or of an unlabelled set). `--help` lists the flags."""

import sys
from collections.abc import Sequence

from common.errors import command


@command
def main(argv: Sequence[str] | None = None) -> None:
    from program import SPECS
    from training import STAGE1
    from training.launch import launch

    launch(
        argv,
        script="train.py",
        modes=STAGE1,
        specs=SPECS,
        default_mode="simclr",
        weights="last.model",
        resume="last.resume",
    )


if __name__ == "__main__":
    sys.exit(main())
