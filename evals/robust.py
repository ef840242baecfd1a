"""What an autoencoder, robust or not, has found in a data matrix: noise, outlying rows, corrupted columns.

Letters: N rows (images), n entries of a row (features).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.run import recorded_flags
from datasets.table import Table
from evals.metrics import auroc
from evals.result import Result
from evals.trained import Trained, evaluation_mode, settings_of
from models.autoencoder.robust import PENALTIES, reconstruct, threshold_from_contamination
from models.autoencoder.robust_net import RobustNet
from models.autoencoder.specs import SeparationSpec

# Images in a picture.
_SHOWN = 10
# Points of a curve, its best one not counted.
_POINTS = 400
# Trees of the classifier of codes.
_TREES = 100


@dataclass(frozen=True)
class Separation:
    """A data matrix and its parts, (N, n) on the CPU. threshold: that of the sparse part.

    S: None for networks that were trained without one. trained_on: whether L and S are those of training; else L is the
    reconstruction, and S the proximal operator of what is left.
    """

    table: Table
    L: Tensor
    S: Tensor | None
    threshold: float
    trained_on: bool

    @classmethod
    def of(cls, trained: Trained) -> "Separation":
        """Of the data that the flags name; a line reports where it is other data than the network was trained on."""
        net: RobustNet = trained.net  # type: ignore[assignment]
        table = trained.split.train_table(net.shape and net.shape[0])
        if table.rows.shape[1] != net.S.shape[1]:
            takes = f"{trained.title} takes rows of {net.S.shape[1]} entries, the data has {table.rows.shape[1]}"
            if table.shape and net.shape:
                raise UserError(f"--image_size: {takes}; leave the flag out, or give {net.shape[1]}")
            raise UserError(f"--{'data_path' if table.shape else 'npz'}: {takes}; give data of the same length")
        same = trained.facts.get("fingerprint") == table.fingerprint and not _read_otherwise(trained)
        if not same:
            print(f"note: {trained.title} was trained on other data; this is scored by its reconstruction error")
        robust, threshold = len(net.S) > 0, float(net.threshold)
        if robust and same:
            return cls(table, net.L.cpu(), net.S.cpu(), threshold, True)
        with evaluation_mode(net):
            L = reconstruct(net, table.rows.to(trained.device)).cpu()
        S = None
        if robust:
            penalty = PENALTIES[trained.flags.of(SeparationSpec, only=["penalty"]).penalty]
            S = penalty.prox(table.rows - L, threshold)
        return cls(table, L, S, threshold, same)

    @property
    def residual(self) -> Tensor:
        """X - L."""
        return self.table.rows - self.L

    @property
    def S_or_zero(self) -> Tensor:
        """S, which is zero without a sparse part."""
        return torch.zeros_like(self.L) if self.S is None else self.S


def denoise(trained: Trained) -> Iterator[Result]:
    """How well L matches the rows before noise, whether S is where the noise is, and what codes are worth.

    Metrics: `mse/all`, `/corrupted`, `/intact` and `psnr/...` (dB, peak 1) of L against the rows before noise,
    `noisy_mse/...` of X itself; `support/precision`, `/recall` of the non-zero entries of S against the noise;
    `code_accuracy` of a random forest on the codes of X, fitted to training images and tested on test images.
    Without --corrupt the rows themselves are taken for those before noise.
    """
    with trained.world.raise_together():
        parts = Separation.of(trained)
        test = _test_table(trained, parts.table) if len(parts.table.labels.unique()) > 1 else None

    def results() -> Iterator[Result]:
        table = parts.table
        clean = table.rows if table.clean is None else table.clean
        error, before = (parts.L - clean).square(), (table.rows - clean).square()
        places = {"all": torch.ones_like(error, dtype=torch.bool)}
        if table.mask is not None:
            places |= {"corrupted": table.mask, "intact": ~table.mask}
        metrics: dict[str, float] = {}
        for name, place in places.items():
            if not place.any():  # Noise may be everywhere.
                continue
            mse = _mean(error[place])
            metrics |= {f"mse/{name}": mse, f"psnr/{name}": _psnr(mse), f"noisy_mse/{name}": _mean(before[place])}
        if parts.S is not None:
            found = parts.S != 0
            metrics["nonzero"] = _mean(found)
            if table.mask is not None:
                hit = float((found & table.mask).sum())
                metrics["support/precision"] = hit / max(1.0, float(found.sum()))
                metrics["support/recall"] = hit / max(1.0, float(table.mask.sum()))
        metrics |= _code_accuracy(trained, table, test)
        columns = {"mse": error.mean(1), "noisy_mse": before.mean(1), "norm_S": parts.S_or_zero.norm(dim=1)}
        arrays = {}
        if table.shape is not None:
            some = _one_of_each(table.labels)
            shown = {"original": clean, "noisy": table.rows, "L": parts.L, "S": parts.S_or_zero}
            arrays = {title: part[some].unflatten(1, table.shape).numpy() for title, part in shown.items()}
        yield Result("denoise", metrics, {"training": _columns(table, columns)}, _facts(trained, parts), arrays)

    return results()


def outliers(trained: Trained) -> Iterator[Result]:
    """Which rows are outlying, and whether they are those of other classes than the normal one.

    A row is flagged where its row in S has a non-zero entry; without a sparse part, where its score, the norm of X - L,
    lies above the quantile of --contamination. Where the data has other classes: `precision`, `recall`, `f1`,
    `accuracy` (outlying is positive), `roc_auc` and `pr_auc` of the score, and `oracle_f1` at `oracle_threshold`: the
    best over all thresholds of the score, which only labels can tell. Test rows of a table are scored, too (those of
    pictures by `ood_reconstruction`): `test/roc_auc` and `test/pr_auc`.
    """
    with trained.world.raise_together():
        parts = Separation.of(trained)
        unseen = trained.split.test_table() if parts.table.shape is None else None
        unseen = None if unseen is None or _holds(unseen, parts.table) else unseen

    def results() -> Iterator[Result]:
        table = parts.table
        score = parts.residual.norm(dim=1)
        if parts.S is None:
            quantile = trained.flags.of(SeparationSpec, only=["contamination"]).contamination
            threshold = threshold_from_contamination(quantile, parts.residual, PENALTIES["l21_rows"])
            flagged = score > threshold
        else:
            threshold, flagged = parts.threshold, (parts.S != 0).any(1)
        outlying = ~trained.split.normal(table.labels)
        metrics = {"threshold": threshold, "flagged": float(flagged.sum())}
        arrays = {}
        if outlying.any() and not outlying.all():
            metrics |= flag_metrics(flagged.numpy(), outlying.numpy())
            scores = score.numpy()
            metrics |= ranking_metrics(scores, outlying.numpy())
            arrays = curve(scores, outlying.numpy())
            best = int(arrays["f1"].argmax())
            metrics |= {"oracle_f1": float(arrays["f1"][best]), "oracle_threshold": float(arrays["threshold"][best])}
            arrays = _thinned(arrays)
        columns = {"score": score, "flagged": flagged, "norm_S": parts.S_or_zero.norm(dim=1)}
        per_image = {"training": _columns(table, columns)}
        if unseen is not None:
            scores, anomalous = _errors(trained, unseen), ~trained.split.normal(unseen.labels)
            per_image["test"] = _columns(unseen, {"score": scores})
            if anomalous.any() and not anomalous.all():
                found = ranking_metrics(scores.numpy(), anomalous.numpy())
                metrics |= {f"test/{name}": value for name, value in found.items()}
        facts = _facts(trained, parts) | {"n_in": int((~outlying).sum()), "n_out": int(outlying.sum())}
        yield Result("outliers", metrics, per_image, facts, arrays)

    return results()


def features(trained: Trained) -> Iterator[Result]:
    """Which columns are corrupted: those of S with a non-zero entry, by `l21_cols` above all.

    With --corrupt_fixed, `precision`, `recall`, `f1` and `accuracy` against the columns that have noise.
    """
    with trained.world.raise_together():
        parts = Separation.of(trained)
        if parts.S is None:
            raise UserError(f"--load_path: {trained.title} has no sparse part; --mode rdae makes one")

    def results() -> Iterator[Result]:
        assert parts.S is not None
        table = parts.table
        norms, residual = parts.S.norm(dim=0), parts.residual.norm(dim=0)
        flagged = norms > 0
        metrics = {"threshold": parts.threshold, "flagged": float(flagged.sum())}
        columns = {"feature": np.arange(len(norms)), "norm_S": norms.numpy(), "residual": residual.numpy()}
        columns["flagged"] = flagged.numpy()
        fixed = table.mask is not None and bool((table.mask == table.mask[0]).all())
        if fixed:
            assert table.mask is not None
            columns["corrupted"] = table.mask[0].numpy()
            metrics |= flag_metrics(flagged.numpy(), table.mask[0].numpy())
        arrays = {}
        if table.shape is not None:
            arrays = {"norm of S": norms.view(table.shape).numpy(), "flagged": flagged.view(table.shape).numpy()}
            if fixed:
                arrays["corrupted"] = columns["corrupted"].reshape(table.shape)
            arrays["an image"] = table.rows[0].view(table.shape).numpy()
        yield Result("features", metrics, {"features": columns}, _facts(trained, parts), arrays)

    return results()


def flag_metrics(flagged: np.ndarray, positive: np.ndarray) -> dict[str, float]:
    """Precision, recall, F1 and accuracy of flags (N,) against the truth (N,), bool; 0 / 0 is 0."""
    hit = float((flagged & positive).sum())
    precision, recall = hit / max(1, int(flagged.sum())), hit / max(1, int(positive.sum()))
    f1 = 2 * precision * recall / (precision + recall) if hit else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "accuracy": float((flagged == positive).mean())}


def ranking_metrics(scores: np.ndarray, positive: np.ndarray) -> dict[str, float]:
    """ROC-AUC and average precision of scores (N,), high for positive ones."""
    from sklearn.metrics import average_precision_score

    return {
        "roc_auc": auroc(-scores[~positive], -scores[positive]),
        "pr_auc": float(average_precision_score(positive, scores)),
    }


def curve(scores: np.ndarray, positive: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and F1 of flagging scores above each threshold: one between every two different scores.

    Ascending thresholds; the first is 0 or below the least score, and flags all.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(positive[order])
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # of equal scores
    below = np.append(ranked[1:], min(0.0, ranked[-1] - 1))[last]
    precision, recall = hits[last] / (last + 1), hits[last] / max(1, hits[-1])
    f1 = 2 * hits[last] / (last + 1 + hits[-1])
    found = {"threshold": (ranked[last] + below) / 2, "precision": precision, "recall": recall, "f1": f1}
    return {name: values[::-1].astype(np.float64) for name, values in found.items()}


def _thinned(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Some `_POINTS` points of a curve, evenly spread over thresholds, and the one with the best F1."""
    threshold = arrays["threshold"]
    wanted = np.linspace(threshold[0], threshold[-1], _POINTS)
    some = np.searchsorted(threshold, wanted).clip(max=len(threshold) - 1)
    some = np.union1d(some, arrays["f1"].argmax())  # The picture names it.
    return {name: values[some] for name, values in arrays.items()}


