"""Parts to try a detector on."""

import numpy as np
import pytest
from PIL import Image

from scripts import example_parts
from scripts.example_parts import DEFECTS, draw, main


def test_parts_are_the_same_each_time_and_defects_differ(tmp_path, monkeypatch, capsys):
    sets = (("train/good", 2, ""), *((f"test/{defect}", 2, defect) for defect in DEFECTS))
    monkeypatch.setattr(example_parts, "_SETS", sets)
    assert main([str(tmp_path / "a")]) == main([str(tmp_path / "b")]) == 0
    files = sorted((tmp_path / "a").rglob("*.png"))
    assert len(files) == 8 and "8 pictures" in capsys.readouterr().out
    assert all(f.read_bytes() == (tmp_path / "b" / f.relative_to(tmp_path / "a")).read_bytes() for f in files)
    assert main([str(tmp_path / "a")]) == 2 and "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_a_small_place_that_differs(defect):
    good, bad = (np.asarray(draw(np.random.default_rng(1), d), dtype=float) for d in ("", defect))
    assert good.shape == (256, 256) and Image.fromarray(good).size == (256, 256)
    assert 0.0005 < (np.abs(good - bad) > 25).mean() < 0.05
