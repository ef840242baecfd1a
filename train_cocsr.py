"""Stage 2: learn one sparse dictionary per shift on the frozen features of a stage-1 run (`--resume_path`)."""

import sys
from collections.abc import Sequence

from common.errors import command
from train import train


@command
def main(argv: Sequence[str] | None = None) -> None:
    from training import STAGE2
    from training.launch import Script

    train(argv, Script("train_cocsr.py", STAGE2, "cocsr_dict", "last.cocsr_model", "last.cocsr_resume"))


if __name__ == "__main__":
    sys.exit(main())
