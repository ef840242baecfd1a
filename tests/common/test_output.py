"""Output that fails ends nothing: nobody reads it any more, its disk is full, its encoding lacks a letter."""

import io
import os
import subprocess
import sys

import pytest

from common.errors import UserError, command
from tests.conftest import ROOT, TINY


def started(*args: object, **settings) -> subprocess.Popen:
    # Unbuffered, nothing would be left for Python to fail over at its end.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen([sys.executable, *map(str, args)], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, **settings)


def test_a_reader_that_goes_away_ends_no_training(tmp_path):
    """As `| head -1` does."""
    args = [*TINY, "--epochs", "3", "--log_root", tmp_path]
    with started("train.py", *args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        run.stdout.readline()
        run.stdout.close()
        told = run.stderr.read()
    (folder,) = tmp_path.iterdir()
    assert run.returncode == 0 and told == b"" and "epoch 3/3" in (folder / "log.txt").read_text()


def test_a_full_disk_behind_standard_output_loses_no_evaluation(stage1, tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    shift = "--shift_trans_type rot_bmix --mix_alpha 0.2".split()
    args = [*TINY, *shift, "--load_path", stage1, "--out", tmp_path / "new"]
    with open("/dev/full", "w") as full, started("eval.py", *args, stdout=full, stderr=subprocess.PIPE) as run:
        told = run.stderr.read()
    assert run.returncode == 0 and told == b"" and (tmp_path / "new" / "result_ood_pre_CSI.json").is_file()


class Ascii(io.TextIOWrapper):
    def __init__(self):
        super().__init__(io.BytesIO(), encoding="ascii")


def test_what_an_encoding_lacks_is_escaped(monkeypatch):
    out, err = Ascii(), Ascii()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    @command
    def main(argv=None):
        print("Löffel", os.fsdecode(bytes([0xFF])))
        raise UserError(f"--data_path: {os.fsdecode(bytes([0xFE]))}.png")

    assert main() == 2
    assert out.buffer.getvalue() == b"L\\xf6ffel \\udcff\n"
    assert err.buffer.getvalue() == b"error: --data_path: \\udcfe.png\n"
    assert sys.stdout is out and sys.stderr is err


def test_without_streams_a_command_still_works(monkeypatch):
    """As under pythonw, or with both closed."""
    monkeypatch.setattr(sys, "stdout", None)
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)

    @command
    def main(argv=None):
        print("nothing")
        raise UserError("nobody reads this")

    assert main() == 2
