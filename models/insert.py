"""Insert operators before the activations of a network."""

from collections.abc import Callable

from torch import nn

ACTIVATIONS: tuple[type[nn.Module], ...] = (nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU)


class BeforeActivation(nn.Sequential):
    """An inserted operator and the activation behind it, in the activation's former place."""


def insert_before_activations(
    net: nn.Module, make: Callable[[str], nn.Module], *, kinds: tuple[type[nn.Module], ...] = ACTIVATIONS
) -> nn.Module:
    """Replace each activation module `name` of `net` by (make(name), activation), in place; returns `net`.

    Keys of the state dict stay; those of the operator are `<name>.0.<key>`. The activation is no longer computed in
    place, since the operator's gradient may need the operator's output.
    The network must use each activation module once in a forward pass, as the backbones of `models.BACKBONES` do;
    activations that are function calls are not found.

    Raises: ValueError where there is no activation, where one module is registered under two names, and where operators
    have been inserted before.
    """
    places = [(name, module) for name, module in net.named_modules(remove_duplicate=False) if name]
    if any(isinstance(module, BeforeActivation) for _, module in places):
        raise ValueError("operators have already been inserted into this network")
    found = [(name, module) for name, module in places if isinstance(module, kinds)]
    if not found:
        raise ValueError(f"no activation module to insert before; looked for {', '.join(k.__name__ for k in kinds)}")
    first: dict[nn.Module, str] = {}
    for name, module in found:
        if first.setdefault(module, name) != name:
            raise ValueError(f"{first[module]} and {name} are one activation module; each use needs its own")
    operators = [make(name) for name, _ in found]
    for (name, module), operator in zip(found, operators, strict=True):
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
        net.set_submodule(name, BeforeActivation(operator, module))
    return net
