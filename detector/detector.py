"""The detector: what `detect.py` fits, writes and reads. Higher scores are more normal.

`Detector.load(path)` needs neither the training pictures nor the weights that it was made of.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from common.errors import UserError
from common.files import disk_errors, write_whole
from datasets.decode import Reader
from datasets.listing import printable
from detector.calibration import Threshold, benjamini_hochberg, p_values
from detector.features import one_thread, pyramid, resized
from detector.net import PatchNet, Scored, Term
from detector.patches import METHODS
from detector.pictures import Unreadable, read

FORMAT, VERSION = "admm-srnet detector", 2
# The blur of a heatmap, in pixels of the network's input.
_BLUR = 4.0

T = TypeVar("T")
R = TypeVar("R")
# A file, or pixels (H, W, 3), uint8.
Picture = str | os.PathLike[str] | np.ndarray


@dataclass(frozen=True)
class Row:
    """What is found of one file. why: it cannot be read. Else score, p-value, whether it is an anomaly, seconds.

    heat (S, S), small: the picture, shrunk into S x S pixels (h, w, 3). Where they were asked for.
    """

    path: Path
    score: float = float("nan")
    p_value: float = float("nan")
    anomalous: bool = False
    seconds: float = 0.0
    why: str | None = None
    heat: np.ndarray | None = None
    small: np.ndarray | None = None

    @property
    def verdict(self) -> str:
        return "error" if self.why else "anomaly" if self.anomalous else "normal"


@dataclass(frozen=True)
class Detector:
    """config: what the card says (JSON). calibration (m,): scores of normal pictures that the fit has not seen."""

    net: nn.Module
    calibration: np.ndarray
    config: dict[str, Any]

    @cached_property
    def threshold(self) -> Threshold:
        """At the false-alarm rate that the detector was made for, or as near as its calibration can promise; or, with
        nothing promised, as known defects have it."""
        if "known_defects" in self.config:
            return Threshold.without_promise(self.calibration, self.config["known_defects"]["threshold"])
        return Threshold.at(self.calibration, self.config["false_alarms"], self.config["confidence"])

    @property
    def size(self) -> int:
        """Pixels on a side of what the network sees."""
        return int(self.config["image_size"])

    @property
    def looks_at_places(self) -> bool:
        """Whether it has heatmaps."""
        return any(METHODS[name].places for name in self.config["method"] if name in METHODS)

    def reader(self) -> Reader:
        """How pictures are read: as those of the fit were."""
        how = self.config["reading"]
        return Reader(max_megapixels=how["max_megapixels"], value_range=how["value_range"], tops=how["tops"])

    def score_samples(self, pictures: Sequence[Picture], workers: int = 1) -> np.ndarray:
        """(n,): of each picture alone; the others, their order and the number of workers change no bit of it.

        Raises: UserError for a picture that cannot be read.
        """
        return np.array([score for score, _ in self._all(pictures, workers)])

    def predict(self, pictures: Sequence[Picture], workers: int = 1) -> np.ndarray:
        """(n,): +1 for normal pictures, -1 for anomalies."""
        return np.where(self.score_samples(pictures, workers) < self.threshold.value, -1, 1)

    def p_values(self, pictures: Sequence[Picture], workers: int = 1) -> np.ndarray:
        """(n,): conformal; of a normal picture at most t with a chance of at most t."""
        return p_values(self.score_samples(pictures, workers), self.calibration)

    def select(self, pictures: Sequence[Picture], rate: float, workers: int = 1) -> np.ndarray:
        """(n,): which to call anomalies, so that at most a share `rate` of those is expected to be normal."""
        return benjamini_hochberg(self.p_values(pictures, workers), rate)

    def heatmap(self, picture: Picture) -> np.ndarray:
        """(H, W) of the picture's own size: how unusual each place is, in standard deviations of normal patches."""
        pixels = _pixels(picture, self.reader())
        ((_, scored),) = self._all([pixels], 1)
        return self._heat(scored, pixels.shape[:2])

    def rows(
        self,
        paths: Iterable[Path],
        workers: int = 1,
        *,
        drawn: bool = False,
    ) -> Iterator[Row]:
        """What is found of each file, in order and in constant memory; unreadable files are rows, too.

        drawn: with heatmaps, where there are any, and small pictures.
        """
        reader, heat = self.reader(), drawn and self.looks_at_places

        def one(path: Path) -> Row:
            start = perf_counter()
            pixels = read(path, reader)
            if isinstance(pixels, Unreadable):
                return Row(path, why=pixels.why)
            scored = self._score(pixels)
            score, seconds = float(scored.score), perf_counter() - start
            return Row(
                path,
                score,
                float(p_values(np.array([score]), self.calibration)[0]),
                not score >= self.threshold.value,
                seconds,
                heat=self._heat(scored, (self.size, self.size)) if heat else None,
                small=shrunk(pixels, self.size) if drawn else None,
            )

        with one_thread():
            yield from in_order(one, paths, workers)

    def _all(self, pictures: Sequence[Picture], workers: int) -> list[tuple[float, Scored]]:
        reader = self.reader()

        def one(picture: Picture) -> tuple[float, Scored]:
            scored = self._score(_pixels(picture, reader))
            return float(scored.score), scored

        with one_thread():
            return list(in_order(one, pictures, workers))

    @torch.inference_mode()
    def _score(self, pixels: np.ndarray) -> Scored:
        return self.net(resized(pixels, self.size))

    def _heat(self, scored: Scored, size: tuple[int, int]) -> np.ndarray:
        maps = [upright(far, self.size) for far in scored.maps if far.shape[1] > 1]
        if not maps:
            raise UserError(f"--method {' '.join(self.config['method'])}: it does not look at places: no heatmap")
        heat = blurred(torch.stack(maps).mean(0))
        return F.interpolate(heat, size, mode="bilinear", antialias=True)[0, 0].numpy()

    def save(self, path: Path) -> None:
        """Write one file, whole or not at all: tensors, and a header that says all else (safetensors)."""
        tensors = {f"net.{name}": value.contiguous() for name, value in self.net.state_dict().items()}
        tensors["calibration"] = torch.from_numpy(self.calibration)
        header = {"format": FORMAT, "version": VERSION, **self.config}
        header.pop("checksum", None)
        header["checksum"] = _checksum(tensors, header)
        whole = save(tensors, metadata={"detector": json.dumps(header)})

        def write(file: BinaryIO) -> None:
            file.write(whole)

        path.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(path.parent):
            write_whole(path, write)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Detector":
        """Raises: UserError for a file that is missing, corrupt, altered, or of another kind or version."""
        path = Path(path)
        tensors, header = _read_file(path)
        claimed = header.pop("checksum", None)
        if header.get("format") != FORMAT:
            raise UserError(f"{printable(path)}: no detector of this program; `detect.py fit` makes one")
        if header.get("version") != VERSION:
            raise UserError(f"{printable(path)}: of version {header.get('version')}, this program reads {VERSION}")
        if claimed != _checksum(tensors, header):
            raise UserError(
                f"{printable(path)}: altered or corrupt (its checksum differs); fit it anew, or copy it again"
            )
        config = {name: value for name, value in header.items() if name not in ("format", "version")}
        config["checksum"] = claimed
        calibration = tensors.pop("calibration").numpy()
        state = {name.removeprefix("net."): value for name, value in tensors.items()}
        try:
            return cls(_build(state, config), calibration, config)
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{printable(path)}: its parts do not fit together ({error})") from None

    def with_config(self, **more: Any) -> "Detector":
        """The same with other entries of its card."""
        return replace(self, config={**self.config, **more})


