"""Keys and shapes of the published programs' weights, as section 5 of the specification lists them."""

import torch

Shapes = dict[str, tuple[int, ...]]

_BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}


def published_shapes(model: str, n_classes: int, n_shifts: int) -> Shapes:
    """Of `resnet18`, `resnet50` and their `_imagenet` forms; P = 128, as in every published file."""
    base, imagenet = model.removesuffix("_imagenet"), model.endswith("_imagenet")
    kernel, shortcut = (7, "downsample") if imagenet else (3, "shortcut")
    expansion = 4 if base == "resnet50" else 1
    shapes: Shapes = {"conv1.weight": (64, 3, kernel, kernel), **_norm("bn1", 64)}
    before = 64
    for layer, (width, blocks) in enumerate(zip((64, 128, 256, 512), _BLOCKS[base], strict=True), 1):
        for block in range(blocks):
            at = f"layer{layer}.{block}"
            convs = [(width, before, 3), (width, width, 3)]
            if expansion == 4:
                convs = [(width, before, 1), (width, width, 3), (4 * width, width, 1)]
            for n, (out, into, size) in enumerate(convs, 1):
                shapes |= {f"{at}.conv{n}.weight": (out, into, size, size), **_norm(f"{at}.bn{n}", out)}
            if before != width * expansion or (layer > 1 and block == 0):
                shapes[f"{at}.{shortcut}.0.weight"] = (width * expansion, before, 1, 1)
                shapes |= _norm(f"{at}.{shortcut}.1", width * expansion)
            before = width * expansion
    f = before
    heads = {"linear": (n_classes, f), "shift_cls_layer": (n_shifts, f), "joint_distribution_layer": (4 * n_classes, f)}
    heads |= {"simclr_layer.0": (f, f), "simclr_layer.2": (128, f)}
    for name, shape in heads.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def _norm(prefix: str, width: int) -> Shapes:
    names = ("weight", "bias", "running_mean", "running_var")
    return {f"{prefix}.{n}": (width,) for n in names} | {f"{prefix}.num_batches_tracked": ()}


def published_state(model: str, n_classes: int, n_shifts: int) -> dict[str, torch.Tensor]:
    """A `.model` of these shapes, filled with small random weights, in the published kinds of numbers."""
    g = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in published_shapes(model, n_classes, n_shifts).items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(1000)
        elif name.endswith("running_var") or ("bn" in name and name.endswith("weight")):
            state[name] = 1 + 0.1 * torch.rand(shape, generator=g)
        else:
            fan_in = max(1, torch.Size(shape[1:]).numel())
            state[name] = torch.randn(shape, generator=g) / fan_in**0.5
    return state


def published_sparse_state(model: str, n_classes: int, n_shifts: int, atoms: int) -> dict[str, torch.Tensor]:
    """A `.cocsr_model`: the network under `feature_net.`, dictionaries, an integer rho, lambda."""
    net = published_state(model, n_classes, n_shifts)
    features = net["linear.weight"].shape[1]
    dictionary = torch.rand(n_shifts, features, atoms, generator=torch.Generator().manual_seed(1))
    return {
        **{f"feature_net.{name}": value for name, value in net.items()},
        "sr_nets.dictionary": torch.nn.functional.normalize(dictionary, dim=1),
        "sr_nets.rho": torch.tensor(1),
        "sr_nets.lambdaV": torch.tensor(1e-3),
    }
