"""Rates and areas by hand and by scikit-learn."""

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from common.errors import UserError
from detector.fitting import fit
from detector.judging import _Pixels, judge, test_pictures, told, worst
from tests.detector.conftest import spec_of, stripes

test_pictures.__test__ = False


def test_numbers_are_those_of_the_scores(fitted, pictures):
    found = judge(fitted, pictures, workers=2)
    good, hole = (fitted.score_samples(sorted((pictures / "test" / kind).iterdir())) for kind in ("good", "hole"))
    m, limit = found.metrics, fitted.threshold.value
    assert m["auroc"] == roc_auc_score([0] * 8 + [1] * 8, -np.r_[good, hole])
    assert m["auroc_by_defect"] == {"hole": m["auroc"]} and m["images"] == {"good": 8, "hole": 8}
    assert m["false_alarm_rate"] == (good < limit).mean() and m["detection_rate"] == (hole < limit).mean() == 1
    assert m["detection_interval"] == (pytest.approx(0.025 ** (1 / 8)), 1.0)
    assert m["regions"] == 8
    assert m["images_per_second"] > 0 and not found.bad
    text = "\n".join(told(found, fitted))
    assert "AUROC" in text and "PRO" in text and "hole: AUROC" in text


@pytest.mark.parametrize("method", ["gaussians", "padim", "mahalanobis", "patch_sr"])
def test_holes_are_found_where_they_are(method, pictures, backbone_file):
    detector, _ = fit(sorted((pictures / "train/good").iterdir()), spec_of(backbone_file, method=(method,)))
    m = judge(detector, pictures, workers=2).metrics
    assert m["pixel_auroc"] > 0.88 and m["pro"] > 0.6 and m["regions"] == 8


def test_areas_of_pixels_by_definition():
    rng = np.random.default_rng(0)
    pixels, heats, masks = _Pixels(), [], []
    for _ in range(3):
        mask = np.zeros((40, 40), bool)
        mask[5:12, 5:12] = mask[30:33, 20:30] = True
        heat = rng.normal(0, 2, (40, 40)) + 3 * mask
        pixels.add(heat, mask)
        heats.append(heat)
        masks.append(mask)
    found = pixels.metrics()
    heat, mask = np.stack(heats), np.stack(masks)
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(mask.ravel(), heat.ravel()), abs=5e-4)
    limits = np.sort(heat[~mask])[::-1]
    rates = (np.arange(len(limits)) + 1) / len(limits)
    regions = [heat[i][s] for i in range(3) for s in ((slice(5, 12), slice(5, 12)), (slice(30, 33), slice(20, 30)))]
    overlap = np.mean([[(r >= t).mean() for t in limits] for r in regions], 0)
    inside = rates <= 0.3
    area = np.trapezoid(np.r_[overlap[inside]], rates[inside]) / 0.3
    assert found["regions"] == 6 and found["pro"] == pytest.approx(area, abs=2e-3)


def test_folders_of_all_layouts(tmp_path, pictures):
    by_kind, masks = test_pictures(pictures)
    assert list(by_kind) == ["good", "hole"] and masks == pictures / "ground_truth"
    assert test_pictures(pictures / "test")[1] == pictures / "ground_truth"
    with pytest.raises(UserError, match="a folder good"):
        test_pictures(tmp_path)


def test_worst_mistakes_and_unreadable_pictures(fitted, tmp_path):
    for kind, blob in (("good", True), ("hole", False)):
        (tmp_path / kind).mkdir()
        for i in range(2):
            Image.fromarray(stripes(300 + i, blob=blob)).save(tmp_path / kind / f"{i}.png")
    (tmp_path / "hole" / "bad.png").write_bytes(b"")
    found = judge(fitted, tmp_path, 1)
    false, missed = worst(found.rows)
    assert {kind for kind, _ in false} == {"good"} and {kind for kind, _ in missed} <= {"hole"}
    assert [row.path.name for row in found.bad] == ["bad.png"]
    assert any("empty" in line for line in told(found, fitted))
