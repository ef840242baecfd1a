import math
from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.errors import UserError
from evals import scores
from evals.coding import reconstruction_error, with_costs
from evals.scores import (
    LEVEL_SCORES,
    SCORES,
    NearestScore,
    NoOptions,
    OneClassSvmScore,
    Scorer,
    TransformationScore,
    fit_csi,
    fit_csi_sr,
)
from evals.specs import CrossSpec, KnnSpec, PartsSpec

N, M_TRAIN, T, K, P, ATOMS = 6, 9, 2, 3, 4, 5


def arrays(seed: int, n: int):
    """By draw, (N, T, K, .): z, which is coded as well, codes, and logits of the shift."""
    rng = np.random.default_rng(seed)
    shapes = {"z": (n, T, K, P), "codes": (n, T, K, ATOMS), "shift": (n, T, K, K)}
    return {name: rng.normal(size=shape) + (name == "shift") for name, shape in shapes.items()}


def averaged(x, D=None):
    """What scorers are given: means over the draws, with the error in dictionaries D."""
    found = {name: torch.from_numpy(value).mean(1) for name, value in x.items()}
    if D is not None:
        found["error"] = reconstruction_error(torch.from_numpy(D), found["z"], found["codes"])
    return found


def mean(x):
    return x.mean(1)


def csi_by_loops(train, test, shifts=K, plain=False):
    """The `CSI` score of section 8, image by image."""
    z, t = mean(train["z"]), mean(test["z"])
    l_train, l_test = mean(train["shift"]), mean(test["shift"])
    scores = []
    for n in range(len(t)):
        total = 0.0
        for k in range(shifts):
            nearest = max(t[n, k] @ z[m, k] / np.linalg.norm(z[m, k]) for m in range(len(z)))
            if plain:
                total += nearest
                continue
            w = 1 / np.mean([np.linalg.norm(z[m, k]) for m in range(len(z))])
            v = 1 / np.mean([l_train[m, k, k] for m in range(len(z))])
            total += nearest * w + l_test[n, k, k] * v
        scores.append(total / shifts)
    return np.array(scores)


def csi_sr_by_loops(D, train, test, shifts=K, plain=False):
    def error(x, n, k):
        return np.sum((mean(x["z"])[n, k] - D[k] @ mean(x["codes"])[n, k]) ** 2)

    scores = []
    for n in range(len(test["z"])):
        total = 0.0
        for k in range(shifts):
            w = 1 / np.mean([error(train, m, k) for m in range(M_TRAIN)])
            v = 1 / np.mean(mean(train["shift"])[:, k, k])
            total += -error(test, n, k) if plain else -error(test, n, k) * w + mean(test["shift"])[n, k, k] * v
        scores.append(total / shifts)
    return np.array(scores)


@pytest.fixture
def data():
    D = np.random.default_rng(9).normal(size=(K, P, ATOMS))
    return D, arrays(0, M_TRAIN), arrays(1, N)


def test_csi_equals_loops(data):
    _, train, test = data
    score = fit_csi(averaged(train))
    np.testing.assert_allclose(score(averaged(test)), csi_by_loops(train, test), atol=1e-12)
    simclr = fit_csi(averaged(train), first_shift_only=True)
    np.testing.assert_allclose(simclr(averaged(test)), csi_by_loops(train, test, shifts=1, plain=True), atol=1e-12)


def test_csi_sr_equals_loops(data):
    """Trap 7: features and codes are averaged first, the error is taken after."""
    D, train, test = data
    score = fit_csi_sr(averaged(train, D))(averaged(test, D))
    np.testing.assert_allclose(score, csi_sr_by_loops(D, train, test), atol=1e-12)
    simclr_sr = fit_csi_sr(averaged(train, D), first_shift_only=True)(averaged(test, D))
    np.testing.assert_allclose(simclr_sr, csi_sr_by_loops(D, train, test, shifts=1, plain=True), atol=1e-12)


def test_parts_can_be_left_out(data):
    _, train, test = data
    both, sim, shi = (
        fit_csi(averaged(train), similarity=a, shift=b)(averaged(test)).numpy()
        for a, b in ((True, True), (True, False), (False, True))
    )
    np.testing.assert_allclose(sim + shi, both, atol=1e-12)
    assert np.ptp(sim) > 0.01 and np.ptp(shi) > 0.01


def test_a_part_that_is_off_cannot_make_a_score_non_finite(data):
    _, train, test = data
    dead = {**averaged(train), "shift": torch.zeros(M_TRAIN, K, K)}  # 1 / mean logit would be infinite
    assert fit_csi(dead, first_shift_only=True)(averaged(test)).isfinite().all()


