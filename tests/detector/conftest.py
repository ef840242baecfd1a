"""A small data set of stripes and a detector of it, on a small backbone with random weights."""

import numpy as np
import pytest
import torch
from PIL import Image

from detector.features import pyramid
from detector.fitting import FitSpec, fit

BACKBONE = "timm_mobilenetv3_small_050"


def stripes(seed: int, size: int = 72, blob: bool = False) -> np.ndarray:
    """Grey stripes with noise, (size, size, 3) uint8; with a bright square where there is a defect."""
    rng = np.random.default_rng(seed)
    x = 128 + 60 * np.sin(np.arange(size) / 4)[None] + rng.normal(0, 6, (size, size))
    if blob:
        x[40:56, 12:28] = 250
    return np.repeat(np.clip(x, 0, 255)[..., None], 3, 2).astype(np.uint8)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("stripes")
    for folder, count, first, blob in (
        ("train/good", 40, 0, False), ("test/good", 8, 100, False), ("test/hole", 8, 200, True)
    ):  # fmt: skip
        (root / folder).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(stripes(first + i, blob=blob)).save(root / folder / f"{i:03}.png")
    (root / "ground_truth/hole").mkdir(parents=True)
    mask = np.zeros((72, 72), np.uint8)
    mask[40:56, 12:28] = 255
    for i in range(8):
        Image.fromarray(mask).save(root / "ground_truth/hole" / f"{i:03}.png")
    return root


@pytest.fixture(scope="session")
def backbone_file(tmp_path_factory):
    """Weights of the backbone."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_file({n: x.contiguous() for n, x in pyramid(BACKBONE).stages.state_dict().items()}, path)
    return path


def spec_of(backbone_file, **more):
    settings = {"backbone": BACKBONE, "weights": str(backbone_file), "image_size": 64, "hold_out": 0.4} | more
    return FitSpec(**settings)


@pytest.fixture(scope="session")
def fitted(pictures, backbone_file):
    paths = sorted((pictures / "train/good").iterdir())
    return fit(paths, spec_of(backbone_file), source="stripes")[0]


@pytest.fixture(scope="session")
def file(fitted, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "parts.detector"
    fitted.save(path)
    return path
