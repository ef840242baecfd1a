import json

import pytest
from PIL import Image

from common.errors import UserError
from scripts.budgets import Point, main, points, read_sweeps


def sweep(folder, minutes, means, classes=(0, 3), seeds=(0,)):
    """means: (method, mean, classes) of each row."""
    rows = [
        {"method": m, "classes": n, "mean": mean, "low": mean - 0.01, "high": mean + 0.02, "std": None, "seeds": 1}
        for m, mean, n in means
    ]
    folder.mkdir()
    facts = {"dataset": "folder", "classes": list(classes), "seeds": list(seeds), "minutes": minutes, "means": rows}
    (folder / "table.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def sweeps(tmp_path):
    return [
        sweep(tmp_path / "ten", 10.0, [("CSI", 0.7, 2), ("Rot+Trans", 0.8, 2)]),
        sweep(tmp_path / "five", 5.0, [("CSI", 0.6, 2), ("Rot+Trans", 0.75, 2), ("SimCLR", 0.5, 1)]),
    ]


def test_points_come_by_time_and_a_method_needs_all_classes(sweeps):
    found = points(read_sweeps(sweeps))
    assert list(found) == ["CSI", "Rot+Trans"]
    assert found["CSI"] == [
        Point(5.0, *map(pytest.approx, (60, 59, 62))),
        Point(10.0, *map(pytest.approx, (70, 69, 72))),
    ]
    assert list(points(read_sweeps(sweeps), ["Rot+Trans"])) == ["Rot+Trans"]
    with pytest.raises(UserError, match="--methods SimCLR: not in these tables"):
        points(read_sweeps(sweeps), ["CSI", "SimCLR"])


def test_sweeps_of_other_classes_and_folders_without_one_are_refused(sweeps, tmp_path):
    with pytest.raises(UserError, match="differ in their classes"):
        read_sweeps([*sweeps, sweep(tmp_path / "other", 5.0, [], classes=(0,))])
    with pytest.raises(UserError, match="has no table"):
        read_sweeps([tmp_path])
    with pytest.raises(UserError, match="several sweeps have 5 minutes"):
        read_sweeps([*sweeps, sweep(tmp_path / "again", 5.0, [])])
    with pytest.raises(UserError, match="no method of these sweeps"):
        points(read_sweeps([sweep(tmp_path / "begun", 5.0, [("CSI", 0.6, 1)])]))
    (tmp_path / "table.json").write_text(json.dumps({"minutes": 5.0, "means": []}))
    with pytest.raises(UserError, match="has no table"):
        read_sweeps([tmp_path])


def test_the_picture_is_drawn_and_the_numbers_are_told(sweeps, tmp_path, capsys):
    assert main([*map(str, sweeps), "--picture", str(tmp_path / "b.png")]) == 0
    told = capsys.readouterr().out
    assert "CSI: 5 min 60.0 [59.0, 62.0], 10 min 70.0 [69.0, 72.0]" in told
    assert Image.open(tmp_path / "b.png").size == (960, 600)
    assert "note: SimCLR is left out" in told
    assert main([*map(str, sweeps), "--picture", str(tmp_path / "none" / "b.png")]) == 2
    assert "--picture: cannot write" in capsys.readouterr().err
    assert main([*map(str, sweeps), "--methods", "nothing", "--picture", str(tmp_path / "c.png")]) == 2
    assert not (tmp_path / "c.png").exists()
