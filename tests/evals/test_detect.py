"""Results of a detection, in memory and as files hold them."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import eval as evaluate
from common.errors import UserError
from evals import EVALS
from evals.extract import SPARSE, Extraction
from evals.metrics import aupr_anomalous, aupr_normal, auroc, fpr_at_recall
from evals.result import family, nested
from tests.conftest import SHIFT, TINY
from tests.evals.test_trained import trained_of

FAMILIES = {
    "auroc": auroc,
    "aupr_normal": aupr_normal,
    "aupr_anomalous": aupr_anomalous,
    "fpr_at_95_recall": fpr_at_recall,
}


def test_one_result_for_each_score_with_metrics_of_its_images(stage1):
    trained = trained_of(stage1, "--ood_score", "CSI", "knn", "--ood_dataset", "interp", "--test_batch_size", "9")
    results = list(EVALS["ood_pre"].measure(trained))
    assert [result.name for result in results] == ["CSI", "knn"]
    for result in results:
        own, other = result.per_image["digits"], result.per_image["interp"]
        assert list(own) == ["index", "label", "score", "class"] and list(other) == ["index", "label", "score"]
        assert own["index"].tolist() == list(range(599)) and len(other["score"]) == 61
        assert own["class"].tolist() == [str(label) for label in own["label"]]
        normal = own["score"][own["label"] == 3]
        sets = {f"one_class_{c}": own["score"][own["label"] == c] for c in range(10) if c != 3}
        for name, measure in FAMILIES.items():
            expected = {title: measure(normal, scores) for title, scores in {**sets, "interp": other["score"]}.items()}
            whole = [f"{name}/mean", f"{name}/pooled"] if name != "auroc" else ["mean", "pooled"]
            assert {k: v for k, v in family(result.metrics, name).items() if k not in ("mean", "pooled")} == expected
            assert result.metrics[whole[0]] == pytest.approx(np.mean([expected[title] for title in sets]))
            assert result.metrics[whole[1]] == measure(normal, own["score"][own["label"] != 3])
        assert result.metrics["auroc_interval/low"] < result.metrics["mean"] < result.metrics["auroc_interval/high"]
        assert (result.facts["n_in"], result.facts["n_out"]) == (61, 538)
        assert set(result.facts["data"]) == {"training", "digits", "interp"}
    # What one score reads is no setting of the other.
    assert "knn_k" in results[1].facts["settings"] and "knn_k" not in results[0].facts["settings"]


def test_a_result_file_holds_the_metrics_and_a_table_the_images(stage2, tmp_path, capsys):
    run = shutil.copytree(stage2, tmp_path / "run")
    args = [*TINY, *SHIFT, "--invert_sr_feature_norm", "--mode", "ood_pre_cocsr", "--load_path", str(run)]
    assert evaluate.main([*args, "--save_score"]) == 0
    told = capsys.readouterr().out
    (result,) = EVALS["ood_pre_cocsr"].measure(trained_of(stage2, "--invert_sr_feature_norm", mode="ood_pre_cocsr"))
    found = json.loads((run / "result_ood_pre_cocsr_CSI_sr.json").read_text())
    assert {name: found[name] for name in nested(result.metrics)} == nested(result.metrics)
    assert set(found["auroc_interval"]) == {"low", "high"} and len(found["fpr_at_95_recall"]) == 9 + 2
    trained = trained_of(stage2, "--invert_sr_feature_norm", mode="ood_pre_cocsr")
    out = Extraction.of(SPARSE, trained, {"gap", "zeros", "lambda_share"}).outputs(trained.split.test(), "test")
    assert found["gap"] == pytest.approx(float(out["gap"].mean()), rel=1e-5) and out["gap"].max() > 0
    for name in ("zeros", "lambda_share"):
        assert found[name] == pytest.approx(float(np.median(out[name].mean((1, 2)))), rel=1e-4)
    assert f"mean optimality gap {found['gap']:.3g} lambda" in told
    assert f"codes: lambda {found['lambda_share']:.2g} of lambda_max, {100 * found['zeros']:.0f} % zeros" in told
    low, high = (100 * found["auroc_interval"][end] for end in ("low", "high"))
    assert f"{100 * found['mean']:5.1f}  95 % interval {low:.1f} to {high:.1f}" in told
    assert f"FPR at 95 % recall {100 * found['fpr_at_95_recall']['pooled']:.1f}" in told
    rows = list(csv.DictReader((run / found["scores"]["digits"]).open()))
    assert [float(row["score"]) for row in rows] == result.per_image["digits"]["score"].tolist()


def test_nested_metrics_keep_a_slash_in_the_name_of_a_set():
    assert nested({"mean": 1.0, "auroc/a": 0.5, "auroc/folder:b/c": 0.2}) == {
        "mean": 1.0,
        "auroc": {"a": 0.5, "folder:b/c": 0.2},
    }


def test_a_corrupt_network_is_reported(stage1):
    trained = trained_of(stage1)
    with torch.no_grad():
        next(trained.net.parameters()).fill_(torch.nan)
    for path, start in ((trained.path, "--load_path: .*"), (None, "the network")):
        with pytest.raises(UserError, match=f"^{start} gives non-finite scores; its weights are corrupt"):
            list(EVALS["ood_pre"].measure(replace(trained, path=path)))
