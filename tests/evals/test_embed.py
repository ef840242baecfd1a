"""What t-SNE pictures show: which images in which colour, which shift, and atoms among them."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import tsne
from common.errors import RunStopped
from common.files import save_tensors
from datasets import DataSource, split_one_class
from evals import embed
from evals.extract import Extraction
from evals.report import class_styles, legend_columns
from models.checkpoint import build_net
from tests.conftest import SHIFT, TINY
from tests.test_commands import refused


@pytest.fixture
def drawn(stage2, tmp_path, monkeypatch):
    """Groups of the pictures of a mode, by shift, and the outputs of test images and training images."""

    def draw(mode: str, *more: str) -> tuple[list[dict[str, np.ndarray]], dict, dict]:
        pictures, outputs = [], []
        shutil.copytree(stage2, tmp_path / "run", dirs_exist_ok=True)
        monkeypatch.setattr(embed, "project", lambda groups, *_: pictures.append(groups) or {})
        monkeypatch.setattr("evals.report.draw_points", lambda *args, **facts: None)
        real = Extraction.outputs
        monkeypatch.setattr(Extraction, "outputs", lambda *args: outputs.append(real(*args)) or outputs[-1])
        args = [*TINY, *SHIFT, "--invert_sr_feature_norm", "--mode", mode, "--load_path", str(tmp_path / "run")]
        assert tsne.main([*args, "--device", "cpu", *more]) == 0
        train, test = outputs
        return pictures, train, test

    return draw


def test_groups_are_normal_and_anomalous_images_under_each_shift(drawn):
    split = split_one_class("digits", DataSource(image_size=8), 3, 8)
    normal = split.normal(split.test().labels)
    pictures, train, test = drawn("ood_pre_tsne")
    assert len(pictures) == 5
    for k, groups in enumerate(pictures):
        assert list(groups) == ["anomalous test", "normal training", "normal test"]
        expected = [test["h"][~normal, k], train["h"][:, k], test["h"][normal, k]]
        assert [len(x) for x in expected] == [538, 122, 61]
        assert all(
            np.array_equal(groups[name], x) for name, x in zip(groups, map(torch.Tensor.numpy, expected), strict=True)
        )


def test_atoms_lie_among_the_features_of_their_own_shift(drawn, stage2):
    pictures, _, _ = drawn("ood_pre_tsne_dict")
    dictionary = torch.load(stage2 / "last.cocsr_model", weights_only=True)["sr_nets.dictionary"]
    for k, groups in enumerate(pictures):
        features = np.concatenate([x for name, x in groups.items() if name != "atoms"])
        mean_norm = np.linalg.norm(features, axis=1).mean()
        atoms = torch.nn.functional.normalize(dictionary[k], dim=0).T.numpy() * mean_norm
        np.testing.assert_allclose(groups["atoms"], atoms, rtol=1e-4, atol=1e-7)


def test_no_more_points_than_are_asked_for_the_same_by_seed(drawn):
    first, again, other = (drawn("ood_pre_tsne", "--tsne_points", "20", "--seed", s)[0][0] for s in ("0", "0", "1"))
    assert [len(x) for x in first.values()] == [20, 20, 20]
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["anomalous test"], other["anomalous test"])


def test_points_that_are_all_equal_end_in_one_line():
    """scikit-learn's t-SNE ends the interpreter by a segmentation fault."""
    groups = {"normal test": np.zeros((6, 4)), "normal training": np.zeros((3, 4))}
    with pytest.raises(RunStopped, match="shift 0: all 9 points are equal.*--sr_lambda"):
        embed.project(groups, "shift 0")


# ------------------------------------------------------------------------------------------- by class, and by UMAP


@pytest.fixture
def classifier(tmp_path) -> Path:
    """A run folder with a network of ten classes."""
    net = build_net("ra_classifier", "resnet8", n_classes=10, seed=0)
    flags = {"mode": "adv_trades", "dataset": "digits", "image_size": 8, "model": "resnet8"}
    (tmp_path / "run").mkdir()
    save_tensors(tmp_path / "run" / "last.model", net.state_dict(), facts={"flags": flags, "epoch": 1})
    return tmp_path / "run"


def draw(run: Path, *more: str) -> int:
    return tsne.main(["--mode", "feature_umap", "--load_path", str(run), "--device", "cpu", *more])


def facts_of(run: Path) -> dict:
    (picture,) = run.glob("*.png")
    with Image.open(picture) as opened:
        return json.loads(opened.info["Comment"])


@pytest.fixture
def umap(monkeypatch):
    """In the place of umap-learn: keeps what it is asked for, and lets the first two features through."""
    asked = []

    class UMAP:
        def __init__(self, **settings):
            asked.append(settings)

        def fit_transform(self, points):
            asked.append(points)
            return points[:, :2]

    package = ModuleType("umap")
    package.UMAP = UMAP  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "umap", package)
    return asked


