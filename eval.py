"""Score test images under a trained network and report AUROC; results are written beside the checkpoint."""

import sys
from collections.abc import Sequence

from common.errors import command


@command
def main(argv: Sequence[str] | None = None) -> None:
    from evals import EVALS
    from evals.launch import launch
    from program import SPECS

    launch(argv, script="eval.py", modes=EVALS, specs=SPECS, default_mode="ood_pre")


if __name__ == "__main__":
    sys.exit(main())
