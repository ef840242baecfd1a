import numpy as np
import pytest
import torch

from evals.scores import fit_csi, fit_csi_sr

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
