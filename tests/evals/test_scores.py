import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evals.scores import SCORES, fit_csi, fit_csi_sr, label_probabilities, transformation_score

N, M_TRAIN, T, K, P, ATOMS = 6, 9, 2, 3, 4, 5


def arrays(seed: int, n: int):
    rng = np.random.default_rng(seed)
    shapes = {"z": (n, T, K, P), "codes": (n, T, K, ATOMS), "shift": (n, T, K, K)}
    return {name: rng.normal(size=shape) + (name == "shift") for name, shape in shapes.items()}


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
    score = fit_csi(train["z"], train["shift"])
    np.testing.assert_allclose(score(test["z"], test["shift"]), csi_by_loops(train, test), atol=1e-12)
    simclr = fit_csi(train["z"], train["shift"], first_shift_only=True)
    expected = csi_by_loops(train, test, shifts=1, plain=True)
    np.testing.assert_allclose(simclr(test["z"], test["shift"]), expected, atol=1e-12)


def test_csi_sr_equals_loops(data):
    D, train, test = data
    three = (train["z"], train["codes"], train["shift"])
    score = fit_csi_sr(D, *three)(test["z"], test["codes"], test["shift"])
    np.testing.assert_allclose(score, csi_sr_by_loops(D, train, test), atol=1e-12)
    simclr_sr = fit_csi_sr(D, *three, first_shift_only=True)(test["z"], test["codes"], test["shift"])
    np.testing.assert_allclose(simclr_sr, csi_sr_by_loops(D, train, test, shifts=1, plain=True), atol=1e-12)


def test_parts_can_be_left_out(data):
    D, train, test = data
    both, sim, shi = (
        fit_csi(train["z"], train["shift"], similarity=a, shift=b)(test["z"], test["shift"])
        for a, b in ((True, True), (True, False), (False, True))
    )
    np.testing.assert_allclose(sim + shi, both, atol=1e-12)
    assert np.ptp(sim) > 0.01 and np.ptp(shi) > 0.01


def test_a_part_that_is_off_cannot_spoil_the_score(data):
    _, train, test = data
    dead = np.zeros_like(train["shift"])  # 1 / mean logit would be infinite
    score = fit_csi(train["z"], dead, first_shift_only=True)(test["z"], test["shift"])
    assert np.isfinite(score).all()


def test_one_shift_has_no_shift_term(data):
    _, train, test = data
    one = [x[:, :, :1] for x in (train["z"], test["z"])]
    logits = [x[:, :, :1, :1] for x in (train["shift"], test["shift"])]
    both, alone = (fit_csi(one[0], logits[0], shift=on)(one[1], logits[1]) for on in (True, False))
    np.testing.assert_array_equal(both, alone)


def test_draws_are_averaged_before_the_score(data):
    """Trap 7: features and codes first, the error after."""
    D, train, test = data
    averaged = {name: x.mean(1, keepdims=True) for name, x in test.items()}
    score = fit_csi_sr(D, train["z"], train["codes"], train["shift"])
    np.testing.assert_allclose(
        score(averaged["z"], averaged["codes"], averaged["shift"]),
        score(test["z"], test["codes"], test["shift"]),
        atol=1e-12,
    )


def test_what_comes_back_is_of_the_kind_that_went_in(data):
    _, train, test = data
    score = fit_csi(train["z"], train["shift"])
    tensors = score(torch.from_numpy(test["z"]), torch.from_numpy(test["shift"]))
    assert isinstance(tensors, torch.Tensor) and isinstance(score(test["z"], test["shift"]), np.ndarray)
    assert tensors.shape == (N,)


def test_known_scores(golden):
    g = golden("scores")
    k, t = g["K"], g["T"]

    def by_draw(x):  # (N, K*T, .), shift 0's draws first -> (N, T, K, .)
        return x.view(len(x), k, t, -1).transpose(1, 2)

    train = [by_draw(g["train_feature"]), g["train_codes"].permute(1, 2, 0, 3), by_draw(g["train_shift_logits"])]
    test = [by_draw(g["test_feature"]), g["test_codes"].permute(1, 2, 0, 3), by_draw(g["test_shift_logits"])]
    score = fit_csi_sr(g["dictionary"], *train)
    torch.testing.assert_close(score.error_weight.double(), g["weight_error"], atol=1e-6, rtol=0)
    torch.testing.assert_close(score.shift_weight.double(), g["weight_shift"], atol=1e-6, rtol=0)
    torch.testing.assert_close(score(*test), g["score_CSI_sr"], atol=1e-6, rtol=0)
    csi = fit_csi(by_draw(g["train_simclr"]), train[2])
    torch.testing.assert_close(csi.similarity_weight.double(), g["weight_simclr"], atol=1e-6, rtol=0)
    torch.testing.assert_close(csi(by_draw(g["test_simclr"]), test[2]), g["score_CSI"], atol=1e-6, rtol=0)


