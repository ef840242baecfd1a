"""The benchmark of detectors runs and says a share."""

from benchmarks.detector import main
from tests.detector.conftest import *  # noqa: F403


def test_the_share_of_the_backbones_speed(file, pictures, capsys):
    assert main([str(file), str(pictures / "test/good"), "--rounds", "2", "--many", "30"]) == 0
    told = capsys.readouterr().out
    assert "share that the detector reaches" in told and "memory grows by" in told
    for name in ("files to scores", "backbone alone, as it comes", "backbone alone, channels last"):
        assert name in told
    assert main([str(file), str(pictures / "test/good"), "--rounds", "0"]) == 2
