"""Draw a folder of parts to try `detect.py` on: `python -m scripts.example_parts FOLDER`.

Turned discs with four holes, under light that varies; some with a scratch, a stain or a hole too few.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from common.errors import UserError, command
from common.seed import seed_of

_SIZE, _FINE = 256, 2
DEFECTS = ("scratch", "stain", "hole_missing")
# Folder, how many, defect.
_SETS = (("train/good", 160, ""), ("test/good", 40, ""), *((f"test/{defect}", 15, defect) for defect in DEFECTS))


def draw(rng: np.random.Generator, defect: str = "") -> Image.Image:
    """One part, 256 pixels square."""
    n = _SIZE * _FINE
    y, x = np.mgrid[:n, :n] / n - 0.5 - rng.normal(0, 0.004, (2, 1, 1))
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    turned = rng.normal(0, 1, 400)[(radius * 700).astype(int).clip(0, 399)]
    light = 0.5 + rng.normal(0, 0.03) + 0.12 * np.cos(2 * angle + 0.6) + 0.1 * (x * rng.normal(1, 0.3) - y)
    metal = light + 0.02 * turned
    ground = 0.18 + 0.01 * rng.normal(0, 1, (n, n))
    picture = np.where((radius < 0.4) & (radius > 0.13), metal, ground)
    holes = range(1, 4) if defect == "hole_missing" else range(4)
    for k in holes:
        centre = np.pi / 4 + k * np.pi / 2
        inside = np.hypot(x - 0.27 * np.cos(centre), y - 0.27 * np.sin(centre)) < 0.045
        picture = np.where(inside, 0.1, picture)
    image = Image.fromarray((255 * picture.clip(0, 1)).astype(np.uint8))
    # Between two holes.
    pen, at = ImageDraw.Draw(image), rng.integers(4) * np.pi / 2 + rng.uniform(-0.3, 0.3)
    middle = n / 2 + 0.27 * n * np.array([np.cos(at), np.sin(at)])
    if defect == "scratch":
        way = rng.normal(0, 1, 2)
        way *= rng.uniform(0.06, 0.12) * n / np.hypot(*way)
        pen.line([*(middle - way), *(middle + way)], fill=int(rng.uniform(205, 240)), width=_FINE + 1)
    if defect == "stain":
        blot = Image.new("L", image.size)
        spread = rng.uniform(0.02, 0.035) * n
        ImageDraw.Draw(blot).ellipse([*(middle - spread), *(middle + spread)], fill=int(rng.uniform(90, 150)))
        dark = Image.new("L", image.size, 30)
        image = Image.composite(dark, image, blot.filter(ImageFilter.GaussianBlur(spread / 3)))
    image = image.filter(ImageFilter.GaussianBlur(0.8)).resize((_SIZE, _SIZE), Image.Resampling.BOX)
    noisy = np.asarray(image) + rng.normal(0, 2, (_SIZE, _SIZE))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.example_parts", description=__doc__)
    parser.add_argument("folder", type=Path)
    root = parser.parse_args(argv).folder
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"FOLDER: {root} is there already; name a new one")
    for folder, count, defect in _SETS:
        (root / folder).mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng(seed_of(0, folder, i))
            draw(rng, defect).save(root / folder / f"{i:03}.png")
    print(f"wrote {sum(count for _, count, _ in _SETS)} pictures to {root}")


if __name__ == "__main__":
    raise SystemExit(main())
