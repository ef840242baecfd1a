"""Stage 2: learn one sparse dictionary per shift on the frozen features of a stage-1 run (`--resume_path`)."""

import sys
from collections.abc import Sequence

from common.errors import command
from common.flags import parse
from datasets import DATASETS, SHIFTS
from evals.scores import SCORES
from models import BACKBONES
from training import STAGE2
from training.launch import launch


@command
def main(argv: Sequence[str] | None = None) -> None:
    tables = {"datasets": DATASETS, "models": BACKBONES, "shifts": SHIFTS, "scores": SCORES}
    flags = parse(argv, script="train_cocsr.py", modes=STAGE2, default_mode="cocsr_dict", **tables)
    launch(flags, script="train_cocsr.py", modes=STAGE2, weights="last.cocsr_model", resume="last.cocsr_resume")


if __name__ == "__main__":
    sys.exit(main())