def test_a_classifier_of_the_shift_that_was_not_trained_is_left_out(data):
    """Its head is zero."""
    D, train, test = data
    dead_train, dead_test = ({**averaged(x, D), "shift": torch.zeros(len(x["z"]), K, K)} for x in (train, test))
    for fit in (fit_csi, fit_csi_sr):
        assert torch.equal(fit(dead_train)(dead_test), fit(averaged(train, D), shift=False)(averaged(test, D)))


def test_one_shift_has_no_shift_term(data):
    _, train, test = data
    train, test = ({"z": x["z"][:, :1], "shift": x["shift"][:, :1, :1]} for x in map(averaged, (train, test)))
    both, alone = (fit_csi(train, shift=on)(test) for on in (True, False))
    assert torch.equal(both, alone)


def test_known_scores(golden):
    g = golden("scores")
    k, t = g["K"], g["T"]

    def by_draw(x):  # (N, K*T, .), shift 0's draws first -> (N, T, K, .)
        return x.view(len(x), k, t, -1).transpose(1, 2)

    def of(which):
        logits = by_draw(g[f"{which}_shift_logits"])
        given = {"z": by_draw(g[f"{which}_simclr"]), "shift": logits, "codes": g[f"{which}_codes"].permute(1, 2, 0, 3)}
        means = {name: value.mean(1) for name, value in {**given, "s": by_draw(g[f"{which}_feature"])}.items()}
        return {**means, "error": reconstruction_error(g["dictionary"], means["s"], means["codes"])}

    train, test = of("train"), of("test")
    score = fit_csi_sr(train)
    torch.testing.assert_close(score.error_weight.double(), g["weight_error"], atol=1e-6, rtol=0)
    torch.testing.assert_close(score.shift_weight.double(), g["weight_shift"], atol=1e-6, rtol=0)
    torch.testing.assert_close(score(test), g["score_CSI_sr"], atol=1e-6, rtol=0)
    csi = fit_csi(train)
    torch.testing.assert_close(csi.similarity_weight.double(), g["weight_simclr"], atol=1e-6, rtol=0)
    torch.testing.assert_close(csi(test), g["score_CSI"], atol=1e-6, rtol=0)


def test_marginalised_probabilities_by_hand():
    """Two classes; the own pairs of the four rotations are (1, 0), (2, 0), (3, 0), (6, 4), their mean is (3, 1), so
    that class 0 has probability 1 / (1 + exp(-2)). What stands elsewhere does not count."""
    joint = torch.full((1, 4, 8), 50.0)
    for i, pair in enumerate([(1.0, 0.0), (2.0, 0.0), (3.0, 0.0), (6.0, 4.0)]):
        joint[0, i, 2 * i : 2 * i + 2] = torch.tensor(pair)
    linear = torch.tensor([0.0, 3.0]).view(1, 1, 2).expand(1, 4, 2)
    score = SCORES["baseline_marginalized"].fit({}, NoOptions())({"joint": joint, "linear": linear})
    assert score.item() == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-6)
    plain = SCORES["baseline"].fit({}, NoOptions())({"joint": joint, "linear": linear})
    assert plain.item() == pytest.approx(1 / (1 + np.exp(-3)), abs=1e-6)


