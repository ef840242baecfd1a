"""Read a picture file as a viewer would show it: upright, three channels of 8 bits.

Pictures with more than 8 bits per sample are scaled from a range of values, the same for all pictures of a command
(`Reader`).
"""

import logging
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.errors import UserError
from common.progress import progress
from datasets.listing import common_folder, printable

# The limit is --max_megapixels; Pillow's own limit would apply even where that is higher.
Image.MAX_IMAGE_PIXELS = None
# Pillow warns of odd metadata, on which the pixels do not depend; unreadable pictures are errors.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())

_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "AVIF")
_PLAIN_MODES = frozenset("1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV".split())
# Possible upper ends of a range; the lower end is 0.
_TOPS = {"integers": (255, 1023, 4095, 16383, 65535), "floats": (1, 255, 65535)}
# Longer pictures are cropped to this many times their short side: resizing a picture one pixel high would fill memory.
_LONGEST = 32
_FINDING = threading.RLock()


def check_reading(max_megapixels: float, value_range: Sequence[float] | None) -> None:
    """Raises: UserError for invalid values of these flags."""
    if not max_megapixels > 0:
        raise UserError(f"--max_megapixels must be > 0, got {max_megapixels}")
    if value_range is not None and not (value_range[0] < value_range[1] and np.isfinite(value_range).all()):
        raise UserError(f"--value_range: LOW must be less than HIGH, got {value_range[0]:g} {value_range[1]:g}")


def unreadable(path: Path, error: object, flag: str = "--data_path") -> UserError:
    """The error for a picture that cannot be read."""
    return UserError(f"{flag}: cannot read {printable(path)} ({error}); fix it, or add --skip_bad_images")


def reason(path: Path, error: Exception) -> str:
    """Why a picture cannot be read, with the remedy if there is one."""
    if not isinstance(error, UnidentifiedImageError):
        return getattr(error, "strerror", None) or str(error) or type(error).__name__
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer in place of the picture: run git lfs pull"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page in place of the picture: download it again"
    if head[4:8] == b"ftyp":
        return "HEIC, or another kind that is not readable here: convert it to PNG or JPEG"
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL is not readable here: convert it to PNG or JPEG"
    if head.startswith((b"II*\0", b"MM\0*")):
        return "a TIFF of a layout that is not readable here, or corrupt: convert it to grey or RGB of 8 or 16 bits"
    return "no picture of a kind that can be read, or its header is corrupt"


class Reader:
    """How the pictures of a set are read.

    The range of values is found once, when a picture first needs it: the smallest usual range that holds the largest
    value of `paths`. Integers and floats have one range each.
    paths: returns the pictures from which the range is found.
    before: a reader whose range takes precedence, if it has one (that of the training split).
    value_range: lowest and highest value, in place of the range that would be found; others are clipped.
    max_megapixels: larger pictures are an error. threads: used to find the range. tops: as `find_range` has found them.
    """

    def __init__(
        self,
        paths: Callable[[], Sequence[Path]] = lambda: (),
        *,
        before: "Reader | None" = None,
        value_range: Sequence[float] | None = None,
        max_megapixels: float = 100.0,
        threads: int = 4,
        tops: Mapping[str, float] | None = None,
    ):
        self.paths, self.before, self.threads = paths, before, threads
        self.value_range, self.max_megapixels = value_range, max_megapixels
        self._tops: dict[str, float] | None = None if tops is None else dict(tops)  # of the ranges found
        self._remarks: defaultdict[str, list[str]] = defaultdict(list)

    @contextmanager
    def open(self, path: Path) -> Iterator[Image.Image]:
        """The picture before it is decoded. Raises: ValueError for one that is too large or has too many bands."""
        with open(path, "rb") as file, Image.open(file, formats=_formats()) as picture:
            width, height = picture.size
            if width * height / 1e6 > self.max_megapixels:
                raise ValueError(f"{width} x {height} pixels, more than --max_megapixels {self.max_megapixels:g}")
            if picture.format == "TIFF":
                tags = picture.tag_v2  # type: ignore[attr-defined]
                if not {273, 324, 513} & tags.keys():  # libtiff would print all that it dislikes
                    raise ValueError("its header is corrupt: it does not say where the pixels are")
                if 0 in tags.get(338, ()):  # extra samples that are no alpha, which Pillow would drop
                    bands = tags.get(277, 1)
                    raise ValueError(f"{bands} bands, of which not all are colour or alpha: convert it to RGB or grey")
            yield picture

    def rgb(self, path: Path, draft: int | None = None) -> Image.Image:
        """The picture upright, three channels of 8 bits.

        draft: a short side that suffices; large JPEGs are decoded at the smallest multiple of 1/8 that has it.
        Raises: the errors of Pillow for corrupt files; ValueError for pictures without a defined appearance.
        """
        with self.open(path) as picture:
            if draft is not None:
                picture.draft("RGB", (draft, draft))
            return self.to_rgb(ImageOps.exif_transpose(picture), path.name)

    def to_rgb(self, picture: Image.Image, name: str = "") -> Image.Image:
        """16-bit and float pictures are scaled to 8 bits, transparent ones get a white background, all become RGB."""
        if kind := _kind(picture):
            values = np.asarray(picture)
            low, high = self._range(kind, values, name)
            scaled = _to_bytes(values, low, high)
            if "transparency" in picture.info:  # one level of grey; Pillow forgets it
                scaled[values == picture.info["transparency"]] = 255
            return Image.fromarray(scaled).convert("RGB")
        if picture.mode not in _PLAIN_MODES:
            raise ValueError(f"Pillow's mode {picture.mode}: convert it to RGB or grey")
        if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
            layer = picture.convert("RGBA")
            white = Image.new("RGBA", layer.size, "white")
            return Image.alpha_composite(white, layer).convert("RGB")
        return picture.convert("RGB")

    def report_remarks(self, place: Path) -> None:
        """Print which of the pictures read so far do not fit the range of values well."""
        for remark, names in self._remarks.items():
            some = ", ".join(map(printable, sorted(names)[:5])) + (", ..." if len(names) > 5 else "")
            print(f"note: {printable(place)}: {len(names)} with {remark} ({some}); --value_range LOW HIGH sets another")

    def settings(self) -> list[Any]:
        """What the pixels depend on besides the files, as far as it is known by now."""
        return [self.max_megapixels, self.value_range, self._tops]

    def find_range(self) -> dict[str, float]:
        """The upper end of the range for each kind of value, integers or floats, that occurs in `paths`."""
        with _FINDING:
            if self._tops is None:
                paths = self.paths()
                with ThreadPoolExecutor(max(1, self.threads)) as pool:
                    looked = progress(pool.map(self._largest, paths), total=len(paths), label="looking for the range")
                    found = [item for item in looked if item]
                self._tops = {}
                for kind in sorted({kind for kind, _ in found}):
                    largest = max(value for other, value in found if other == kind)
                    self._tops[kind] = top = next(top for top in _TOPS[kind] if top >= largest)
                    if 4 * largest < top:
                        place = printable(common_folder(paths))
                        values = f"{kind} up to {largest:g} make dark pictures in the range 0..{top:g}"
                        print(f"note: {place}: {values}; --value_range LOW HIGH sets another")
            return self._tops

    def _largest(self, path: Path) -> tuple[str, float] | None:
        """Kind and largest value of a picture that needs a range; None for others and for unreadable ones."""
        try:
            with self.open(path) as picture:
                if kind := _kind(picture):
                    return kind, _extremes(np.asarray(picture), kind)[1]
        except Exception:  # reported when it is read
            pass
        return None

    def _range(self, kind: str, values: np.ndarray, name: str) -> tuple[float, float]:
        least, most = _extremes(values, kind if self.value_range is None else None)
        if self.value_range is not None:
            low, high = self.value_range
        else:
            low, high = 0.0, self._top(kind) or next(top for top in _TOPS[kind] if top >= most)
        if least < low or most > high:
            self._remarks[f"values outside the range {low:g}..{high:g}, clipped"].append(name)
        elif low < most < low + (high - low) / 64:
            self._remarks[f"values so low in the range {low:g}..{high:g} that they come out black"].append(name)
        return low, high

    def _top(self, kind: str) -> float | None:
        return (self.before._top(kind) if self.before else None) or self.find_range().get(kind)


