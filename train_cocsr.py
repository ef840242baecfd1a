"""Stage 2: learn one sparse dictionary per shift on the frozen features of a stage-1 run (`--resume_path`)."""

import sys
from collections.abc import Sequence

from common.errors import command


@command
def main(argv: Sequence[str] | None = None) -> None:
    from program import SPECS
    from training import STAGE2
    from training.launch import launch

    launch(
        argv,
        script="train_cocsr.py",
        modes=STAGE2,
        specs=SPECS,
        default_mode="cocsr_dict",
        weights="last.cocsr_model",
        resume="last.cocsr_resume",
    )


if __name__ == "__main__":
    sys.exit(main())
