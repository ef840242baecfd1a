"""Draw t-SNE pictures of test images among training images and atoms; they are written beside the checkpoint."""

import sys
from collections.abc import Sequence

from common.errors import command


@command
def main(argv: Sequence[str] | None = None) -> None:
    from evals import TSNES
    from evals.launch import launch
    from program import SPECS

    launch(argv, script="tsne.py", modes=TSNES, specs=SPECS, default_mode="ood_pre_tsne")


if __name__ == "__main__":
    sys.exit(main())