@cache
def _formats() -> tuple[str, ...]:
    """The formats of the known file endings only: a renamed EPS file, say, must not start an interpreter."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _kind(picture: Image.Image) -> str | None:
    """ "floats" or "integers" for a picture with more than 8 bits per sample; None for others."""
    return "floats" if picture.mode == "F" else "integers" if picture.mode.startswith("I") else None


def _extremes(values: np.ndarray, kind: str | None) -> tuple[float, float]:
    """Smallest and largest value. Raises: ValueError for NaN, infinity, or outside the usual ranges of `kind`."""
    least, most = float(values.min()), float(values.max())
    if not np.isfinite([least, most]).all():
        raise ValueError("it holds NaN or infinity")
    if kind is not None and (least < 0 or most > _TOPS[kind][-1]):
        raise ValueError(f"values {least:g}..{most:g} have no usual range: say --value_range LOW HIGH")
    return least, most


def _to_bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale linearly to uint8, low to 0 and high to 255."""
    scaled = np.empty(values.shape, np.uint8)
    # Line by line: in float64 a picture of 100 megapixels would take 800 MB.
    for line, out in zip(values, scaled, strict=True):
        out[:] = ((line.astype(np.float64).clip(low, high) - low) * 255 / (high - low)).round()
    return scaled


def read_upright(path: Path, short_side: int, reader: Reader | None = None) -> Image.Image:
    """One picture, upright and RGB, its short side resized to `short_side` with an anti-aliasing filter.

    Pictures more than 32 times as long as wide are cropped to their middle. reader: None: one for this picture alone.
    """
    upright = (reader or Reader()).rgb(path, draft=2 * short_side)
    width, height = upright.size
    longest = _LONGEST * min(width, height)
    if max(width, height) > longest:
        left, top = (max(0, side - longest) // 2 for side in (width, height))
        upright = upright.crop((left, top, width - left, height - top))
        width, height = upright.size
    scale = short_side / min(width, height)
    size = (max(short_side, round(width * scale)), max(short_side, round(height * scale)))
    return upright if size == upright.size else upright.resize(size, Image.Resampling.BILINEAR)


def centre(pixels: np.ndarray, size: int) -> np.ndarray:
    """The centre crop (3, size, size) of (H, W, 3) pixels."""
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size].transpose(2, 0, 1)


def read_picture(path: Path, size: int, short_side: int | None = None, reader: Reader | None = None) -> np.ndarray:
    """The centre crop of one picture, (3, size, size) uint8, its short side resized to `short_side`, or to `size`."""
    return centre(np.asarray(read_upright(path, short_side or size, reader)), size)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Three channels of 8 bits, as a viewer would show the picture; the range of values is found from it alone."""
    return Reader().to_rgb(picture)
