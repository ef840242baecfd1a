"""How many epochs fit a number of minutes: `python -m scripts.length RUN ... --minutes 20 --most 220` prints it.

The speed is that of the last epoch of each run folder; of several runs the slowest counts.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError, command

# What training takes besides its steps: reading data, held-out images, checkpoints.
_REST = 0.1


def epochs_that_fit(images: int, images_per_second: float, minutes: float, most: int) -> int:
    """Epochs of so many images, at least 1."""
    return max(1, min(most, int((1 - _REST) * 60 * minutes * images_per_second / images)))


def speed_of(run: Path) -> tuple[int, float]:
    """Training images of a run, and images/s of its last epoch. Raises: UserError for what is no run with an epoch."""
    try:
        images = json.loads((run / "args.json").read_text())["data"]["images"]
        *_, last = (run / "metrics.jsonl").read_text().splitlines()
        return int(images), float(json.loads(last)["train/images_per_second"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{run} is no run that has trained an epoch") from None


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.length", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of two epochs, say")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--most", type=int, required=True, help="epochs, however fast they are")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        raise UserError(f"--minutes must be > 0, got {args.minutes:g}")
    print(min(epochs_that_fit(*speed_of(run), args.minutes, args.most) for run in args.runs))


if __name__ == "__main__":
    sys.exit(main())
