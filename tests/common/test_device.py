import pytest
import torch

from common import device as module
from common.device import autocast


@pytest.mark.parametrize(
    "amp, has, half", [("off", True, False), ("bf16", False, True), ("auto", True, True), ("auto", False, False)]
)
def test_half_precision_is_asked_for_or_comes_with_a_gpu_that_has_it(amp, has, half, monkeypatch):
    monkeypatch.setattr(module, "has_bf16", lambda device: has)
    make = autocast(amp, torch.device("cpu"))
    for _ in range(2):  # a context each time
        with make():
            assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == (torch.bfloat16 if half else torch.float32)
