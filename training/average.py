"""A moving average of a network's weights over the steps of a run."""

import copy
from typing import Any

import torch
from torch import nn

# The average of n steps has a decay of at most (1 + n) / (10 + n), so that it forgets the first weights soon.
_SOON = 10


class MovingAverage:
    """The exponential moving average `net` of a network: a copy of it, in evaluation mode and without gradients.

    Weights and statistics of batch normalisation move to those of the network by 1 - decay in each step, or more in the
    first steps of all; whole numbers are copied. Nothing waits for the device.
    Source: Polyak & Juditsky 1992; the growing decay is that of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, net: nn.Module, decay: float):
        self.net: Any = copy.deepcopy(net).requires_grad_(False).eval()
        self._decay, self._steps = decay, 0

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """After a step of the network that this was made of."""
        decay = min(self._decay, (1 + self._steps) / (_SOON + self._steps))
        self._steps += 1
        pairs = list(zip(_tensors(self.net), _tensors(net), strict=True))
        moved = [(own, new) for own, new in pairs if own.is_floating_point()]
        torch._foreach_lerp_([own for own, _ in moved], [new for _, new in moved], 1 - decay)
        for own, new in pairs:
            if not own.is_floating_point():
                own.copy_(new)

    def state_dict(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self._steps = state["steps"]


def _tensors(net: nn.Module) -> list[torch.Tensor]:
    return [*(p.detach() for p in net.parameters()), *net.buffers()]
