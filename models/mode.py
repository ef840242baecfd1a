"""How a network is used for a while: in evaluation mode, or without gradients of its parameters."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluation_mode(net: nn.Module) -> Iterator[None]:
    """The network in evaluation mode; afterwards each of its modules is in the mode it was in, even after an error."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """Parameters of the network without gradients of their own, which still flow through it to the images."""
    wanted = [p for p in net.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