def _code_accuracy(trained: Trained, table: Table, test: Table | None) -> dict[str, float]:
    """How often a random forest on codes tells the class; nothing without test rows."""
    if test is None:
        return {}
    from sklearn.ensemble import RandomForestClassifier

    net: Any = trained.net
    with torch.no_grad():
        codes = [net.autoencoder.encode(part.rows.to(trained.device)).cpu().numpy() for part in (table, test)]
    forest = RandomForestClassifier(_TREES, random_state=0).fit(codes[0], table.labels.numpy())
    return {"code_accuracy": float((forest.predict(codes[1]) == test.labels.numpy()).mean())}


def _holds(test: Table, train: Table) -> bool:
    """Whether the training rows are among the test rows, whatever the noise: a file may have one matrix for both."""
    there, here = (part.rows if part.clean is None else part.clean for part in (test, train))
    return int(train.indices.max()) < len(there) and torch.equal(there[train.indices], here)


def _errors(trained: Trained, table: Table) -> Tensor:
    """The norm of the reconstruction error of each row (N,), on the CPU."""
    with evaluation_mode(trained.net):
        return (table.rows - reconstruct(trained.net, table.rows.to(trained.device)).cpu()).norm(dim=1)


def _read_otherwise(trained: Trained) -> bool:
    """Whether the same pictures have other values than in training; their fingerprint is of the files."""
    return trained.path is not None and "value_range" in trained.flags.differences(recorded_flags(trained.path))


