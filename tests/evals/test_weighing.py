"""Units and weights of terms by images set aside, and the sum of scores that they make."""

import json
import math

import numpy as np
import pytest
import torch

import eval as evaluate
import train
from common.errors import UserError
from datasets.sets import image_set
from evals import EVALS
from evals.extract import CONTRASTIVE, Extraction, reference_pool
from evals.metrics import auroc
from evals.scores import SCORES, NoOptions, SumScore
from evals.specs import KnnSpec
from evals.weighing import Term, Weighing, turned_set, weigh
from tests.conftest import SHIFT, TINY
from tests.evals.test_trained import trained_of

NORMAL, TURNED = np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.5, 2.5])
NAMES = ["knn_cosine", "feature_norm", "shift_logit", "shift_logsoftmax"]


def test_a_term_counts_by_how_well_it_tells_turned_images_and_a_log_probability_by_its_bits():
    bits = 0.5
    own = -bits * math.log(2) * np.array([0.5, 1.0, 1.5])
    found = weigh(
        {"a": NORMAL, "worse": NORMAL, "flat": np.full(3, 4.0), "p": own, "sure": own / 100, "lost": own},
        {"a": TURNED, "worse": NORMAL + 1, "flat": np.ones(3), "p": own - 3, "sure": own - 3, "lost": own + 3},
        {"p", "sure", "lost"},
    )
    weights = {name: term.weight for name, term in found.terms.items()}
    assert weights == pytest.approx({"a": 5 / 9, "worse": 0, "flat": 0, "p": 4, "sure": 1e4, "lost": 0})
    assert found.terms["a"] == pytest.approx(Term(2.0, math.sqrt(2 / 3), 5 / 9, 7 / 9))
    assert found.terms["flat"].deviation == 1.0 and not found.alike and len(found.lines) == 6
    assert found.lines[0] == "term a: weight 0.556; it tells turned images from upright ones by 77.8 % AUROC"
    assert Weighing.of_facts(json.loads(json.dumps(found.facts))) == found


def test_one_score_of_the_table_is_a_log_probability_of_transformations_by_itself():
    assert [name for name, row in SCORES.items() if row.probability] == ["shift_logsoftmax"]


@pytest.mark.parametrize("probabilities, expected", [({"p"}, [1, 0]), ({"a", "p"}, [1, 1]), ((), [1, 1])])
def test_terms_that_say_nothing_count_alike_and_that_is_told(probabilities, expected):
    found = weigh({"a": NORMAL, "p": NORMAL}, {"a": NORMAL, "p": NORMAL}, probabilities)
    assert [term.weight for term in found.terms.values()] == expected and found.alike
    names = [name for name, weight in zip("ap", expected, strict=True) if weight]
    assert found.lines[-1].startswith("warning: no term tells") and found.lines[-1].endswith(": " + ", ".join(names))


def test_a_turned_set_has_each_image_turned_by_its_place():
    images = torch.randint(0, 256, (4, 1, 3, 3), generator=torch.Generator().manual_seed(0)).byte()
    found = turned_set(image_set(images, torch.arange(4)))
    for n, quarters in enumerate((1, 2, 3, 1)):
        assert torch.equal(found.images[n], torch.rot90(images[n], quarters, (1, 2)))
    assert found.labels.tolist() == [0, 1, 2, 3]