def test_marginalised_probabilities_by_hand():
    """Two classes; the own pairs of the four rotations are (1, 0), (2, 0), (3, 0), (6, 4), their mean is (3, 1), so
    that class 0 has probability 1 / (1 + exp(-2)). What stands elsewhere does not count."""
    joint = torch.full((1, 1, 4, 8), 50.0)
    for i, pair in enumerate([(1.0, 0.0), (2.0, 0.0), (3.0, 0.0), (6.0, 4.0)]):
        joint[0, 0, i, 2 * i : 2 * i + 2] = torch.tensor(pair)
    linear = torch.tensor([0.0, 3.0]).view(1, 1, 1, 2).expand(1, 1, 4, 2)
    found = label_probabilities({"joint": joint, "linear": linear}, marginalized=True)
    assert found[0, 0].item() == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-6)
    score = SCORES["baseline_marginalized"].fit({}, None)({"joint": joint, "linear": linear})
    assert score.item() == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-6)
    plain = SCORES["baseline"].fit({}, None)({"joint": joint, "linear": linear})
    assert plain.item() == pytest.approx(1 / (1 + np.exp(-3)), abs=1e-6)


def test_rot_trans_score_by_hand():
    """Logits of log 2 at the truth and 0 elsewhere: probabilities 2/5, 2/4, 2/4 in each of 36 views, 50.4 in all."""
    k = torch.arange(36)
    truth = {"rotation": (k // 9, 4), "vertical": (k // 3 % 3, 3), "horizontal": (k % 3, 3)}
    outputs = {
        name: F.one_hot(index, classes).float()[None, None] * np.log(2) for name, (index, classes) in truth.items()
    }
    assert transformation_score(outputs).item() == pytest.approx(50.4, abs=1e-4)
    wrong = {name: value.roll(1, 3) for name, value in outputs.items()}
    assert transformation_score(wrong).item() == pytest.approx(36 * (1 / 5 + 1 / 4 + 1 / 4), abs=1e-4)


@pytest.mark.parametrize("name, options", [("knn", {"knn_k": 3}), ("ocsvm", {})])
def test_simple_scores_look_at_unit_features_of_the_unshifted_view(name, options):
    generator = torch.Generator().manual_seed(0)
    train = {"h": torch.randn(40, 1, 2, 6, generator=generator)}
    test = {"h": torch.randn(9, 1, 2, 6, generator=generator)}
    score = SCORES[name].fit(train, None, **options)(test)
    a, b = (F.normalize(x["h"][:, 0, 0], dim=1) for x in (train, test))
    if name == "knn":
        expected = [-sorted((a - row).norm(dim=1).tolist())[2] for row in b]
        assert score.tolist() == pytest.approx(expected, abs=1e-5)
    else:
        from sklearn.svm import OneClassSVM

        svm = OneClassSVM(kernel="rbf", gamma="scale", nu=0.1).fit(a.numpy())
        np.testing.assert_allclose(score.numpy(), svm.decision_function(b.numpy()), atol=1e-6)
    other = {"h": torch.cat([test["h"][:, :, :1] * 7, -test["h"][:, :, 1:]], 2)}
    torch.testing.assert_close(SCORES[name].fit(train, None, **options)(other), score, atol=1e-5, rtol=1e-5)


def test_the_similarity_matrix_is_cut_into_blocks_that_do_not_matter(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    z, shift = torch.randn(30, 1, 3, 5, generator=generator), torch.randn(30, 1, 3, 3, generator=generator)
    score = fit_csi(z, shift)
    whole = score(z, shift)
    monkeypatch.setattr("evals.scores._BLOCK", 200)
    torch.testing.assert_close(score(z, shift), whole)


@pytest.mark.parametrize("name", ["CSI", "CSI_sr"])
def test_switches_leave_out_the_part_that_they_name(name, data):
    D, train, test = data
    dictionary = torch.from_numpy(D)
    outputs = [{**{k: torch.from_numpy(v) for k, v in x.items()}, "s": torch.from_numpy(x["z"])} for x in (train, test)]

    def found(sim: bool, shi: bool) -> torch.Tensor:
        fit = SCORES[name].fit
        return fit(outputs[0], dictionary if name == "CSI_sr" else None, disable_sim_score=sim, disable_shi_score=shi)(
            outputs[1]
        )

    own = torch.from_numpy(mean(test["shift"])).diagonal(dim1=1, dim2=2)
    weights = torch.from_numpy(mean(train["shift"])).diagonal(dim1=1, dim2=2).mean(0)
    torch.testing.assert_close(found(True, False), (own / weights).mean(1))
    torch.testing.assert_close(found(True, False) + found(False, True), found(False, False))
    assert set(SCORES[name].flags) == {"disable_sim_score", "disable_shi_score"}
