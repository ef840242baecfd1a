"""A detector of your own pictures: fit, score, test, show, export. `--help` lists the subcommands."""

import sys
from collections.abc import Sequence

from common.errors import command


@command
def main(argv: Sequence[str] | None = None) -> int:
    from detector.commands import run

    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
