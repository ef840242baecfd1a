"""How good a detector is where defects are known: rates, AUROC, and where masks exist, pixels.

Letters: n pictures, S pixels on a side.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from common.errors import UserError
from common.progress import progress
from datasets.listing import class_folders, printable
from detector.calibration import interval
from detector.detector import Detector, Row
from detector.pictures import below
from detector.report import Report
from evals.metrics import aupr_anomalous, auroc, auroc_interval, fpr_at_recall

GOOD = "good"
# Per-region overlap is averaged over false-positive rates up to this (Bergmann et al. 2020).
_PRO_LIMIT = 0.3
# Worst mistakes that are listed, of each kind.
_WORST = 5


class Judged(NamedTuple):
    """metrics: JSON. rows: of each readable picture, with its kind, good or a defect. bad: unreadable ones."""

    metrics: dict[str, Any]
    rows: list[tuple[str, Row]]
    bad: list[Row]


def test_pictures(place: Path, flag: str = "DIR") -> tuple[dict[str, list[Path]], Path | None]:
    """The pictures of DIR, or of its folder test, by kind: good, and one folder for each defect; the masks' folder.

    Raises: UserError where there is no folder of good pictures, or none of defects.
    """
    root = place / "test" if (place / "test" / GOOD).is_dir() else place
    names = [name for name in class_folders(root) if name not in ("ground_truth", "train")]
    found = {name: below(root / name, flag) for name in names}
    found = {name: paths for name, paths in found.items() if paths}
    if GOOD not in found or len(found) < 2:
        raise UserError(f"{flag}: {printable(root)} is to have a folder good and at least one folder of defects")
    masks = next((folder for folder in (root / "ground_truth", root.parent / "ground_truth") if folder.is_dir()), None)
    return found, masks


def judge(detector: Detector, place: Path, workers: int, report: Report | None = None) -> Judged:
    """Score all test pictures and compare. Prints nothing. report: takes the rows, too."""
    by_kind, masks = test_pictures(place)
    kinds = [kind for kind, paths in by_kind.items() for _ in paths]
    paths = [path for each in by_kind.values() for path in each]
    size = detector.size
    rows: list[tuple[str, Row]] = []
    bad, pixels = [], _Pixels()
    found = detector.rows(paths, workers, drawn=masks is not None or report is not None)
    for kind, row in zip(kinds, progress(found, total=len(paths), label="scoring"), strict=True):
        if report:
            report.add(row)
        if row.why:
            bad.append(row)
            continue
        if row.heat is not None and masks is not None:
            mask = _mask(masks, kind, row.path, size)
            if mask is not None:
                pixels.add(row.heat, mask)
        rows.append((kind, replace(row, heat=None, small=None)))
    if len({kind for kind, _ in rows}) < 2 or not any(kind == GOOD for kind, _ in rows):
        raise UserError("DIR: no readable picture is left of the good ones, or of the defects")
    return Judged({**_metrics(rows, detector), **pixels.metrics()}, rows, bad)


def calibrated(detector: Detector, place: Path, workers: int) -> Detector:
    """The detector with the threshold that tells these good pictures and defects apart best: by the difference of
    detection and false-alarm rate, halfway between two scores."""
    rows = judge(detector, place, workers).rows
    good = np.array([row.score for kind, row in rows if kind == GOOD])
    defects = np.array([row.score for kind, row in rows if kind != GOOD])
    scores = np.unique(np.concatenate([good, defects]))
    limits = np.r_[(scores[1:] + scores[:-1]) / 2, scores[-1] + 1]
    found, false = ((of[:, None] < limits).mean(0) for of in (defects, good))
    best = int((found - false).argmax())
    known = {"threshold": float(limits[best]), "detection_rate": float(found[best])}
    known |= {"false_alarm_rate": float(false[best]), "good": len(good), "defects": len(defects)}
    return detector.with_config(known_defects=known)


def _metrics(rows: Sequence[tuple[str, Row]], detector: Detector) -> dict[str, Any]:
    good = np.array([row.score for kind, row in rows if kind == GOOD])
    defects = {
        name: np.array([row.score for kind, row in rows if kind == name])
        for name in dict.fromkeys(kind for kind, _ in rows if kind != GOOD)
    }
    pooled = np.concatenate(list(defects.values()))
    limit = detector.threshold.value
    alarms, hits = int((good < limit).sum()), int((pooled < limit).sum())
    seconds = [row.seconds for _, row in rows]
    low, high = auroc_interval(good, [pooled])
    return {
        "auroc": auroc(good, pooled),
        "auroc_interval": [low, high],
        "auroc_by_defect": {name: auroc(good, scores) for name, scores in defects.items()},
        "aupr": aupr_anomalous(good, pooled),
        "fpr_at_95_recall": _false_alarms_at_recall(good, pooled),
        "false_alarm_rate": alarms / len(good),
        "false_alarm_interval": interval(alarms, len(good)),
        "detection_rate": hits / len(pooled),
        "detection_interval": interval(hits, len(pooled)),
        "detection_by_defect": {name: float((scores < limit).mean()) for name, scores in defects.items()},
        "images": {GOOD: len(good), **{name: len(scores) for name, scores in defects.items()}},
        "images_per_second": 1 / float(np.mean(seconds)),
    }


def _false_alarms_at_recall(good: np.ndarray, defects: np.ndarray) -> float:
    """The share of good pictures that are alarms where 95 % of the defects are found."""
    return fpr_at_recall(-defects, -good)


def worst(rows: Iterable[tuple[str, Row]]) -> tuple[list[tuple[str, Row]], list[tuple[str, Row]]]:
    """The good pictures that look the most anomalous, and the defects that look the most normal."""
    rows = sorted(rows, key=lambda each: each[1].score)
    good = [each for each in rows if each[0] == GOOD and each[1].anomalous]
    missed = [each for each in reversed(rows) if each[0] != GOOD and not each[1].anomalous]
    return good[:_WORST], missed[:_WORST]


def _mask(masks: Path, kind: str, path: Path, size: int) -> np.ndarray | None:
    """The defect's pixels (S, S); none of a good picture. None where there is no mask of a defect."""
    if kind == GOOD:
        return np.zeros((size, size), bool)
    for name in (f"{path.stem}.png", f"{path.stem}_mask.png", f"{path.stem}.bmp", path.name):
        if (masks / kind / name).is_file():
            with Image.open(masks / kind / name) as picture:
                small = picture.convert("L").resize((size, size), Image.Resampling.BOX)
                return np.asarray(small) > 127
    return None