@pytest.fixture
def no_umap(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)


def test_the_features_of_test_images_by_class_by_umap_with_the_published_settings(classifier, umap, monkeypatch):
    drawn = []
    monkeypatch.setattr("evals.report.draw_points", lambda groups, *_, **more: drawn.append((groups, more)))
    assert draw(classifier) == 0
    settings, points = umap
    assert settings == {
        "n_neighbors": 12,
        "min_dist": 0.01,
        "metric": "correlation",
        "densmap": True,
        "dens_lambda": 1.5,
        "random_state": 0,
        "n_jobs": 1,
    }
    test = split_one_class("digits", DataSource(image_size=8), None, 8).test()
    net = build_net("ra_classifier", "resnet8", n_classes=10, seed=0).eval()
    with torch.no_grad():
        features = net.features(test.batch(torch.arange(len(test)))).numpy()
    expected = np.concatenate([features[test.labels == label] for label in range(10)])
    np.testing.assert_allclose(points, expected, atol=1e-5)
    ((groups, more),) = drawn
    assert list(groups) == [str(label) for label in range(10)]
    for label in range(10):
        mine = features[test.labels == label]
        np.testing.assert_allclose(np.stack([groups[str(label)][axis] for axis in "xy"], 1), mine[:, :2], atol=1e-5)
    assert more["title"] == "digits, test images by class, penultimate, UMAP"
    assert len({(style["c"], style["marker"]) for style in more["styles"]}) == 10


def test_t_sne_draws_where_umap_is_not_installed_and_the_picture_says_so(classifier, no_umap, capsys):
    assert draw(classifier, "--tsne_points", "5") == 0
    facts = facts_of(classifier)
    assert (facts["projection"], facts["by_class"], facts["settings"]["projection"]) == ("t-SNE", True, "auto")
    assert list(facts["data"]) == ["digits"]
    out = classifier / "asked"
    refused(capsys, draw(classifier, "--projection", "umap", "--out", str(out)), "--projection umap", "pip install")
    assert not out.exists()


def test_other_pictures_are_by_t_sne_unless_umap_is_asked_for(stage1, umap, tmp_path):
    args = [*TINY, *SHIFT, "--mode", "ood_pre_tsne", "--load_path", str(stage1), "--tsne_points", "4"]
    assert tsne.main([*args, "--out", str(tmp_path / "a")]) == 0 and not umap
    assert tsne.main([*args, "--out", str(tmp_path / "b"), "--projection", "umap"]) == 0 and len(umap) == 10
    assert umap[0]["n_neighbors"] == 11  # of 12 points
    found = []
    for name in "ab":
        with Image.open(tmp_path / name / "ood_pre_tsne_penultimate_shift0.png") as picture:
            found.append(json.loads(picture.info["Comment"]))
    assert [facts["projection"] for facts in found] == ["t-SNE", "UMAP"]
    # As in pictures from before the flag.
    assert "projection" not in found[0]["settings"] and found[1]["settings"]["projection"] == "umap"


@pytest.mark.parametrize("count", [2, 10, 40, 41, 200])
def test_classes_are_told_apart_by_colour_and_marker_or_lie_on_a_scale(count):
    styles = class_styles(count)
    looks = {(str(style.get("c", style.get("color"))), style["marker"]) for style in styles}
    assert len(styles) == len(looks) == count
    assert all(("color" in style) == (count > 40) for style in styles)


def test_a_legend_is_no_wider_than_its_picture():
    assert legend_columns(["anomalous test (538)", "normal training (122)", "normal test (61)", "atoms (24)"]) == 4
    assert [legend_columns(["x" * length] * 20) for length in (5, 20, 40, 400)] == [5, 4, 2, 1]


def test_umap_itself_tells_clusters_apart():
    pytest.importorskip("umap")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 6)) * 9
    groups = {str(n): (centres[n] + rng.normal(size=(30, 6))).astype(np.float32) for n in range(3)}
    projection = embed.projection_of("auto")
    found = embed.project(groups, "clusters", projection.fit)
    again = embed.project(groups, "clusters", projection.fit)
    assert projection.title == "UMAP" and all(np.array_equal(found[n]["x"], again[n]["x"]) for n in groups)
    means = np.array([[found[n]["x"].mean(), found[n]["y"].mean()] for n in groups])
    spread = max(found[n]["x"].std() + found[n]["y"].std() for n in groups)
    gaps = np.linalg.norm(means[[0, 1, 2]] - means[[1, 2, 0]], axis=1)
    assert gaps.min() > 2 * spread
