"""What tests of shell scripts share: a stub in place of Python that writes down what is started."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

OWN = (
    "MODELS",
    "SEEDS",
    "EPOCHS",
    "NOISE_FLAGS",
    "DATA_PATH",
    "LOG_ROOT",
    "CLASS",
    "DATASET",
    "LEVELS",
    "MINUTES",
    "ROWS",
    "WEIGHTS",
    "ATTACK_FLAGS",
    "BASE",
    "SPARSE",
    "ALPHA",
    "IMAGES",
    "MODEL",
)


def script(name: str, python: Path | str, *args: str, **env: str) -> subprocess.CompletedProcess:
    """Run scripts/<name>.sh with `python` in place of the interpreter."""
    kept = {key: value for key, value in os.environ.items() if key not in OWN}
    line = ["bash", str(ROOT / f"scripts/{name}.sh"), *args]
    return subprocess.run(line, env=kept | {"PYTHON": str(python)} | env, capture_output=True, text=True)


@pytest.fixture
def commands(tmp_path):
    """What a script starts: lists of arguments, as a stub in place of Python writes them down. It says that 33 epochs
    fit."""
    stub, seen = tmp_path / "python", tmp_path / "seen"
    asked = '[ "$2" != scripts.length ] || echo 33'
    stub.write_text(f"#!/bin/sh\n{{ printf '%s\\0' \"$@\"; printf '\\n'; }} >>'{seen}'\n{asked}\n")
    stub.chmod(0o755)

    def run(name: str, *args: str, **env: str) -> list[list[str]]:
        seen.unlink(missing_ok=True)
        done = script(name, stub, *args, LOG_ROOT=str(tmp_path / "my logs"), **env)
        assert done.returncode == 0, done.stderr
        return [line.split("\0")[:-1] for line in seen.read_text().splitlines()] if seen.exists() else []

    return run
