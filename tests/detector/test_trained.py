"""Networks that are trained on the pictures: their scores are a picture's own, and come back from the file."""

import json

import numpy as np
import pytest
import torch

from detector.detector import Detector
from detector.fitting import fit
from detector.trained import TRAINED
from tests.detector.conftest import spec_of


@pytest.mark.parametrize("method", TRAINED)
def test_they_fit_score_and_come_back(method, pictures, backbone_file, tmp_path):
    paths = sorted((pictures / "train/good").iterdir())
    found, held = fit(paths, spec_of(backbone_file, method=(method,), image_size=32, epochs=2, shift="rot_bmix"))
    assert found.config["flags"]["model"] == "resnet8" and np.isfinite(found.calibration).all()
    assert (found.score_samples(held) == found.calibration).all()
    found.save(tmp_path / "x.detector")
    loaded = Detector.load(tmp_path / "x.detector")
    torch.manual_seed(5)  # No draw is left to chance.
    tests = sorted((pictures / "test").glob("*/*.png"))
    scores = loaded.score_samples(tests, workers=2)
    assert (scores == found.score_samples(tests[::-1])[::-1]).all() and len(set(scores)) > 8
    references = loaded.net.references
    assert len(references) == (0 if method == "rot_trans" else 8)
    json.dumps(loaded.config)


def test_what_they_are_trained_by_is_on_the_card(pictures, backbone_file):
    from detector.card import card

    paths = sorted((pictures / "train/good").iterdir())
    found, _ = fit(paths, spec_of(backbone_file, method=("rot_trans",), image_size=32, epochs=1))
    assert "method: rot_trans on resnet8" in card(found) and "32 x 32 pixels" in card(found)
