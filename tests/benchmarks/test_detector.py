"""The benchmark of detectors runs and says a share."""

from benchmarks.detector import main
from tests.detector.conftest import *  # noqa: F403


def test_the_share_of_the_backbones_speed(file, pictures, capsys):
    assert main([str(file), str(pictures / "test/good"), "--rounds", "2", "--many", "30"]) == 0
    told = capsys.readouterr().out
    assert "share of the backbone's speed: " in told and "memory grows by" in told
    assert main([str(file), str(pictures / "test/good"), "--rounds", "0"]) == 2
