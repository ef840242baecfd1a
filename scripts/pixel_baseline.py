"""What plain pixels reach: a one-class SVM and the nearest neighbour on raw images, on the split of the other commands.

`python -m scripts.pixel_baseline --dataset folder --data_path DIR --one_class_idx 8` prints both AUROCs and writes
result files that `scripts.results` collects with the others.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from common.errors import UserError, command
from common.files import write_json
from common.flags import RunSpec, build_parser, parse, print_dry_run
from common.run import describe_program
from datasets import ImageSet
from datasets.one_class import SplitSpec, read_split
from evals.metrics import detection_metrics
from evals.result import nested
from evals.scores import NearestScore, OneClassSvmScore
from evals.trained import identity, settings_of
from evals.writing import place_for, read_json
from program import SPECS

# Training pixels (N, F), test pixels (M, F) -> scores (M,).
BASELINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ocsvm": lambda train, test: OneClassSvmScore.of(train).of_vectors(test),
    "nearest": lambda train, test: NearestScore.of(train).of_vectors(test),
}


def pixels(images: ImageSet) -> Tensor:
    """(N, F) floats in [0, 1]."""
    return images.images.flatten(1).float() / 255


@command
def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(argv, build_parser("python -m scripts.pixel_baseline", ["pixels"], "pixels", SPECS))
    which = flags.of(SplitSpec)
    if which.one_class_idx is None:
        raise UserError("--one_class_idx: the baseline needs a normal class")
    split = read_split(flags, training=False, model_size=32)
    normal = split.one_class_idx
    assert normal is not None
    folder = Path(flags.of(RunSpec, only=("log_root",)).log_root) / f"{split.dataset}_pixels_one_class_{normal}"
    if flags.of(RunSpec, only=("dry_run",)).dry_run:
        print_dry_run(flags, script="scripts/pixel_baseline.py", run_dir=folder, shifts=1, views_per_step=1)
        return
    train, test_set = split.train(), split.test()
    labels = test_set.labels.numpy()
    if not (labels == normal).any():
        raise UserError(f"--data_path: no test image of class {which.one_class_idx}")
    if (labels == normal).all():
        raise UserError(
            f"--data_path: all test images are of class {which.one_class_idx}; there is nothing to tell apart"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--log_root: cannot make {folder} ({error.strerror})") from None
    for line in flags.unread_notes():
        print(line)
    for name, score in BASELINES.items():
        begun = time.monotonic()
        values = score(pixels(train), pixels(test_set)).numpy()
        others = {f"one_class_{c}": values[labels == c] for c in np.unique(labels) if c != normal}
        found = detection_metrics(values[labels == normal], others)
        result = {
            "mode": "pixels",
            "score": name,
            "dataset": split.dataset,
            "one_class_idx": normal,
            "class_name": split.class_name,
            "seed": None,
            "checkpoint": None,
            "weights": None,
            "epochs": None,
            "device": "cpu",
            "settings": {**settings_of(flags, frozenset({"model"})), "image_size": split.source.image_size},
            "data": {split.dataset: identity(test_set), "training": identity(train)},
            **nested(found),
            "n_in": int((labels == normal).sum()),
            "n_out": sum(map(len, others.values())),
            "seconds": round(time.monotonic() - begun, 2),
            "flags": {"data_path": flags.as_dict()["data_path"]},
            **describe_program(),
        }
        write_json(place_for(folder, f"result_pixels_{name}", ".json", result, read_json), result)
        mean, low, high = (100 * found[key] for key in ("mean", "auroc_interval/low", "auroc_interval/high"))
        print(
            f"{name} on pixels: mean AUROC {mean:.1f} (95 % interval {low:.1f} to {high:.1f}),"
            f" pooled {100 * found['pooled']:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
