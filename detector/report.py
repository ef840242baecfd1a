"""A report of scores in one HTML file, which needs no network: `report.html`, with the data in it."""

import base64
import heapq
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common.errors import UserError
from common.files import disk_errors, write_text
from datasets.listing import printable
from detector.card import promise
from detector.detector import Detector, Row, shrunk
from detector.scoring import path_text, shares

# Pictures that the gallery shows, the least normal ones, and unreadable ones that it names.
_MOST, _ERRORS = 5000, 1000
_THUMBNAIL, _HEAT_SIDE = 120, 28
_TEMPLATE = Path(__file__).with_name("report.html")


class Report:
    """Takes rows as they come, holds what the page needs of them (3 kB each), and writes it."""

    def __init__(self, detector: Detector, title: str):
        self._detector, self._title = detector, title
        self._scores: list[float] = []
        self._shown: list[tuple[float, int, dict[str, Any]]] = []
        self._errors: list[dict[str, str]] = []

    def add(self, row: Row) -> None:
        name = path_text(row.path)
        if row.why is not None:
            if len(self._errors) < _ERRORS:
                self._errors.append({"name": name, "why": row.why})
            return
        self._scores.append(row.score)
        entry = {"name": name, "score": row.score, "p": row.p_value, "thumb": _base64(_thumbnail(row.small))}
        entry["heat"] = _base64(_small(row.heat)) if row.heat is not None else ""
        # The most normal one is the first to go.
        heapq.heappush(self._shown, (-row.score, len(self._scores), entry))
        if len(self._shown) > _MOST:
            heapq.heappop(self._shown)

    def write(self, path: Path, *, held_out: bool = False) -> None:
        """held_out: the rows are those of the calibration: they are in the gallery alone."""
        data = {
            "title": self._title,
            "promise": promise(self._detector),
            "threshold": self._detector.threshold.value,
            "calibration": self._detector.calibration.tolist(),
            "scores": [] if held_out else self._scores,
            "pictures": len(self._scores),
            "rows": [entry for _, _, entry in sorted(self._shown, key=lambda each: -each[0])],
            "errors": self._errors,
        }
        # Within a script element nothing but "<" can end it.
        text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
        page = _TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", text)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UserError(f"--report: {printable(path)} is a folder; give a file")
        with disk_errors(path.parent):
            write_text(path, page)


def _thumbnail(pixels: np.ndarray | None) -> bytes:
    """A small JPEG of pixels (h, w, 3)."""
    if pixels is None:
        return b""
    buffer = io.BytesIO()
    Image.fromarray(shrunk(pixels, _THUMBNAIL)).save(buffer, "JPEG", quality=70)
    return buffer.getvalue()


def _small(heat: np.ndarray) -> bytes:
    """Heat (S, S) in 28 x 28 bytes."""
    x = F.adaptive_avg_pool2d(torch.from_numpy(heat)[None, None], _HEAT_SIDE)[0, 0].numpy()
    return (shares(x) * 255).round().astype(np.uint8).tobytes()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
