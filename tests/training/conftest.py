"""Fixtures of training."""

from pathlib import Path

import pytest
import torch

from models.checkpoint import build_net


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Path:
    """Weights that modes go on from: of four shifts and ten classes."""
    folder = tmp_path_factory.mktemp("start")
    net = build_net("feature", "resnet8", n_classes=10, simclr_dim=8, n_shifts=4, seed=0)
    torch.save(net.state_dict(), folder / "last.model")
    return folder
