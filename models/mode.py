"""Training and evaluation mode of networks."""

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
