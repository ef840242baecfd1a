"""Make the data sets that no package hands out, from pictures that you have: `python -m scripts.prepare WHAT ...`.

imagenet30 picks 30 classes out of a folder of ImageNet originals; lsun_fix and imagenet_fix draw pictures and make them
32 x 32 pixels; tiny_imagenet sorts those of the published archive by class, for `--dataset folder`. The same command
goes on where an earlier one was stopped.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps

from common.errors import UserError, command
from common.files import write_text, write_whole
from common.progress import progress
from common.seed import generator
from datasets.decode import Reader, check_reading, reason, unreadable
from datasets.listing import (
    ENDINGS,
    PREPARED,
    LeftOut,
    class_folders,
    common_folder,
    list_pictures,
    pictures_below,
    printable,
)

# Names and WordNet ids of ImageNet-30; the index of a class is its place in alphabetical order.
IMAGENET30 = {
    "acorn": "n12267677",
    "airliner": "n02690373",
    "ambulance": "n02701002",
    "american_alligator": "n01698640",
    "banjo": "n02787622",
    "barn": "n02793495",
    "bikini": "n02837789",
    "digital_clock": "n03196217",
    "dragonfly": "n02268443",
    "dumbbell": "n03255030",
    "forklift": "n03384352",
    "goblet": "n03443371",
    "grand_piano": "n03452741",
    "hotdog": "n07697537",
    "hourglass": "n03544143",
    "manhole_cover": "n03717622",
    "mosque": "n03788195",
    "nail": "n03804744",
    "parking_meter": "n03891332",
    "pillow": "n03938244",
    "revolver": "n04086273",
    "rotary_dial_telephone": "n03187595",
    "schooner": "n04147183",
    "snowmobile": "n04252077",
    "soccer_ball": "n04254680",
    "stingray": "n01498041",
    "strawberry": "n07745940",
    "tank": "n04389033",
    "toaster": "n04442312",
    "volcano": "n09472597",
}
FIX_FOLDERS = {"lsun_fix": "LSUN_fix", "imagenet_fix": "Imagenet_fix"}
FIX_SIDE = 32
TINY_FOLDER = "TinyImageNet"
# Of the published archive: which class each picture of `val/images` is of.
_ANNOTATIONS = "val/val_annotations.txt"
# At most so many names in an error.
_NAMED = 5


class Job(NamedTuple):
    """One picture to make."""

    source: Path
    target: Path


def shorten(picture: Image.Image, size: int) -> Image.Image:
    """Short side `size` at the same aspect ratio, anti-aliased; a picture that is no larger is left as it is."""
    short = min(picture.size)
    if short <= size:
        return picture
    width, height = (round(side * size / short) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BILINEAR)


def fix(picture: Image.Image) -> Image.Image:
    """32 x 32 pixels: short side to 32, centre crop, every pixel a weighted mean of all that it covers.

    The "fix" sets exist because the usual resized ones bear marks of careless resizing, and a detector that has learnt
    nothing of their content tells them by these marks. So resizing may leave none: Pillow's bilinear filter grows with
    the scale (no aliasing) and has no negative lobes (no halos, as bicubic and Lanczos give). And the picture is
    cropped, not squashed: most pictures are wider than tall, so that a squashed set shows slim people and cars, which
    is another mark. What this costs is the two ends of the long side.
    """
    return ImageOps.fit(picture, (FIX_SIDE, FIX_SIDE), Image.Resampling.BILINEAR)


def find_imagenet30(source: Path, out: dict[str, Path]) -> list[Job]:
    """Jobs that turn `<source>/<split>/<WordNet id or name>/*` into `out[split]/<name>/*.jpg`.

    Raises: UserError that names every class without pictures, or two pictures that would become one file.
    """
    jobs: dict[Path, Job] = {}
    missing = []
    left_out = LeftOut()
    for split, folder in out.items():
        for name, wnid in IMAGENET30.items():
            folders = [source / split / alias for alias in (wnid, name)]
            pictures = [path for below in folders for path in pictures_below(below, left_out, "--source")]
            if not pictures:
                missing.append(f"{split}/{wnid} ({name})")
            for path in pictures:
                target = folder / name / f"{path.stem}.jpg"
                if target in jobs:
                    both = f"{printable(jobs[target].source)} and {printable(path)}"
                    raise UserError(f"--source: {both} would both become {printable(target)}")
                jobs[target] = Job(path, target)
    left_out.report(source)
    if missing:
        raise UserError(f"--source: no pictures in {source} for {', '.join(missing)}")
    return list(jobs.values())


def find_tiny_imagenet(source: Path, out: Path) -> list[Job]:
    """Jobs that turn the archive's folder into `out/{train,test}/<WordNet id>/*`.

    There it is `train/<WordNet id>/images/*` and `val/images/*`, whose classes are in `val/val_annotations.txt`: a line
    of a name and a WordNet id, with tabs between. The classes of both splits are those of `train`, sorted, whichever
    of them the annotations name.
    Raises: UserError for a source of another form, and for pictures and annotations that do not fit.
    """
    left_out = LeftOut()
    jobs = [
        Job(path, out / "train" / wnid / path.name)
        for wnid in class_folders(source / "train")
        for path in pictures_below(source / "train" / wnid, left_out, "--source")
    ]
    known = {job.target.parent.name for job in jobs}
    wnids = _annotations(source / _ANNOTATIONS)
    pictures = {path.name: path for path in pictures_below(source / "val" / "images", left_out, "--source")}
    left_out.report(source)
    wrong = {
        "no pictures in train/ for": sorted({*wnids.values(), *class_folders(source / "train")} - known),
        f"no line in {_ANNOTATIONS} for": sorted(pictures.keys() - wnids.keys()),
        "no picture in val/images for the annotation of": sorted(wnids.keys() - pictures.keys()),
    }
    for what, names in wrong.items():
        if names:
            some = ", ".join(map(printable, names[:_NAMED])) + (", ..." if len(names) > _NAMED else "")
            raise UserError(f"--source: {what} {some} ({len(names)}); unpack the archive again")
    return jobs + [Job(pictures[name], out / "test" / wnid / name) for name, wnid in wnids.items()]


def _annotations(path: Path) -> dict[str, str]:
    """Of each picture its WordNet id. Raises: UserError for a file that is not there or of another form."""
    try:
        rows = [line.split("\t") for line in path.read_text().splitlines() if line]
        return {row[0]: row[1] for row in rows}
    except (OSError, ValueError, IndexError):
        raise UserError(
            f"--source: {printable(path)} is not there or holds no lines of NAME and WordNet id; give the folder of"
            " the unpacked archive, tiny-imagenet-200"
        ) from None


def draw(pictures: Sequence[Path], out: Path, *, count: int, seed: int) -> list[Job]:
    """Jobs that turn `count` of the pictures (all, if there are fewer) into `out/NNNNN.png`, numbered as drawn.

    A larger count goes on with the same draw: its first pictures are those of the smaller one.
    """
    order = torch.randperm(len(pictures), generator=generator(seed, "prepare")).tolist()
    return [Job(pictures[index], out / f"{n:05d}.png") for n, index in enumerate(order[:count])]


def check_source(source: Path, folders: Sequence[Path]) -> None:
    """Raises: UserError where the source is no folder, or one of `folders`, to be written to, lies in it."""
    if not source.is_dir():
        raise UserError(f"--source: no folder {source}")
    for folder in folders:
        if folder.resolve().is_relative_to(source.resolve()):
            raise UserError(f"--data_path: {folder} lies in --source {source}; choose a folder outside")


def claim(folders: Sequence[Path], settings: dict[str, Any]) -> None:
    """Create the folders, or see that they hold pictures of the same settings (PREPARED): kinds must not mix.

    Raises: UserError, before anything is written, where settings differ or pictures are there that came otherwise.
    """
    for folder in folders:
        note = folder / PREPARED
        if note.is_file():
            if note.read_text() != _text(settings):
                raise UserError(f"--data_path: {note} names other settings than {_text(settings)}; move {folder} away")
        elif pictures_below(folder, LeftOut()):
            raise UserError(f"--data_path: {folder} holds pictures that this command did not make; move them away")
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / PREPARED).is_file():
                write_text(folder / PREPARED, _text(settings))
    except OSError as error:
        raise UserError(f"--data_path: cannot write to {folder} ({error.strerror})") from None


def _text(settings: dict[str, Any]) -> str:
    return json.dumps(settings)


def make(
    jobs: Sequence[Job],
    change: Callable[[Image.Image], Image.Image],
    reader: Reader,
    *,
    threads: int,
    skip_bad: bool,
    **save: Any,
) -> None:
    """Do the jobs whose target is not there yet and print the counts; `save` goes to Pillow (format, quality).

    Raises: UserError for a picture that cannot be read, unless `skip_bad`, and for one that cannot be written.
    """

    def work(job: Job) -> bool:
        try:
            changed = change(reader.rgb(job.source))
        except Exception as error:  # Pillow raises many kinds for damaged files
            why = reason(job.source, error)
            if skip_bad:
                print(f"--skip_bad_images: cannot read {printable(job.source)} ({why})")
                return False
            raise unreadable(job.source, why, "--source") from None
        try:
            job.target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(job.target, lambda file: changed.save(file, **save))
        except OSError as error:
            raise UserError(f"--data_path: cannot write {printable(job.target)} ({error.strerror})") from None
        return True

    todo = [job for job in jobs if not job.target.exists()]
    # Threads, not processes: Pillow decodes, resizes and encodes outside the interpreter lock.
    with ThreadPoolExecutor(threads) as pool:
        made = sum(progress(pool.map(work, todo), total=len(todo), label="preparing"))
    reader.report_remarks(common_folder([job.source for job in jobs]))
    bad = len(todo) - made
    if bad == len(jobs):
        raise UserError(f"--source: not one of the {bad} pictures can be read")
    left_out = f", {bad} left out (--skip_bad_images)" if bad else ""
    print(f"{len(jobs)} pictures: {made} made, {len(jobs) - len(todo)} there already{left_out}")


def prepare_imagenet30(args: argparse.Namespace) -> None:
    positive(size=args.size, workers=args.workers)
    out = {"train": args.data_path / "ImageNet/one_class_train", "val": args.data_path / "ImageNet/one_class_test"}
    check_source(args.source, list(out.values()))
    jobs = find_imagenet30(args.source, out)
    reader, how = _reader(args, [job.source for job in jobs])
    claim(list(out.values()), {"source": str(args.source.resolve()), "size": args.size, **how})
    change = partial(shorten, size=args.size)
    threads, skip_bad = args.workers, args.skip_bad_images
    make(jobs, change, reader, threads=threads, skip_bad=skip_bad, format="JPEG", quality=95)


def prepare_tiny_imagenet(args: argparse.Namespace) -> None:
    """Copies, not links: the archive may go away. The pictures stay what they are, byte by byte."""
    positive(workers=args.workers)
    root = args.data_path / TINY_FOLDER
    out = [root / "train", root / "test"]
    check_source(args.source, out)
    jobs = find_tiny_imagenet(args.source, root)
    claim(out, {"source": str(args.source.resolve()), "pictures": len(jobs)})

    def copy(job: Job) -> None:
        try:
            content = job.source.read_bytes()
        except OSError as error:
            raise UserError(f"--source: cannot read {printable(job.source)} ({error.strerror})") from None
        try:
            job.target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(job.target, lambda file: file.write(content))
        except OSError as error:
            raise UserError(f"--data_path: cannot write {printable(job.target)} ({error.strerror})") from None

    todo = [job for job in jobs if not job.target.exists()]
    with ThreadPoolExecutor(args.workers) as pool:
        for _ in progress(pool.map(copy, todo), total=len(todo), label="copying"):
            pass
    classes = len({job.target.parent.name for job in jobs})
    print(f"{len(jobs)} pictures of {classes} classes: {len(todo)} made, {len(jobs) - len(todo)} there already")
    print(f"train.py --dataset folder --image_size 64 --data_path {printable(root)} reads them")


def prepare_fix(args: argparse.Namespace) -> None:
    positive(count=args.count, workers=args.workers)
    out = args.data_path / FIX_FOLDERS[args.what]
    check_source(args.source, [out])
    pictures = list_pictures(args.source, "--source")
    if not pictures:
        raise UserError(f"--source: no pictures ({' '.join(sorted(ENDINGS))}) below {printable(args.source)}")
    if len(pictures) < args.count:
        print(f"--count {args.count}: there are {len(pictures)} pictures below {args.source}; taking all")
    jobs = draw(pictures, out, count=args.count, seed=args.seed)
    reader, how = _reader(args, pictures)
    claim([out], {"source": str(args.source.resolve()), "pictures": len(pictures), "seed": args.seed, **how})
    make(jobs, fix, reader, threads=args.workers, skip_bad=args.skip_bad_images, format="PNG")


def _reader(args: argparse.Namespace, pictures: list[Path]) -> tuple[Reader, dict[str, Any]]:
    """How to read the pictures, and what of it the result depends on."""
    check_reading(args.max_megapixels, args.value_range)
    how = {"value_range": args.value_range} if args.value_range else {}
    return Reader(lambda: pictures, max_megapixels=args.max_megapixels, threads=args.workers, **how), how


def positive(**values: float) -> None:
    """Raise UserError for the first value that is not above zero; keyword = name of its flag."""
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"--{name} must be > 0, got {value}")


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.prepare", description=__doc__)
    kinds = parser.add_subparsers(dest="what", required=True)
    originals = "folder of ImageNet: {train,val}/<WordNet id or class name>/*"
    imagenet30 = _add(kinds, "imagenet30", prepare_imagenet30, originals, "30 classes, to ImageNet/one_class_*")
    imagenet30.add_argument("--size", type=int, default=256, help="pixels on the short side of larger pictures (256)")
    for what, folder in FIX_FOLDERS.items():
        kind = _add(kinds, what, prepare_fix, "folder with pictures anywhere below it", f"32 x 32, to {folder}")
        kind.add_argument("--count", type=int, default=10_000, help="pictures to draw (10000)")
        kind.add_argument("--seed", type=int, default=0, help="the draw follows from it (0)")
    tiny = "folder of the unpacked archive: train/<WordNet id>/images/*, val/images/*, val/val_annotations.txt"
    text = f"Tiny-ImageNet by class, to {TINY_FOLDER}"
    _of_source(kinds, "tiny_imagenet", prepare_tiny_imagenet, tiny, text)
    args = parser.parse_args(argv)
    args.prepare(args)


def _of_source(kinds: Any, what: str, prepare: Callable, source: str, text: str) -> argparse.ArgumentParser:
    """The parser of a command, with the flags of all."""
    kind = kinds.add_parser(what, help=text, description=text)
    kind.set_defaults(prepare=prepare)
    kind.add_argument("--source", type=Path, required=True, help=source)
    kind.add_argument("--data_path", type=Path, default=Path("../Data/"), help="folder of the data sets (../Data/)")
    kind.add_argument("--workers", type=int, default=4, help="threads (4)")
    return kind


def _add(kinds: Any, what: str, prepare: Callable, source: str, text: str) -> argparse.ArgumentParser:
    """Likewise, of a command that decodes pictures."""
    kind = _of_source(kinds, what, prepare, source, text)
    kind.add_argument("--skip_bad_images", action="store_true", help="leave out pictures that cannot be read")
    kind.add_argument("--max_megapixels", type=float, default=100.0, help="larger pictures are refused (100)")
    between = "16-bit and float pictures: values that become black and white (default: found from all pictures)"
    kind.add_argument("--value_range", type=float, nargs=2, metavar=("LOW", "HIGH"), help=between)
    return kind


if __name__ == "__main__":
    sys.exit(main())