class _Pixels:
    """Pixel AUROC and PRO, from histograms of heat: constant memory.

    Heat is in standard deviations of normal patches; values outside -10 to 90 share the bins at the ends.
    """

    _BINS = 4000

    def __init__(self) -> None:
        self._edges = np.linspace(-10, 90, self._BINS)
        self._clean = np.zeros(self._BINS + 1)
        self._defect = np.zeros(self._BINS + 1)
        self._regions: list[np.ndarray] = []

    def add(self, heat: np.ndarray, mask: np.ndarray) -> None:
        from scipy.ndimage import label

        place = np.searchsorted(self._edges, heat.ravel()).reshape(heat.shape)
        self._clean += np.bincount(place[~mask], minlength=self._BINS + 1)
        self._defect += np.bincount(place[mask], minlength=self._BINS + 1)
        regions, count = label(mask)
        for number in range(1, count + 1):
            own = np.bincount(place[regions == number], minlength=self._BINS + 1)
            self._regions.append((own[::-1].cumsum() / own.sum()).astype(np.float32))

    def metrics(self) -> Mapping[str, float]:
        if not self._regions:
            return {}
        false = self._clean[::-1].cumsum() / self._clean.sum()
        found = self._defect[::-1].cumsum() / self._defect.sum()
        area = float(np.trapezoid(np.r_[0, found], np.r_[0, false]))
        overlap = np.mean(self._regions, axis=0)
        inside = np.r_[0, false[false < _PRO_LIMIT], _PRO_LIMIT]
        pro = float(np.trapezoid(np.interp(inside, np.r_[0, false], np.r_[0, overlap]), inside)) / _PRO_LIMIT
        return {"pixel_auroc": area, "pro": pro, "regions": len(self._regions)}


def told(found: Judged, detector: Detector) -> list[str]:
    """Lines for a terminal."""
    m = found.metrics
    rate = detector.threshold
    lines = [
        f"AUROC {100 * m['auroc']:.1f}  (95 % interval {100 * m['auroc_interval'][0]:.1f} to"
        f" {100 * m['auroc_interval'][1]:.1f}), AUPR {100 * m['aupr']:.1f}, false alarms where 95 % of the defects are"
        f" found {100 * m['fpr_at_95_recall']:.1f} %",
        f"at the threshold {rate.value:.4f}: false alarms {_share(m['false_alarm_rate'], m['false_alarm_interval'])},"
        f" defects found {_share(m['detection_rate'], m['detection_interval'])}",
        *(
            f"  {name}: AUROC {100 * value:.1f},"
            f" found {100 * m['detection_by_defect'][name]:.0f} % of {m['images'][name]}"
            for name, value in m["auroc_by_defect"].items()
        ),
    ]
    if "pixel_auroc" in m:
        lines.append(f"pixels: AUROC {100 * m['pixel_auroc']:.1f}, PRO {100 * m['pro']:.1f} ({m['regions']} regions)")
    false, missed = worst(found.rows)
    for title, rows in (("good pictures called anomalous", false), ("defects called normal", missed)):
        if rows:
            lines.append(f"worst {title}:")
            lines += [f"  {row.score:8.3f}  {kind}  {printable(row.path)}" for kind, row in rows]
    lines += [f"error: {printable(row.path)}: {row.why}" for row in found.bad]
    return [*lines, f"{m['images_per_second']:.1f} pictures a second of each worker"]


def _share(rate: float, bounds: Sequence[float]) -> str:
    return f"{100 * rate:.1f} % ({100 * bounds[0]:.1f} to {100 * bounds[1]:.1f})"
