"""`RobustAutoencoder` as scikit-learn's users know estimators, and on digits."""

import copy
import math
import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import ParameterGrid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import models.autoencoder
from models.autoencoder import RobustAutoencoder
from models.autoencoder.networks import Autoencoder, ConvAutoencoder, VariationalAutoencoder
from models.autoencoder.robust import PENALTIES, Gradients, Separation, Threshold, separate
from tests.conftest import ROOT

SMALL = {"layers": (6, 3), "rounds": 3, "inner_epochs": 4, "lr": 1e-2, "batch_size": 16, "eps": 0.0}


def matrix(n: int = 60, features: int = 9, seed: int = 0) -> np.ndarray:
    """In [0, 1], of rank 3, with three rows that are not."""
    draws = np.random.default_rng(seed)
    X = draws.random((n, 3)) @ draws.random((3, features)) / 3
    X[:3] = draws.random((3, features)) > 0.5
    return X


# ------------------------------------------------------------------------------------------------- scikit-learn

# With a threshold of its own, `predict` of "l21_rows" cuts there: how many rows lie below is not `contamination`.
_CUTS = "predict cuts at the threshold, not at the share of contamination"
EXPECTED = dict.fromkeys(("check_outliers_train", "check_outliers_fit_predict"), _CUTS)


def expected_failures(estimator: RobustAutoencoder) -> dict[str, str]:
    return {} if estimator.threshold is None else EXPECTED


@parametrize_with_checks(
    [
        RobustAutoencoder(rounds=2, inner_epochs=2),
        RobustAutoencoder(rounds=2, inner_epochs=2, tied=True, reinit=True, penalty="l1"),
        RobustAutoencoder(autoencoder="svd", penalty="l21_cols"),
        RobustAutoencoder(rounds=2, inner_epochs=2, threshold=1.0),
    ],
    expected_failed_checks=expected_failures,
)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def test_parameters_are_set_cloned_and_shown():
    found = RobustAutoencoder((6, 3), penalty="l1", threshold=0.3)
    assert found.get_params()["layers"] == (6, 3) and found.get_params()["threshold"] == 0.3
    other = clone(found.set_params(rounds=7, threshold=None))
    assert other is not found and other.get_params() == found.get_params() and other.rounds == 7
    assert "rounds=7" in repr(found) and not hasattr(other, "L_")


@pytest.mark.parametrize("settings", [{}, {"autoencoder": "svd"}])
def test_a_fitted_one_is_pickled_and_copied(settings):
    X = matrix()
    found = RobustAutoencoder(**SMALL | settings).fit(X)
    for other in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        np.testing.assert_array_equal(other.predict(X), found.predict(X))
        np.testing.assert_array_equal(other.score_samples(X[:5]), found.score_samples(X[:5]))
        assert other.history_ == found.history_


def test_in_a_pipeline():
    X = 100 * matrix() - 30
    found = make_pipeline(MinMaxScaler(), RobustAutoencoder(**SMALL)).fit(X)
    assert set(found.predict(X)) == {-1, 1} and found.score_samples(X[:4]).shape == (4,)


def test_the_package_imports_scikit_learn_when_the_estimator_is_asked_for():
    code = "import sys, models.autoencoder.robust as r; print('sklearn' in sys.modules); r.separate"
    code += "; from models.autoencoder import RobustAutoencoder; print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="has no attribute 'Robust'"):
        _ = models.autoencoder.Robust


# ------------------------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize("settings", list(ParameterGrid({"autoencoder": ["dense", "svd"], "penalty": list(PENALTIES)})))
def test_what_it_says_of_the_fit(settings):
    X = matrix()
    found = RobustAutoencoder(**SMALL | settings).fit(X)
    assert found.L_.shape == found.S_.shape == X.shape and found.n_features_in_ == 9
    assert found.n_iter_ == 3 and found.stopped_by_ == "rounds"
    names = {"c1", "c2", "threshold"} | ({"loss"} if settings["autoencoder"] == "dense" else set())
    assert found.history_.keys() == names and all(len(values) == 3 for values in found.history_.values())
    assert found.history_["threshold"][-1] == found.threshold_
    left = torch.from_numpy(X - found.L_ - found.S_)
    assert PENALTIES[settings["penalty"]].sizes(left).max() <= found.threshold_ + 1e-5
    assert found.L_.dtype == (np.float32 if settings["autoencoder"] == "dense" else np.float64)