def _build(state: dict[str, Tensor], config: dict[str, Any]) -> nn.Module:
    if "flags" in config:
        from detector.trained import rebuilt  # Not before it is needed: it loads all of training.

        return rebuilt(config["method"][0], state, config["flags"])
    terms = []
    for i, (name, stride) in enumerate(config["terms"]):
        prefix = f"terms.{i}."
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        tensors = {key.removeprefix("model."): value for key, value in own.items() if key.startswith("model.")}
        model = METHODS[name].fits[stride].model(**tensors)
        terms.append(Term(model, stride, own["weight"], own["units"]))
    net = PatchNet(pyramid(config["backbone"]), terms)
    net.load_state_dict(state)
    return net.eval()


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("detector", "{}"))
            return {name: file.get_tensor(name).clone() for name in file.keys()}, header  # noqa: SIM118
    except (OSError, SafetensorError, ValueError):
        reason = "no detector, or cut off" if path.is_file() else "no such file"
        raise UserError(f"{printable(path)}: cannot be read ({reason}); `detect.py fit` makes one") from None


def _checksum(tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    """SHA-256 of all tensors, by name, and of the header."""
    whole = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        whole.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        whole.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def _pixels(picture: Picture, reader: Reader) -> np.ndarray:
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise UserError(f"pixels must be (H, W, 3), uint8, got {picture.shape}, {picture.dtype}")
        return picture
    found = read(Path(picture), reader)
    if isinstance(found, Unreadable):
        raise UserError(f"cannot read {printable(found.path)} ({found.why})")
    return found


def in_order(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """work(item) of each item, in order, some ahead."""
    if workers <= 1:
        yield from map(work, items)
        return
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()


def shrunk(pixels: np.ndarray, side: int) -> np.ndarray:
    """Pixels (H, W, 3), in the same proportions within a square."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side))
    return np.asarray(picture)


def upright(far: Tensor, size: int) -> Tensor:
    """Patches (1, P) as a map (1, 1, size, size)."""
    side = round(far.shape[1] ** 0.5)
    return F.interpolate(far.view(1, 1, side, side), (size, size), mode="bilinear", align_corners=False)


def blurred(x: Tensor) -> Tensor:
    """Gaussian blur of (1, 1, S, S), edges repeated."""
    radius = round(3 * _BLUR)
    taps = torch.exp(-torch.arange(-radius, radius + 1).square() / (2 * _BLUR**2))
    taps = taps / taps.sum()
    x = F.conv2d(F.pad(x, (radius, radius, 0, 0), mode="replicate"), taps.view(1, 1, 1, -1))
    return F.conv2d(F.pad(x, (0, 0, radius, radius), mode="replicate"), taps.view(1, 1, -1, 1))
