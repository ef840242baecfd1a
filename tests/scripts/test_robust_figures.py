"""Histograms of feature distances: which results are read, what is drawn, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evals.distance import QUANTITIES
from evals.report import table_text
from scripts import robust_figures
from scripts.robust_figures import Measured, main, titled
from tests.test_commands import refused

CLASSES = {"cat": 0, "dog": 1}
SETTINGS = {"epsilon": 8 / 255, "num_steps": 10, "step_size": 0.007, "strategy": "random"}


def write(folder: Path, *, shift: float = 0.0, target=None, weights="last", trained_by=None, pairs=True, **settings):
    """A result as the evaluation writes it: values of 40 images, half of each class."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2 if target is None else np.full(20, CLASSES[target])
    columns = {"index": np.arange(len(labels)), "label": labels, "negative": np.arange(len(labels))}
    columns |= {name: rng.random(len(labels)) + shift + labels for name in QUANTITIES}
    columns["negative_l2"][3] = np.nan
    tail = ("" if target is None else f"_class_{CLASSES[target]}") + ("" if weights == "last" else f"_{weights}")
    table = f"pairs_feature_distance{tail}_toy.csv"
    facts = {
        "mode": "feature_distance",
        "dataset": "toy",
        "checkpoint": str(folder / "last.model"),
        "weights": weights,
        "target": target,
        "classes": CLASSES if target is None else {target: CLASSES[target]},
        "trained_by": {"mode": "adv_trades"} if trained_by is None else trained_by,
        "settings": SETTINGS | settings,
        "data": {"toy": {"images": 40}},
        "pairs": {"toy": table} if pairs else {},
    }
    (folder / table).write_text(table_text(columns))
    path = folder / f"result_feature_distance{tail}.json"
    path.write_text(json.dumps(facts))
    return path, columns


@pytest.fixture
def drawn(monkeypatch):
    found = []
    monkeypatch.setattr(robust_figures, "draw", lambda runs, path, **more: found.append((runs, path, more)))
    return found


def test_values_of_each_image_of_all_classes_or_of_one(tmp_path):
    _, columns = write(tmp_path / "a")
    every = Measured.of(tmp_path / "a", None)
    for name in QUANTITIES:
        np.testing.assert_array_equal(every.columns[name], columns[name])
    for target in (1, "dog"):
        one = Measured.of(tmp_path / "a", target)
        for name in QUANTITIES:
            np.testing.assert_array_equal(one.columns[name], columns[name][columns["label"] == 1])
    means = every.means()
    assert means["positive_l2"] == pytest.approx(columns["positive_l2"].mean())
    assert means["negative_l2"] == pytest.approx(np.delete(columns["negative_l2"], 3).mean())


def test_the_result_of_all_classes_of_the_last_weights_is_taken_first(tmp_path):
    paths = [write(tmp_path / "a", target="dog")[0], write(tmp_path / "a", weights="best")[0]]
    assert Measured.of(tmp_path / "a", "dog").path == paths[1] == Measured.of(tmp_path / "a", None).path
    last = write(tmp_path / "a")[0]
    assert Measured.of(tmp_path / "a", None).path == Measured.of(tmp_path / "a", 1).path == last
    assert Measured.of(paths[0], "dog").path == paths[0]
    paths[1].unlink()
    last.unlink()
    assert Measured.of(tmp_path / "a", 1).path == paths[0]


def test_runs_are_called_after_their_training(tmp_path):
    kinds = [
        {"mode": "adv_pgd", "ra": False, "anc": False},
        {"mode": "adv_trades", "ra": True, "anc": True},
        {"mode": "adv_trades"},
        {"mode": "adv_trades"},
        {},
    ]
    found = []
    for name, trained_by in zip("abcde", kinds, strict=True):
        write(tmp_path / name, trained_by=trained_by)
        found.append(Measured.of(tmp_path / name, None))
    assert list(titled(found, None)) == ["PGD", "TRADES-ANCRA", "TRADES, c", "TRADES, d", "e"]
    assert list(titled(found[:2], ["one", "two"])) == ["one", "two"]


def test_the_picture_the_table_and_what_differs(tmp_path, drawn, capsys):
    write(tmp_path / "a", trained_by={"mode": "adv_pgd"})
    write(tmp_path / "b", shift=2.0, epsilon=0.1)
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "new" / "out")]) == 0
    ((runs, path, more),) = drawn
    assert list(runs) == ["PGD", "TRADES"] and path == tmp_path / "new/out/feature_distance.png"
    assert more["title"] == "features of test images, toy, all classes: PGD-10 at 8/255, negatives random"
    out = capsys.readouterr().out
    assert "note: TRADES was measured with other epsilon than PGD" in out
    rows = {line.split("|")[1].strip(): line.split("|")[2:6] for line in out.splitlines() if line.startswith("|")}
    for name, measured in runs.items():
        assert [float(cell) for cell in rows[name]] == [round(mean, 3) for mean in measured.means().values()]
    assert float(rows["TRADES"][0]) == pytest.approx(float(rows["PGD"][0]) + 2, abs=1e-3)


def test_a_real_picture(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", trained_by={"mode": "adv_mart"})
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--target_label", "cat", "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "feature_distance_class_cat.png") as picture:
        assert picture.size[0] > 1000


def test_histograms_have_twenty_bins_and_an_area_of_one(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    seen, real = [], Axes.stairs

    def stairs(axes, density, edges, **how):
        seen.append((density, edges))
        return real(axes, density, edges, **how)

    monkeypatch.setattr(Axes, "stairs", stairs)
    write(tmp_path / "a")
    measured = Measured.of(tmp_path / "a", None)
    robust_figures.draw({"a": measured}, tmp_path / "a.png", title="")
    assert len(seen) == 8
    for (density, edges), name in zip(seen[::2], QUANTITIES, strict=True):
        values = measured.columns[name][~np.isnan(measured.columns[name])]
        assert len(density) == 20 and (edges[0], edges[-1]) == (values.min(), values.max())
        assert (density * np.diff(edges)).sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "change, more, told",
    [
        ({}, ["--target_label", "eel"], "no feature distances of class eel"),
        ({"target": "dog"}, [], "no feature distances of all classes"),
        ({"pairs": False}, [], "no values of each image: make it by eval.py --mode feature_distance --save_score"),
        ({}, ["--titles", "one", "two"], "--titles: give 1 different ones"),
        ({}, ["--out", "{folder}/a/last.model/x"], "--out: cannot write"),
    ],
)
def test_what_cannot_be_drawn_is_refused(change, more, told, tmp_path, capsys):
    write(tmp_path / "a", **change)
    (tmp_path / "a" / "last.model").write_text("")
    flags = [flag.format(folder=tmp_path) for flag in more]
    refused(capsys, main([str(tmp_path / "a"), "--out", str(tmp_path / "o"), *flags]), told)
    assert not (tmp_path / "o").exists()


def test_runs_that_are_no_results_are_refused(tmp_path, capsys):
    path, _ = write(tmp_path / "a")
    refused(capsys, main([str(tmp_path / "b")]), "b holds no feature distances")
    refused(capsys, main([str(tmp_path / "a"), str(tmp_path / "a")]), "two of them are the same")
    path.with_name("pairs_feature_distance_toy.csv").write_text("label\n1\n")
    refused(capsys, main([str(tmp_path / "a")]), "pairs_feature_distance_toy.csv cannot be read")
    path.write_text("{}")
    refused(capsys, main([str(path)]), "holds no feature distances")