def test_the_exact_autoencoder_finds_planted_rows_entries_and_columns():
    draws = np.random.default_rng(0)
    clean = draws.normal(size=(60, 2)) @ draws.normal(size=(2, 8))
    rows, entries, columns = clean.copy(), clean.copy(), clean.copy()
    rows[[4, 17]] += draws.normal(size=(2, 8)) * 3
    places = (np.array([3, 20, 41]), np.array([1, 7, 4]))
    entries[places] += 6
    columns[:, 5] += draws.normal(size=60)
    svd = partial(RobustAutoencoder, (2,), autoencoder="svd", rounds=100, eps=1e-6)
    found = svd(penalty="l21_rows", threshold=2.0).fit(rows)
    assert np.flatnonzero(found.S_.any(1)).tolist() == [4, 17] == np.flatnonzero(found.predict(rows) < 0).tolist()
    assert np.transpose(np.nonzero(svd(penalty="l1", threshold=1.0).fit(entries).S_)).tolist() == [
        [3, 1],
        [20, 7],
        [41, 4],
    ]
    assert np.flatnonzero(svd(penalty="l21_cols", threshold=4.0).fit(columns).S_.any(0)).tolist() == [5]


def through_the_library(X: np.ndarray, seed: int, network: dict, training: dict, **algorithm) -> Separation:
    """The same through `separate`."""
    settings = {"epochs": 4, "lr": 1e-2, "batch_size": 16} | training
    step = Gradients(partial(Autoencoder, (9, 6, 3), **network), seed=seed, **settings)
    return separate(torch.from_numpy(X), step, **{"rounds": 3, "eps": 0, "threshold": Threshold(0.1)} | algorithm)


@pytest.mark.parametrize(
    "network, training, algorithm",
    [
        ({}, {}, {"penalty": "l1"}),
        ({"tied": True, "activation": "tanh", "output": "linear"}, {}, {"penalty": "l21_cols"}),
        ({}, {"reinit": True}, {"stop": "any"}),
        ({}, {"batch_size": 7, "lr": 0.1}, {"stop": "all", "eps": 0.4}),
        ({}, {}, {"stop": "any", "eps": 0.4}),
    ],
)
def test_it_is_the_algorithm_of_the_library(network, training, algorithm):
    X = matrix().astype(np.float32)
    found = RobustAutoencoder(**SMALL | network | training | algorithm, threshold=0.1, random_state=3).fit(X)
    expected = through_the_library(X, found.autoencoder_.seed, network, training, **algorithm)
    np.testing.assert_array_equal(found.L_, expected.L.numpy())
    np.testing.assert_array_equal(found.S_, expected.S.numpy())
    assert (found.n_iter_, found.stopped_by_) == (expected.rounds, expected.stopped_by)


@pytest.mark.parametrize("features, sizes", [(9, [4, 2]), (64, [32, 16]), (1, [1, 1])])
def test_layers_shrink_to_a_half_and_a_quarter_by_default(features, sizes):
    found = RobustAutoencoder(rounds=1, inner_epochs=1).fit(matrix(20, features))
    assert [layer.out_features for layer in found.autoencoder_.net.encoder] == sizes


def test_scores_are_reconstruction_errors_of_any_rows():
    X, other = matrix(), matrix(7, seed=1)
    found = RobustAutoencoder(**SMALL).fit(X)
    with torch.no_grad():
        made = found.autoencoder_.net(torch.from_numpy(other).float()).numpy()
    np.testing.assert_allclose(found.reconstruct(other), made, atol=1e-6)
    np.testing.assert_allclose(found.score_samples(other), -np.linalg.norm(other - made, axis=1), atol=1e-6)
    np.testing.assert_allclose(found.decision_function(other), found.score_samples(other) - found.offset_, atol=1e-12)
    assert found.score_samples(other[:1]).shape == (1,) and found.L_.shape == (60, 9)


