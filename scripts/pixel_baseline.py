"""What plain pixels reach: a one-class SVM and the nearest neighbour on raw images, on the split of the other commands.

`python -m scripts.pixel_baseline --dataset folder --data_path DIR --one_class_idx 8` prints both AUROCs and writes
result files that `scripts.results` collects with the others.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError, command
from common.files import write_json
from common.run import describe_program
from datasets import DATASETS, DataSource, ImageSet, split_one_class
from evals.baselines import nearest_neighbour, one_class_svm
from evals.detection import detect

BASELINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "ocsvm": one_class_svm,
    "nearest": nearest_neighbour,
}


def pixels(images: ImageSet) -> np.ndarray:
    """(N, 3 H W) floats in [0, 1]."""
    return images.images.flatten(1).numpy().astype(np.float32) / 255


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.pixel_baseline", description=__doc__)
    parser.add_argument("--dataset", choices=sorted(DATASETS), default="cifar10")
    parser.add_argument("--data_path", default="../Data/")
    parser.add_argument("--one_class_idx", type=int, required=True)
    parser.add_argument("--image_size", type=int)
    parser.add_argument("--num_worker", type=int, default=4)
    parser.add_argument("--image_cache")
    parser.add_argument("--download_data", action="store_true")
    parser.add_argument("--skip_bad_images", action="store_true")
    parser.add_argument("--max_megapixels", type=float, default=100.0)
    parser.add_argument("--value_range", type=float, nargs=2, metavar=("LOW", "HIGH"))
    parser.add_argument("--log_root", type=Path, default=Path("./logs"), help="folder of the run folders")
    args = parser.parse_args(argv)
    split = split_one_class(args.dataset, DataSource.of(args, args.dataset), args.one_class_idx, 32)
    train, test_set = split.train(), split.test()
    labels = test_set.labels.numpy()
    if not (labels == args.one_class_idx).any():
        raise UserError(f"--data_path: no test image of class {args.one_class_idx}")
    folder = args.log_root / f"{args.dataset}_pixels_one_class_{args.one_class_idx}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, score in BASELINES.items():
        begun = time.monotonic()
        values = score(pixels(train), pixels(test_set))
        others = {f"one_class_{c}": values[labels == c] for c in np.unique(labels) if c != args.one_class_idx}
        found = detect(values[labels == args.one_class_idx], others)
        result = {
            "mode": "pixels",
            "score": name,
            "dataset": args.dataset,
            "one_class_idx": args.one_class_idx,
            "seed": None,
            "checkpoint": None,
            "epochs": None,
            "device": "cpu",
            **found.as_result(),
            "seconds": round(time.monotonic() - begun, 2),
            **describe_program(),
        }
        write_json(folder / f"result_pixels_{name}.json", result)
        print(f"{name} on pixels: mean AUROC {100 * found.mean:.1f}, pooled {100 * found.pooled:.1f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
