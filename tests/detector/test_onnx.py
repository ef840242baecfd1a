"""The exported graph gives the detector's scores, or nothing is written."""

import numpy as np
import pytest

import detect
from detector import onnx
from detector.detector import Detector
from detector.fitting import fit
from tests.detector.conftest import spec_of, stripes

runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def test_a_graph_has_scores_verdicts_and_heat(file, pictures, tmp_path, capsys):
    path = tmp_path / "parts.onnx"
    assert detect.main(["export", str(file), "--onnx", str(path), "--check", str(pictures / "test")]) == 0
    assert "scores of 19 pictures differ by" in capsys.readouterr().out
    session, own = runtime.InferenceSession(str(path)), Detector.load(file)
    for pixels in (stripes(200, blob=True), stripes(7, 90), stripes(8)[:50]):
        score, anomalous, heat = session.run(None, {"picture": pixels})
        expected = own.score_samples([pixels])[0]
        assert score[0] == pytest.approx(expected, abs=1e-5) and anomalous[0] == (expected < own.threshold.value)
        assert heat.shape == (64, 64)
    assert np.abs(heat - own._heat(own._score(pixels), (64, 64))).max() < 1e-3
    assert float(session.get_modelmeta().custom_metadata_map["threshold"]) == own.threshold.value


@pytest.mark.parametrize("method", ["patch_sr", "patch_knn", "padim", "pooled_knn"])
def test_every_method_is_exported(method, pictures, backbone_file, tmp_path):
    found, _ = fit(sorted((pictures / "train/good").iterdir()), spec_of(backbone_file, method=(method,)))
    onnx.export(found, tmp_path / "x.onnx", pictures / "test")
    outputs = runtime.InferenceSession(str(tmp_path / "x.onnx")).get_outputs()
    assert len(outputs) == (2 if method == "pooled_knn" else 3)


def test_a_graph_that_differs_is_not_written(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx, "TOLERANCE", 0.0)
    assert detect.main(["export", str(file), "--onnx", str(tmp_path / "x.onnx")]) == 1
    assert "differ by" in capsys.readouterr().err and not list(tmp_path.iterdir())
