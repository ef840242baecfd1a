"""What plain pixels reach: a one-class SVM and the nearest neighbour on raw images, on the split of the other commands.

`python -m scripts.pixel_baseline --dataset folder --data_path DIR --one_class_idx 8` prints both AUROCs and writes
result files that `scripts.results` collects with the others.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError, command
from common.files import write_json
from common.flags import build_parser, parse
from common.run import describe_program
from datasets import DataSource, ImageSet, split_one_class
from evals.baselines import nearest_neighbour, one_class_svm
from evals.detection import detect
from evals.subject import identity
from evals.writing import place_for, read_json, settings_of
from program import SPECS

BASELINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "ocsvm": one_class_svm,
    "nearest": nearest_neighbour,
}


def pixels(images: ImageSet) -> np.ndarray:
    """(N, 3 H W) floats in [0, 1]."""
    return images.images.flatten(1).numpy().astype(np.float32) / 255


@command
def main(argv: Sequence[str] | None = None) -> None:
    tables = SPECS
    flags = parse(argv, build_parser("python -m scripts.pixel_baseline", ["pixels"], "pixels", tables))
    if flags.one_class_idx is None:
        raise UserError("--one_class_idx: the baseline needs a normal class")
    split = split_one_class(flags.dataset, DataSource.of(flags, flags.dataset), flags.one_class_idx, 32)
    normal = split.one_class_idx
    assert normal is not None
    train, test_set = split.train(), split.test()
    labels = test_set.labels.numpy()
    if not (labels == normal).any():
        raise UserError(f"--data_path: no test image of class {flags.one_class_idx}")
    folder = Path(flags.log_root).expanduser() / f"{flags.dataset}_pixels_one_class_{normal}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--log_root: cannot make {folder} ({error.strerror})") from None
    for line in flags.unread_notes():
        print(line)
    for name, score in BASELINES.items():
        begun = time.monotonic()
        values = score(pixels(train), pixels(test_set))
        others = {f"one_class_{c}": values[labels == c] for c in np.unique(labels) if c != normal}
        found = detect(values[labels == normal], others)
        result = {
            "mode": "pixels",
            "score": name,
            "dataset": flags.dataset,
            "one_class_idx": normal,
            "class_name": split.class_name,
            "seed": None,
            "checkpoint": None,
            "weights": None,
            "epochs": None,
            "device": "cpu",
            "settings": {**settings_of(flags, frozenset({"model"})), "image_size": split.source.image_size},
            "data": {flags.dataset: identity(test_set), "training": identity(train)},
            **found.as_result(),
            "seconds": round(time.monotonic() - begun, 2),
            "flags": {"data_path": flags.data_path},
            **describe_program(),
        }
        write_json(place_for(folder, f"result_pixels_{name}", ".json", result, read_json), result)
        print(f"{name} on pixels: mean AUROC {100 * found.mean:.1f}, pooled {100 * found.pooled:.1f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
