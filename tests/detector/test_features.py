"""Resizing by its definition; grids of stages."""

import numpy as np
import pytest
import torch

from common.errors import UserError
from detector import features
from detector.features import one_thread, pyramid, resized


def naive(pixels, size):
    """Weights max(0, 1 - distance / support) of each side, in float64."""

    def weights(n):
        ratio = n / size
        far = np.abs(np.arange(n)[None] + 0.5 - (np.arange(size)[:, None] + 0.5) * ratio)
        w = np.clip(1 - far / max(ratio, 1), 0, None)
        return w / w.sum(1, keepdims=True)

    x = pixels.astype(np.float64) / 255
    return np.einsum("ih,hwc,jw->cij", weights(x.shape[0]), x, weights(x.shape[1]), optimize=True)


@pytest.mark.parametrize("shape", [(64, 64), (33, 200), (301, 97), (640, 480), (1, 7)])
def test_resizing_is_by_its_definition(shape, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    found = resized(pixels, 64)
    assert found.shape == (1, 3, 64, 64) and found.dtype == torch.float32
    assert np.abs(found[0].numpy() - naive(pixels, 64)).max() < 2e-7
    monkeypatch.setattr(features, "_STRIP", 1000)
    assert torch.equal(resized(pixels, 64), found)


def test_grids_of_a_backbone():
    grids = pyramid("timm_mobilenetv3_small_050")(torch.rand(2, 3, 64, 64))
    assert {stride: x.shape[:2] for stride, x in grids.items()} == {16: (2, 16), 32: (2, 4)}
    net, x = pyramid("resnet18_imagenet"), torch.rand(1, 3, 64, 64)
    assert {stride: x.shape for stride, x in net(x).items()} == {16: (1, 16, 64 + 128 + 256), 32: (1, 4, 512)}
    assert list(net(x, [32])) == [32]


def test_a_patch_joins_the_stages_of_its_place():
    x = torch.arange(64.0).view(1, 1, 8, 8)
    coarse = torch.arange(16.0).view(1, 1, 4, 4)
    grid = features._grid([x, coarse])
    assert grid.shape == (1, 16, 2)
    assert grid[0, 5, 1] == coarse[0, 0, 0:3, 0:3].mean()
    assert grid[0, 0, 1] == coarse[0, 0, 0:2, 0:2].sum() / 9  # zeros beyond the edge
    inner = torch.nn.functional.avg_pool2d(x, 3, 1, 1)[0, 0, 2:4, 2:4].mean()
    assert grid[0, 5, 0] == pytest.approx(float(inner))


@pytest.mark.parametrize(
    "name, told",
    [("resnet8", "no stages"), ("timm_swin_tiny_patch4_window7_224", "channels first"), ("timm_x", "no x")],
)
def test_backbones_without_stages_are_refused(name, told):
    with pytest.raises(UserError, match=told):
        pyramid(name)


def test_threads_are_restored():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), one_thread():
        assert torch.get_num_threads() == 1
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before