def test_rot_trans_score_by_hand():
    """Logits of log 2 at the truth and 0 elsewhere: probabilities 2/5, 2/4, 2/4 in each of 36 views, 50.4 in all."""
    k = torch.arange(36)
    truth = {"rotation": (k // 9, 4), "vertical": (k // 3 % 3, 3), "horizontal": (k % 3, 3)}
    outputs = {name: F.one_hot(index, classes).float()[None] * np.log(2) for name, (index, classes) in truth.items()}
    assert TransformationScore()(outputs).item() == pytest.approx(50.4, abs=1e-4)
    wrong = {name: value.roll(1, 2) for name, value in outputs.items()}
    assert TransformationScore()(wrong).item() == pytest.approx(36 * (1 / 5 + 1 / 4 + 1 / 4), abs=1e-4)


@pytest.mark.parametrize("name, options", [("knn", KnnSpec(knn_k=3)), ("ocsvm", NoOptions())])
def test_simple_scores_look_at_unit_features_of_the_unshifted_view(name, options):
    generator = torch.Generator().manual_seed(0)
    train = {"h": torch.randn(40, 2, 6, generator=generator)}
    test = {"h": torch.randn(9, 2, 6, generator=generator)}
    score = SCORES[name].fit(train, options)(test)
    a, b = (F.normalize(x["h"][:, 0], dim=1) for x in (train, test))
    if name == "knn":
        expected = [-sorted((a - row).norm(dim=1).tolist())[2] for row in b]
        assert score.tolist() == pytest.approx(expected, abs=1e-5)
    else:
        from sklearn.svm import OneClassSVM

        svm = OneClassSVM(kernel="rbf", gamma="scale", nu=0.1).fit(a.numpy())
        np.testing.assert_allclose(score.numpy(), svm.decision_function(b.numpy()), atol=1e-12)
    other = {"h": torch.cat([test["h"][:, :1] * 7, -test["h"][:, 1:]], 1)}
    torch.testing.assert_close(SCORES[name].fit(train, options)(other), score, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 5, 40, 99])
def test_distances_are_those_of_scikit_learn(k):
    from sklearn.neighbors import NearestNeighbors

    generator = torch.Generator().manual_seed(0)
    known, x = torch.randn(40, 6, generator=generator), torch.randn(9, 6, generator=generator)
    x[0] = known[3]
    nearest = NearestNeighbors(n_neighbors=min(k, 40), algorithm="brute").fit(known.numpy())
    expected = -nearest.kneighbors(x.numpy())[0][:, -1]
    np.testing.assert_allclose(NearestScore.of(known, k).of_vectors(x).numpy(), expected, atol=1e-6)


def test_a_one_class_svm_of_equal_vectors_is_finite():
    """Their variance is zero, and gamma 1 / (F * variance) would be infinite."""
    same = torch.ones(8, 3)
    score = OneClassSvmScore.of(same)
    assert score.gamma == 1 and score.of_vectors(torch.cat([same, 3 * same])).isfinite().all()


def test_the_objective_takes_the_place_of_the_error():
    train, test = arrays(1, M_TRAIN), arrays(2, N)
    D, lam = np.random.default_rng(0).normal(size=(K, P, ATOMS)), 0.3
    found = {}
    for name, x in (("train", train), ("test", test)):
        outputs = {key: torch.from_numpy(value).mean(1) for key, value in x.items()}
        found[name] = with_costs(outputs | {"s": outputs["z"]}, torch.from_numpy(D), lam)

    def objective(outputs, n, k):
        residual = outputs["s"][n, k].numpy() - D[k] @ outputs["codes"][n, k].numpy()
        return 0.5 * residual @ residual + lam * np.abs(outputs["codes"][n, k].numpy()).sum()

    score = SCORES["CSI_src"].fit(found["train"], PartsSpec())(found["test"])
    for n in range(N):
        total = 0.0
        for k in range(K):
            w = np.mean([objective(found["train"], m, k) for m in range(M_TRAIN)])
            v = np.mean([float(found["train"]["shift"][m, k, k]) for m in range(M_TRAIN)])
            total += float(found["test"]["shift"][n, k, k]) / v - objective(found["test"], n, k) / w
        assert score[n].item() == pytest.approx(total / K)


def test_the_shift_classifier_alone_by_loops():
    logits = torch.from_numpy(arrays(3, N)["shift"]).mean(1)
    outputs = {"shift": logits}
    own = [float(sum(logits[n, k, k] for k in range(K)) / K) for n in range(N)]
    assert SCORES["shift_logit"].scorer()(outputs).tolist() == pytest.approx(own)
    p = logits.exp() / logits.exp().sum(2, keepdim=True)
    log_p = [float(sum(p[n, k, k].log() for k in range(K)) / K) for n in range(N)]
    odds = [float(sum((p[n, k, k] / (1 - p[n, k, k])).log() for k in range(K)) / K) for n in range(N)]
    scorer = SCORES["shift_logsoftmax"].scorer()
    assert scorer(outputs).tolist() == pytest.approx(log_p) and scorer.smooth(outputs).tolist() == pytest.approx(odds)
    for name in ("shift_logit", "shift_logsoftmax"):
        with pytest.raises(UserError, match="one shift"):
            SCORES[name].scorer()({"shift": logits[:, :1, :1]})


def test_the_length_of_features_by_a_loop():
    h = torch.from_numpy(arrays(3, N)["z"]).mean(1)
    found = SCORES["feature_norm"].scorer()({"h": h})
    for n in range(N):
        assert found[n].item() == pytest.approx(sum(math.sqrt(float((h[n, k] ** 2).sum())) for k in range(K)) / K)


@pytest.mark.parametrize("k, block", [(1, 2**22), (3, 40), (50, 2**22)])
def test_cosines_to_neighbours_under_the_same_shift_by_loops(k, block, monkeypatch):
    monkeypatch.setattr(scores, "_BLOCK", block)
    train, test = (torch.from_numpy(arrays(seed, n)["z"]).mean(1) for seed, n in ((4, M_TRAIN), (5, N)))
    score = SCORES["knn_cosine"].fit({"h": train}, KnnSpec(knn_k=k))({"h": test})
    for n in range(N):
        total = 0.0
        for s in range(K):
            cosines = [float(F.cosine_similarity(test[n, s], train[m, s], dim=0)) for m in range(M_TRAIN)]
            total += np.mean(sorted(cosines)[-k:])
        assert score[n].item() == pytest.approx(total / K)


@pytest.mark.parametrize("scorer", ["csi", "knn", "svm"])
def test_blocks_do_not_matter(scorer, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    z, shift = torch.randn(30, 3, 5, generator=generator), torch.randn(30, 3, 3, generator=generator)
    outputs = {"z": z, "shift": shift, "h": z}
    score = {"csi": fit_csi(outputs), "knn": NearestScore.of(z[:, 0]), "svm": OneClassSvmScore.of(z[:, 0])}[scorer]
    whole = score(outputs)
    monkeypatch.setattr("evals.scores._BLOCK", 200)
    torch.testing.assert_close(score(outputs), whole)


@pytest.mark.parametrize("name", ["CSI", "CSI_sr"])
def test_switches_leave_out_the_part_that_they_name(name, data):
    D, train, test = data

    def found(sim: bool, shi: bool) -> torch.Tensor:
        return SCORES[name].fit(averaged(train, D), PartsSpec(sim, shi))(averaged(test, D))

    own = torch.from_numpy(mean(test["shift"])).diagonal(dim1=1, dim2=2)
    weights = torch.from_numpy(mean(train["shift"])).diagonal(dim1=1, dim2=2).mean(0)
    torch.testing.assert_close(found(True, False), (own / weights).mean(1))
    torch.testing.assert_close(found(True, False) + found(False, True), found(False, False))
    assert {f.name for f in fields(SCORES[name].options)} == {"disable_sim_score", "disable_shi_score"}


# ------------------------------------------------------------------------------------------------ as files hold them


def outputs_of_every_kind(n: int, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"z": (n, 4, 5), "shift": (n, 4, 4), "error": (n, 4), "objective": (n, 4), "h": (n, 4, 6)}
    shapes |= {"linear": (n, 4, 3), "cross": (n, 4, 4), **{name: (n, 1, 1) for name in LEVEL_SCORES.values()}}
    shapes |= {"joint": (n, 4, 12), "rotation": (n, 36, 4), "vertical": (n, 36, 3), "horizontal": (n, 36, 3)}
    return {name: torch.rand(shape, generator=g) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", SCORES)
def test_a_scorer_is_the_same_after_its_state_is_saved_and_loaded(name, tmp_path):
    row = SCORES[name]
    scorer = row.fit(outputs_of_every_kind(30, 0), row.options())
    assert type(scorer) is row.scorer and row.fitted == bool(scorer.state())
    assert all(isinstance(value, torch.Tensor) for value in scorer.state().values())
    torch.save(scorer.state(), tmp_path / "state")
    again = row.scorer.load(torch.load(tmp_path / "state", weights_only=True))
    test = {key: value for key, value in outputs_of_every_kind(9, 1).items() if key in row.scorer.needs}
    before, after = scorer(test), again(test)
    assert before.shape == (9,) and torch.equal(before, after) and before.dtype == after.dtype


@pytest.mark.parametrize("rule", ["ratio", "margin", "softmax"])
def test_dictionaries_against_one_another_by_hand(rule):
    """Three shifts, by loops."""
    g = torch.Generator().manual_seed(0)
    train, test = (torch.rand(n, 3, 3, generator=g, dtype=torch.float64) + 0.1 for n in (20, 5))
    found = SCORES["CSI_srm"].fit({"cross": train}, CrossSpec(srm_rule=rule))({"cross": test})
    for n in range(5):
        total = 0.0
        for k in range(3):
            scale = sum(float(train[m, k, k]) for m in range(20)) / 20
            own, others = float(test[n, k, k]), [float(test[n, k, j]) for j in range(3) if j != k]
            if rule == "ratio":
                total += math.log(sum(others) / 2 / own)
            elif rule == "margin":
                total += (min(others) - own) / scale
            else:
                weights = [math.exp(-o / (0.1 * scale)) for o in (own, *others)]
                total += math.log(weights[0] / sum(weights))
        assert float(found[n]) == pytest.approx(total / 3, abs=1e-9)
    with pytest.raises(UserError, match="under one shift"):
        SCORES["CSI_srm"].fit({"cross": train[:, :1, :1]}, CrossSpec(srm_rule=rule))({"cross": test[:, :1, :1]})


@pytest.mark.parametrize("change", [{"k": None}, {"more": torch.ones(1)}])
def test_a_state_of_something_else_does_not_load(change):
    state = NearestScore.of(torch.ones(3, 2)).state() | change
    with pytest.raises(ValueError, match="NearestScore has the tensors"):
        NearestScore.load({name: value for name, value in state.items() if value is not None})


def test_a_scorer_reads_what_it_needs_and_nothing_else():
    assert all(issubclass(row.scorer, Scorer) and row.scorer.needs for row in SCORES.values())