def test_predictions_follow_contamination_or_the_threshold():
    X = matrix()
    assert (RobustAutoencoder(**SMALL, contamination=0.2).fit_predict(X) == -1).sum() == 12
    assert (RobustAutoencoder(**SMALL, contamination=0.2, penalty="l1", threshold=0.1).fit_predict(X) == -1).sum() == 12
    found = RobustAutoencoder(**SMALL, threshold=1.0).fit(X)
    np.testing.assert_array_equal(found.predict(X) == -1, np.linalg.norm(X - found.reconstruct(X), axis=1) > 1.0)
    assert found.offset_ == -1.0
    assert (RobustAutoencoder(**SMALL, threshold=math.inf).fit(X).predict(X) == 1).all()


def test_random_state_decides():
    X = matrix()
    first, again, other = (RobustAutoencoder(**SMALL, random_state=s).fit(X).L_ for s in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    drawn = [RobustAutoencoder(**SMALL, random_state=np.random.RandomState(0)).fit(X).L_ for _ in range(2)]
    assert np.array_equal(*drawn)
    estimator = RobustAutoencoder(**SMALL)
    assert np.array_equal(estimator.fit(X).L_, estimator.fit(X).L_)


def test_the_output_follows_the_range_of_the_data():
    X = matrix()
    for data, linear in ((X, False), (X * 1.001 + 0.001, True), (X - 0.5, True)):
        made = RobustAutoencoder(**SMALL, activation="relu").fit(data).reconstruct(5 * data - 9)
        assert ((made < 0) | (made > 1)).any() == linear
    assert RobustAutoencoder(**SMALL, activation="relu", output="linear").fit(X).reconstruct(50 * X).max() > 1


# --------------------------------------------------------------------------------------------------- kinds of input


class Frame:
    """What NumPy can read, and no more."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self.values, dtype=dtype)


@pytest.mark.parametrize("settings", [{}, {"autoencoder": "svd", "penalty": "l1"}])
def test_lists_frames_and_float32_are_the_same_data(settings):
    X = matrix().astype(np.float32).astype(np.float64)
    estimator = RobustAutoencoder(**SMALL | settings)
    expected = clone(estimator).fit(X)
    for data in (X.tolist(), Frame(X), X.astype(np.float32), np.asfortranarray(X)):
        found = clone(estimator).fit(data)
        np.testing.assert_array_equal(found.S_, expected.S_)
        np.testing.assert_allclose(found.score_samples(data), expected.score_samples(X), atol=1e-6)
        np.testing.assert_array_equal(found.predict(data), expected.predict(X))


def test_whole_numbers_are_data_too():
    X = (matrix() > 0.3).astype(int)
    assert set(RobustAutoencoder(**SMALL).fit_predict(X)) == {-1, 1}


@pytest.mark.parametrize("layers", [[6, 3], np.array([6, 3]), (np.int64(6), np.int32(3))])
def test_layers_may_be_a_list_an_array_or_numbers_of_numpy(layers):
    X = matrix()
    found = RobustAutoencoder(**SMALL | {"layers": layers}).fit(X)
    np.testing.assert_array_equal(found.L_, RobustAutoencoder(**SMALL).fit(X).L_)
    assert clone(found).layers is not None
    numbers = {"rounds": np.int64(3), "batch_size": np.int32(16), "inner_epochs": np.int64(4), "lr": np.float64(1e-2)}
    np.testing.assert_array_equal(RobustAutoencoder(**SMALL | numbers).fit(X).L_, found.L_)


def test_a_threshold_of_float32_is_one():
    X = matrix()
    found = RobustAutoencoder(**SMALL, threshold=np.float32(0.5), contamination=np.float32(0.25)).fit(X)
    assert found.threshold_ == 0.5 and found.offset_ == -0.5


@pytest.mark.parametrize("features", [1, 2, 3])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("kind", ["dense", "svd"])
def test_a_few_features_are_enough(features, penalty, kind):
    X = matrix(30, features)
    found = RobustAutoencoder(penalty=penalty, rounds=2, inner_epochs=2, autoencoder=kind).fit(X)
    assert found.S_.shape == X.shape and np.isfinite(found.score_samples(X)).all()


def test_two_rows_are_enough_and_one_is_not():
    X = matrix()
    assert len(RobustAutoencoder(**SMALL).fit(X[:2]).predict(X)) == 60
    with pytest.raises(ValueError, match="minimum of 2 is required"):
        RobustAutoencoder(**SMALL).fit(X[:1])


def test_constant_data_is_reconstructed():
    """Zeros, too, of norm 0: nothing is divided by it."""
    for value in (0.0, 1.0):
        found = RobustAutoencoder(autoencoder="svd").fit(np.full((20, 4), value))
        assert found.n_iter_ == 1 and found.stopped_by_ == "c2" and max(found.history_["c1"]) < 1e-12
    found = RobustAutoencoder(**SMALL, threshold=0.5).fit(np.zeros((20, 4)))
    assert np.isfinite(found.history_["c2"]).all()


# ------------------------------------------------------------------------------------------------- other networks


@pytest.mark.parametrize(
    "make", [partial(ConvAutoencoder, (1, 3, 3), widths=(4,), code=3), partial(VariationalAutoencoder, (9, 6, 3))]
)
def test_any_network_may_be_trained(make):
    X, step = matrix(), Gradients(make, epochs=3, lr=1e-2, batch_size=16, seed=0)
    untouched = copy.deepcopy(step.net.state_dict())
    found = RobustAutoencoder(autoencoder=step, rounds=2, eps=0).fit(X)
    assert type(found.autoencoder_.net) is make.func and len(found.history_["loss"]) == 2
    assert found.L_.shape == X.shape and np.isfinite(found.score_samples(X[:5])).all()
    # What the user holds stays as it was, so that fitting again begins again.
    assert all(torch.equal(p, untouched[name]) for name, p in step.net.state_dict().items())
    np.testing.assert_array_equal(found.fit(X).L_, clone(found).fit(X).L_)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found)).predict(X), found.predict(X))


class ColumnMeans:
    """Reconstructs every row as the mean of those it was trained on."""

    def fit(self, rows: torch.Tensor) -> None:
        assert rows.dtype == torch.float64
        self.mean = rows.mean(0)

    def reconstruct(self, rows: torch.Tensor) -> torch.Tensor:
        return self.mean.expand_as(rows)


def test_any_object_that_reconstructs_may_stand_in():
    X = matrix()
    found = RobustAutoencoder(autoencoder=ColumnMeans(), threshold=math.inf, rounds=2).fit(X)
    np.testing.assert_allclose(found.L_, np.tile(X.mean(0), (60, 1)), atol=1e-12)
    assert "loss" not in found.history_


# ------------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rounds": 0}, "rounds must be a whole number >= 1, got 0"),
        ({"rounds": 2.0}, r"rounds must be a whole number >= 1, got 2\.0"),
        ({"inner_epochs": -1}, "inner_epochs must be a whole number >= 1, got -1"),
        ({"batch_size": None}, "batch_size must be a whole number >= 1, got None"),
        ({"lr": 0}, "lr must be a number > 0, got 0"),
        ({"lr": "fast"}, "lr must be a number > 0, got 'fast'"),
        ({"lr": math.nan}, "lr must be a number > 0, got nan"),
        ({"threshold": -1}, "threshold must be a number > 0, got -1"),
        ({"threshold": math.nan}, "threshold must be a number > 0, got nan"),
        ({"contamination": 0}, "contamination must be a number > 0, got 0"),
        ({"contamination": 0.6}, r"contamination must lie in \(0, 0\.5\], got 0\.6"),
        ({"contamination": "auto"}, "contamination must be a number > 0, got 'auto'"),
        ({"eps": None}, "eps must be a number, got None"),
        ({"eps": math.nan}, "eps must be a number, got nan"),
        ({"layers": ()}, r"layers must be sizes >= 1, one at least, got \(\)"),
        ({"layers": 5}, "layers must be sizes >= 1, one at least, got 5"),
        ({"layers": (4, 0)}, r"layers must be sizes >= 1, one at least, got \(4, 0\)"),
        ({"layers": "64"}, "layers must be sizes >= 1, one at least, got '64'"),
        ({"penalty": "l2"}, "penalty must be one of l1, l21_rows, l21_cols, got 'l2'"),
        ({"stop": "c1"}, "stop must be one of c2, any, all, got 'c1'"),
        ({"activation": "swish"}, "activation must be one of relu, sigmoid, tanh, linear, got 'swish'"),
        ({"output": "relu"}, "output must be one of auto, sigmoid, linear, got 'relu'"),
        ({"autoencoder": "conv"}, "autoencoder must be dense, svd or an object, got 'conv'"),
        ({"autoencoder": None}, "autoencoder must have the methods fit and reconstruct, got None"),
        ({"autoencoder": "svd", "layers": (10,)}, r"the rank must lie in 1\.\.9, got 10"),
        ({"lr": 1e30, "output": "linear"}, "the reconstruction of round 1 is not finite: lower lr"),
    ],
)
def test_parameters_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        RobustAutoencoder(**SMALL | settings).fit(matrix())
    assert "\n" not in str(caught.value)


def test_an_exact_one_needs_as_many_rows_as_components():
    with pytest.raises(ValueError, match="4 components need as many rows, there are 3"):
        RobustAutoencoder((4,), autoencoder="svd").fit(matrix(3))


def test_data_that_does_not_fit_is_refused():
    X = matrix()
    found = RobustAutoencoder(**SMALL)
    with pytest.raises(NotFittedError):
        found.predict(X)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN|infinity"):
            found.fit(np.where(X > 0.9, bad, X))
    with pytest.raises(ValueError, match="expecting 9 features"):
        found.fit(X).predict(X[:, :5])
    with pytest.raises(ValueError, match="NaN"):
        found.predict(np.where(X > 0.9, np.nan, X))


# --------------------------------------------------------------------------------------------------------- digits


def test_other_digits_among_fours_are_outliers():
    """181 fours and 10 others: AUROC of the row norms of X - L, mean of 3 seeds; fewer are flagged as t grows.

    With logistic units, as published; one with ReLU learns the outliers by heart in as many epochs.
    """
    images, labels = load_digits(return_X_y=True)
    settings = {"rounds": 8, "inner_epochs": 40, "lr": 3e-3, "batch_size": 32, "eps": 0, "activation": "sigmoid"}
    aurocs, flagged = [], {}
    for seed in range(3):
        others = np.random.default_rng(seed).choice(np.flatnonzero(labels != 4), 10, replace=False)
        index = np.concatenate([np.flatnonzero(labels == 4), others])
        X, outlier = images[index] / 16, labels[index] != 4
        assert outlier.sum() == 10 and len(outlier) == 191
        found = RobustAutoencoder((32, 16), threshold=0.8, random_state=seed, **settings).fit(X)
        aurocs.append(roc_auc_score(outlier, np.linalg.norm(X - found.L_, axis=1)))
        flagged[0.8] = found.S_.any(1)
    for threshold in (0.6, 1.4):
        found = RobustAutoencoder((32, 16), threshold=threshold, random_state=seed, **settings).fit(X)
        flagged[threshold] = found.S_.any(1)
    assert np.mean(aurocs) >= 0.9
    assert flagged[0.6].sum() > flagged[0.8].sum() > flagged[1.4].sum()