def _test_table(trained: Trained, table: Table) -> Table | None:
    """Test rows of the classes that the training rows have; None where they hold the training rows, or there are none,
    which a line reports."""
    try:
        test = trained.split.test_table(table.shape and table.shape[0])
    except UserError as error:
        print(f"note: codes are not judged without test images ({error})")
        return None
    if _holds(test, table):
        return None
    known = torch.isin(test.labels, table.labels.unique())
    return test.where(known) if known.any() else None


def _columns(table: Table, values: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """index, label, values, and path for pictures in folders."""
    found = {"index": table.indices.numpy(), "label": table.labels.numpy()}
    found |= {name: value.numpy() for name, value in values.items()}
    return found | ({"path": np.array(table.paths, dtype=object)} if table.paths else {})


def _facts(trained: Trained, parts: Separation) -> dict[str, Any]:
    table = parts.table
    data = {"training": {"images": len(table), "fingerprint": table.fingerprint}}
    shape = table.shape and list(table.shape)
    return {"data": data, "settings": settings_of(trained.flags), "trained_on": parts.trained_on, "shape": shape}


def _one_of_each(labels: Tensor) -> Tensor:
    """Places of ten images: the first of each class, then the first others, in order of label."""
    first = [int((labels == label).nonzero()[0]) for label in labels.unique()][:_SHOWN]
    others = [n for n in range(min(len(labels), 2 * _SHOWN)) if n not in first]
    return torch.tensor((first + others)[:_SHOWN])


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else 0.0


def _psnr(mse: float) -> float:
    """Of a mean squared error, in dB, for a peak of 1; at most 200."""
    return 200.0 if mse < 1e-20 else -10 * float(np.log10(mse))
