"""What decoding costs a run on pictures of ImageNet's size, and what the cache of decoded pixels saves.

`python -m benchmarks.decoding --pictures DIR` enlarges --count pictures found below DIR to --stored pixels (JPEG,
quality 90), lays them out as ImageNet-30, and times epochs of two 224-pixel crops each, decoded every time and from
the cache, in turns. Without DIR the pictures are smooth noise.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.device import reuse_host_memory
from common.errors import UserError, command
from common.progress import progress
from datasets import DATASETS, DataSource, Loading, PictureSet
from datasets.augment import AlignedSpec
from datasets.listing import list_pictures


def lay_out(root: Path, pictures: Path | None, count: int, stored: int) -> None:
    """Write `count` square pictures of `stored` pixels as ImageNet/one_class_train/acorn/*.jpg below `root`."""
    folder = root / "ImageNet/one_class_train/acorn"
    folder.mkdir(parents=True)
    found = list_pictures(pictures) if pictures else []
    if pictures and len(found) < count:
        raise UserError(f"--pictures: {len(found)} pictures below {pictures}, {count} are wanted (--count)")
    rng = np.random.default_rng(0)
    for n in progress(range(count), total=count, label="enlarging pictures"):
        if found:
            with Image.open(found[n]) as file:
                picture = file.convert("RGB")
        else:
            picture = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        picture.resize((stored, stored), Image.Resampling.BICUBIC).save(folder / f"{n:06}.jpg", quality=90)


def epoch_seconds(data: PictureSet, epoch: int, batch_size: int = 128) -> float:
    """Seconds of one epoch of two crops of each picture."""
    begun = time.perf_counter()
    for _ in data.batches(torch.arange(len(data)).split(batch_size), Loading(views=2), seed=0, epoch=epoch):
        pass
    return time.perf_counter() - begun


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=__doc__)
    parser.add_argument("--pictures", type=Path, help="folder to take pictures from")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--stored", type=int, default=256, help="pixels on a side of the pictures on disk")
    parser.add_argument("--num_worker", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="epochs of each kind")
    args = parser.parse_args(argv)
    reuse_host_memory()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        lay_out(root, args.pictures, args.count, args.stored)
        source = DataSource(str(root), image_size=224, num_worker=args.num_worker)
        stream = DATASETS["imagenet"].stream
        assert stream is not None
        plain = stream(source, AlignedSpec(), None)
        begun = time.perf_counter()
        cached = stream(replace(source, image_cache=str(root / "cache")), AlignedSpec(), None)
        built = time.perf_counter() - begun
        size = sum(path.stat().st_size for path in (root / "cache").iterdir()) / 2**20
        kinds = {"decoded each time": plain, "from the cache": cached}
        index = [torch.arange(64)]
        first = [next(iter(data.batches(index, Loading(views=2), seed=0, epoch=0))) for data in kinds.values()]
        if not torch.equal(*first):
            raise RuntimeError("the cache gives other pixels")
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for epoch in range(args.repeats):
            for name, data in kinds.items():
                seconds[name].append(epoch_seconds(data, epoch))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{args.count} pictures of {args.stored} pixels, two crops of 224 each, {args.num_worker} workers")
    for name, median in medians.items():
        spread = f"{args.count / max(seconds[name]):.0f} to {args.count / min(seconds[name]):.0f}"
        print(f"  {name:<18} {args.count / median:7.0f} images/s (median; {spread})")
    ratio = medians["decoded each time"] / medians["from the cache"]
    print(f"  the cache is {ratio:.2f} times as fast; it takes {built:.1f} s to build and {size:.0f} MiB; same pixels")


if __name__ == "__main__":
    sys.exit(main())
