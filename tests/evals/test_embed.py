"""What t-SNE pictures show: which images in which colour, which shift, and atoms among them."""

import shutil

import numpy as np
import pytest
import torch

import tsne
from common.errors import RunStopped
from evals import embed
from evals.extract import Extraction
from tests.conftest import SHIFT, TINY


@pytest.fixture
def drawn(stage2, tmp_path, monkeypatch):
    """Groups of the pictures of a mode, by shift, and the outputs of test images and training images."""

    def draw(mode: str, *more: str) -> tuple[list[dict[str, np.ndarray]], dict, dict]:
        pictures, outputs = [], []
        shutil.copytree(stage2, tmp_path / "run", dirs_exist_ok=True)
        monkeypatch.setattr(embed, "project", lambda groups, title: pictures.append(groups) or {})
        monkeypatch.setattr("evals.report.draw_points", lambda *args, **facts: None)
        real = Extraction.outputs
        monkeypatch.setattr(Extraction, "outputs", lambda *args: outputs.append(real(*args)) or outputs[-1])
        args = [*TINY, *SHIFT, "--invert_sr_feature_norm", "--mode", mode, "--load_path", str(tmp_path / "run")]
        assert tsne.main([*args, "--device", "cpu", *more]) == 0
        train, test = outputs
        return pictures, train, test

    return draw


def test_groups_are_normal_and_anomalous_images_under_each_shift(drawn):
    from datasets import DataSource, split_one_class

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