def test_the_sum_adds_standardised_scores_and_what_an_attacker_climbs():
    knn = SCORES["knn"].fit({"h": torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))}, KnnSpec())
    norm = SCORES["feature_norm"].fit({}, NoOptions())
    sum_of = SumScore({"knn": knn, "norm": norm}, {"knn": Term(1.0, 2.0, 3.0, 0.8), "norm": Term(-4.0, 0.5, 0.25, 0.6)})
    outputs = {"h": torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(1))}
    expected = [3 * (a - 1) / 2 + 0.25 * (b + 4) / 0.5 for a, b in zip(knn(outputs), norm(outputs), strict=True)]
    torch.testing.assert_close(sum_of(outputs), torch.stack(expected).double(), atol=1e-6, rtol=1e-6)
    smooth = 3 * (knn.smooth(outputs) - 1) / 2 + 0.25 * (norm.smooth(outputs) + 4) / 0.5
    torch.testing.assert_close(sum_of.smooth(outputs), smooth.double(), atol=1e-6, rtol=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of stage 1 that has set twelve images aside."""
    logs = tmp_path_factory.mktemp("held")
    args = [*TINY, *SHIFT, "--mode", "simclr_CSI", "--epochs", "2", "--held_out", "12", "--device", "cpu"]
    assert train.main([*args, "--log_root", str(logs)]) == 0
    return next(logs.iterdir())


@pytest.mark.parametrize("mode", ["ood_pre", "ood_pre_refmix"])
def test_a_sum_is_weighed_by_images_set_aside_and_by_nothing_else(mode, run):
    more = ["--held_out", "12", "--ood_score", *NAMES, "--score_sum", "--ood_samples", "2"]
    trained = trained_of(run, *more, mode=mode)
    *alone, summed = EVALS[mode].measure(trained)
    assert [result.name for result in alone] == NAMES and summed.name == "+".join(NAMES)
    # By hand: of each set the outputs, of these the scores.
    extraction, known = Extraction.of(CONTRASTIVE, trained, {"h", "shift"}).fit(trained.train_images())
    pool = reference_pool(trained.train_images(), 128, 0) if mode == "ood_pre_refmix" else None
    scorers = {name: SCORES[name].fit(known, KnnSpec() if "knn" in name else NoOptions()) for name in NAMES}
    _, held_out = trained.split.training_parts(None)
    sets = [extraction.outputs(images, "", pool) for images in (held_out, turned_set(held_out))]
    expected = np.zeros(599)
    for result in alone:
        normal, turned = (scorers[result.name](outputs).double().numpy() for outputs in sets)
        weight = max(2 * auroc(normal, turned) - 1, 0)
        if result.name == "shift_logsoftmax" and weight:
            weight = 1 / (-normal.mean() / math.log(2)) ** 2
        values = result.per_image["digits"]["score"].astype(float)
        expected += weight * (values - normal.mean()) / normal.std()
        assert summed.facts["weighing"]["terms"][result.name]["weight"] == pytest.approx(weight, rel=1e-5)
        assert "held out" not in result.facts["data"] and "score_sum" not in result.facts["settings"]
    assert expected.std() > 0
    np.testing.assert_allclose(summed.per_image["digits"]["score"], expected, atol=1e-4, rtol=1e-4)
    assert summed.facts["data"]["held out"]["images"] == 12 and summed.facts["settings"]["score_sum"] is True


def test_a_sum_is_told_written_and_measured_under_corruptions_and_attack(run, tmp_path, capsys):
    args = ["--load_path", str(run), "--ood_score", "shift_logit", "feature_norm", "--score_sum", "--device", "cpu"]
    args += ["--corruptions", "contrast", "--attack", "pgd", "--attack_steps", "2", "--attack_images", "6"]
    assert evaluate.main([*args, "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert told.count("term shift_logit: weight") == 1 and told.count("AUROC of shift_logit+feature_norm") >= 2
    found = json.loads((tmp_path / "result_ood_pre_shift_logit+feature_norm.json").read_text())
    assert set(found["weighing"]["terms"]) == {"shift_logit", "feature_norm"} and "attack" in found
    assert len(found["corruptions"]["contrast"]) == 5


@pytest.mark.parametrize(
    "more, message",
    [
        (["--ood_score", "CSI", "CSI"], "--score_sum: there is one score, CSI; give several"),
        (["--ood_score", "CSI", "knn", "--held_out", "0"], "--held_out 0: .* was trained with 12"),
        (["--ood_score", "CSI", "knn", "--data_seed", "7"], "--data_seed 7: .* was trained with 0"),
    ],
)
def test_what_cannot_be_weighed_is_refused(more, message, run):
    held = [] if "--held_out" in more else ["--held_out", "12"]
    trained = trained_of(run, "--score_sum", *held, *more)
    with pytest.raises(UserError, match=message):
        list(EVALS["ood_pre"].measure(trained))


def test_a_corrupt_network_is_reported_where_scores_are_weighed(run):
    trained = trained_of(run, "--score_sum", "--held_out", "12", "--ood_score", "feature_norm", "shift_logit")
    with torch.no_grad():
        next(trained.net.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="^--load_path: .* gives non-finite scores; its weights are corrupt"):
        list(EVALS["ood_pre"].measure(trained))


def test_a_run_that_has_set_nothing_aside_is_refused(stage1):
    trained = trained_of(stage1, "--score_sum", "--ood_score", "CSI", "knn")
    with pytest.raises(UserError, match="--held_out: .* was trained on all images, and the scores of a sum"):
        list(EVALS["ood_pre"].measure(trained))
