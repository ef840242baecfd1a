"""Fitting: what is held out, what is chosen, what is refused."""

import shutil

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from detector import patches
from detector.card import promise
from detector.detector import Detector
from detector.fitting import SCRATCH, fit
from detector.patches import METHODS
from tests.detector.conftest import BACKBONE, spec_of, stripes


def good(pictures):
    return sorted((pictures / "train/good").iterdir())


def test_pictures_that_calibrate_are_not_fitted(pictures, backbone_file):
    found, held = fit(good(pictures), spec_of(backbone_file))
    assert found.config["normal"] == {"source": "", "pictures": 40, "fitted": 24, "copies": 0}
    assert len(found.calibration) == len(held) == 16
    assert (found.score_samples(held) == found.calibration).all()


def test_names_and_order_change_nothing(pictures, backbone_file, tmp_path, fitted):
    renamed = [shutil.copy(path, tmp_path / f"{99 - i}.png") for i, path in enumerate(good(pictures))]
    found, _ = fit(sorted(map(type(tmp_path), renamed)), spec_of(backbone_file))
    assert sorted(found.calibration) == pytest.approx(sorted(fitted.calibration), abs=1e-4)


def test_copies_are_on_one_side(pictures, backbone_file, tmp_path, capsys):
    paths = good(pictures)
    copies = [shutil.copy(paths[0], tmp_path / f"{i}.png") for i in range(5)]
    found, held = fit([*paths, *map(type(tmp_path), copies)], spec_of(backbone_file))
    assert "5 of 45 pictures are copies" in capsys.readouterr().out
    inside = [path for path in held if path in [paths[0], *map(type(tmp_path), copies)]]
    assert len(inside) in (0, 6) and found.config["normal"]["copies"] == 5


def test_folds_calibrate_by_all_pictures_and_promise_less(pictures, backbone_file):
    found, held = fit(good(pictures), spec_of(backbone_file, folds=4))
    assert len(found.calibration) == 40 and sorted(held) == good(pictures)
    assert found.config["normal"]["fitted"] == 40 and "cross-conformal" in promise(found)
    assert "in expectation" in promise(found)


@pytest.mark.parametrize("method", [*METHODS, "gaussians pooled_knn"])
def test_every_method_finds_holes_and_comes_back_from_its_file(method, pictures, backbone_file, tmp_path):
    found, _ = fit(good(pictures), spec_of(backbone_file, method=tuple(method.split())))
    found.save(tmp_path / "x.detector")
    loaded = Detector.load(tmp_path / "x.detector")
    tests = [sorted((pictures / "test" / name).iterdir()) for name in ("good", "hole")]
    normal, holes = (loaded.score_samples(paths) for paths in tests)
    assert (normal[:, None] > holes).mean() > 0.95
    assert (loaded.score_samples(tests[0][:2]) == found.score_samples(tests[0][:2])).all()
    if method == "pooled_knn":
        with pytest.raises(UserError, match="no heatmap"):
            loaded.heatmap(stripes(0))


def test_the_file_of_dictionaries_and_gaussians_does_not_grow(pictures, backbone_file, monkeypatch):
    monkeypatch.setattr(patches, "_PROTOTYPES", 64)
    sizes = {}
    for method, row in METHODS.items():
        for n in (24, 40):
            found, _ = fit(good(pictures)[:n], spec_of(backbone_file, method=(method,), seed=1))
            model = found.net.terms[0].model
            largest = {name: x.numel() for name, x in model.state_dict().items() if name != "directions"}
            sizes[method, n] = sum(largest.values())
        assert (sizes[method, 24] < sizes[method, 40]) == row.grows, method


@pytest.mark.parametrize(
    "change, told",
    [
        ({"weights": None}, "--weights: which file"),
        ({"backbone": "timm_mobilenetv3_small_075"}, "does not fit --backbone"),
        ({"backbone": "timm_nothing"}, "has no nothing"),
        ({"method": ("csi", "gaussians")}, "stands alone"),
        ({"image_size": 72}, "a multiple of that"),
    ],
)
def test_what_does_not_go_together_is_refused(pictures, backbone_file, change, told):
    with pytest.raises(UserError, match=told):
        fit(good(pictures), spec_of(backbone_file, **change))


@pytest.mark.parametrize("flag", [{"false_alarms": 0.0}, {"hold_out": 1.0}, {"folds": 0}, {"num_worker": 0}])
def test_flags_out_of_range_are_refused(backbone_file, flag):
    with pytest.raises(UserError, match=f"--{next(iter(flag))} must"):
        spec_of(backbone_file, **flag)


def test_unreadable_pictures_are_an_error_or_left_out(pictures, backbone_file, tmp_path, capsys):
    bad = tmp_path / "bad\n.png"
    bad.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"cannot read .*bad\\n.png .*--skip_bad_images"):
        fit([*good(pictures), bad], spec_of(backbone_file))
    found, _ = fit([*good(pictures), bad], spec_of(backbone_file, skip_bad_images=True))
    assert found.config["normal"]["pictures"] == 40 and "--skip_bad_images: cannot read" in capsys.readouterr().out


def test_too_few_or_too_like_pictures_are_refused(pictures, backbone_file, tmp_path):
    with pytest.raises(UserError, match="at least 16"):
        fit(good(pictures)[:15], spec_of(backbone_file))
    for i in range(20):
        shutil.copy(good(pictures)[0], tmp_path / f"{i}.png")
    with pytest.raises(UserError, match="copies of"):
        fit(sorted(tmp_path.iterdir()), spec_of(backbone_file))


def test_sixteen_bit_pictures_are_scored_in_the_range_they_were_fitted_in(backbone_file, tmp_path):
    for i in range(20):
        grey = stripes(i)[..., 0].astype(np.uint16) * 16
        Image.fromarray(grey).save(tmp_path / f"{i}.png")
    found, _ = fit(sorted(tmp_path.iterdir()), spec_of(backbone_file))
    assert found.config["reading"]["tops"] == {"integers": 4095}
    found.save(tmp_path / "x.detector")
    dark = tmp_path / "dark.png"
    Image.fromarray((stripes(50)[..., 0] // 2).astype(np.uint16)).save(dark)  # At most 127 of 4095: nearly black.
    loaded = Detector.load(tmp_path / "x.detector")
    assert loaded.score_samples([dark])[0] < loaded.calibration.min()


def test_scratch_methods_are_those_that_are_trained():
    from detector.trained import TRAINED

    assert tuple(TRAINED) == SCRATCH and BACKBONE.startswith("timm_")
