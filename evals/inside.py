"""What the sparse coding layers of a network keep of training images: inversions, atoms, sparsity.

Letters: N images, C channels, H, W pixels, M atoms, k their side.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.flags import Flags
from common.seed import generator
from datasets.views import PassSpec
from evals.display import equalised, stretched
from evals.result import Result
from evals.specs import InsideSpec
from evals.trained import Trained, identity, settings_of
from models import BACKBONES, ModelSpec
from models.csc import CSC2d, csc_layers
from models.feature_net import BackboneNet
from models.invert import STEM, Coded, Tap, inspect, invert_layers, tap_of, taps

# Where the published program looks.
PUBLISHED = (STEM, "1.1", "1.2", "2.2", "3.2")
# Images over which sparsity and residuals are averaged.
_MEASURED = 512
IMAGES = "images"


def inside(trained: Trained) -> Iterator[Result]:
    """One result, `inside`, of training images as they are. The published program shows them randomly cropped and
    flipped: its pictures cannot be repeated, and black borders of the augmentation look like losses of the codes.

    The inversions y of a deep place are an offset, which comes of the batch normalisations and is the same for all
    images, and 1 % or less of it what the image adds. So their mean over the measured images is subtracted, without
    --keep_mean, before a picture is made of them.
    metrics: of each layer, averaged over up to 512 images, `nonzero/<layer>` (share of the code's entries), `mean/...`
    (of their absolute values) and `residual/...` (|x - A(z)|^2 / |x|^2 of its input x); of each place of --inside_taps,
    averaged over the images shown, `correlation/<place>` of y with the normalised image x over pixels and channels,
    `centred_correlation/...` without the mean inversion and the mean image, and `error/...`, |x - y|^2 / |x|^2.
    arrays: `inversions/<row>` (N, C, H, W) in [0, 1], the first row the images themselves; `atoms` (M, C, k, k) of the
    first layer, the most used first; `used` (M,), the shares of the non-zero entries of their codes.
    Flags are read and images loaded before the result is asked for. All ranks get it.
    Raises: UserError for a network without sparse coding layers, for places that it cannot be inverted from, for more
    images than there are; and when the result is asked for, where a batch normalisation has no inverse.
    """
    flags, split = trained.flags, trained.split
    with trained.world.raise_together():
        net: BackboneNet = trained.net  # type: ignore[assignment]
        layers = csc_layers(net.backbone)
        if not layers:
            raise UserError(_no_layer(flags))
        spec = flags.of(InsideSpec)
        # Apple's GPUs have no float64.
        exact = torch.device("cpu") if trained.device.type == "mps" else trained.device
        chosen = {name: tap.double(exact) for name, tap in chosen_taps(net.backbone, spec.inside_taps).items()}
        batch_size = flags.of(PassSpec).ood_batch_size
        train = split.train(net.in_channels).to(trained.device)
        if spec.inside_images > len(train):
            raise UserError(f"--inside_images {spec.inside_images}: there are {len(train)} training images; give fewer")
        order = torch.randperm(len(train), generator=generator(flags.seed, "inside"))
        shown, measured = spread(train.labels.cpu(), order, spec.inside_images), order[:_MEASURED]

    def look(index: Tensor) -> tuple[Tensor, dict[str, Coded], dict[str, Tensor]]:
        """Normalised images, what layers made of them, and their inversions from each place; images in float64."""
        x = (train.batch(index.to(train.index_device)) - net.input_mean) / net.input_std
        coded, outputs = inspect(net.backbone, x, layers, [tap.output for tap in chosen.values()])
        outputs = {name: y.to(exact).double() for name, y in outputs.items()}
        return x.to(exact).double(), coded, _inversions(chosen, outputs, x.shape[2:])

    def results() -> Iterator[Result]:
        with trained.world.raise_together():
            batches = trained.world.shard_list(list(measured.split(batch_size)))
            own = [_sums(*look(index)) for index in batches]
            x, _, inversions = look(shown)
        sums = [part for parts in trained.world.all_gather_object(own) for part in parts]
        means = {name: torch.stack([part[name] for part in sums]).sum(0) / len(measured) for name in sums[0]}
        metrics = {name: float(means[name].mean()) for kind in _KINDS for name in means if name.startswith(f"{kind}/")}
        mean, std = (values.to(exact) for values in (net.input_mean, net.input_std))
        arrays = {f"inversions/{IMAGES}": train.batch(shown.to(train.index_device))}
        for name, y in inversions.items():
            y_mean, x_mean = (means[key].to(exact) for key in (f"inversion/{name}", "image"))
            found = {
                "correlation": _correlation(x, y),
                "centred_correlation": _correlation(x - x_mean, y - y_mean),
                "error": _energy(x - y) / _energy(x).clamp_min(_TINY),
            }
            metrics |= {f"{kind}/{name}": float(value.mean()) for kind, value in found.items()}
            pixels = (y if spec.keep_mean else y - y_mean) * std + mean
            picture = stretched(pixels)
            arrays[f"inversions/{name}"] = equalised(picture) if spec.equalise else picture
        first, stem = next(iter(layers.items()))
        used, places = means[f"nonzero/{first}"].sort(descending=True, stable=True)
        arrays |= {"atoms": stem.weight.detach()[places.to(stem.weight.device)], "used": used}
        facts = {
            "data": {"training": identity(train)},
            "settings": settings_of(flags),
            "model": flags.of(ModelSpec, only=["model"]).model,
            "measured": len(measured),
            "shown": [_image(trained, train, n) for n in shown.tolist()],
            "layers": {name: _settings(layer) for name, layer in layers.items()},
            "atoms": {"layer": first, "order": places.tolist(), "used": used.tolist()},
        }
        yield Result("inside", metrics, {}, facts, {name: x.float().cpu().numpy() for name, x in arrays.items()})

    return results()


# What is averaged over images, of each layer.
_KINDS = ("nonzero", "mean", "residual")


def chosen_taps(backbone: nn.Module, asked: Sequence[str] | None) -> dict[str, Tap]:
    """Places to invert from, by name: those that are asked for, else the published ones where the network has them all,
    else all that it has. Raises: UserError for one that it does not have."""
    known = list(taps(backbone)) or [STEM]
    default = PUBLISHED if set(PUBLISHED) <= set(known) else known
    found = {}
    for name in asked or default:
        try:
            found[name] = tap_of(backbone, name)
        except ValueError as why:
            raise UserError(f"--inside_taps {name}: {why}") from None
    return found


def spread(labels: Tensor, order: Tensor, count: int) -> Tensor:
    """Places of `count` images (n,), sorted by label: of all classes as many, up to one. labels (N,); order (N,): in
    which they are taken."""
    turn, seen = torch.empty_like(order), dict[int, int]()
    for place, label in enumerate(labels[order].tolist()):
        turn[place] = seen[label] = seen.get(label, -1) + 1
    taken = order[turn.argsort(stable=True)[:count]]
    return taken[labels[taken].argsort(stable=True)]


def _inversions(chosen: Mapping[str, Tap], outputs: Mapping[str, Tensor], size: Sequence[int]) -> dict[str, Tensor]:
    """Normalised images (N, C, H, W), from the outputs of each place. Raises: UserError where there is no inverse."""
    found: dict[str, Tensor] = {}
    for name, tap in chosen.items():
        try:
            with torch.no_grad():
                found[name] = invert_layers(tap.layers, outputs[tap.output], size)
        except ValueError as why:
            raise UserError(f"--inside_taps {name}: {why}; give other places ({' '.join(found) or STEM})") from None
    return found


def _sums(x: Tensor, coded: Mapping[str, Coded], inversions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Over a batch, on the CPU: `nonzero/<layer>` (M,), `mean/...` and `residual/...` (), `image`, `inversion/<place>`
    (C, H, W)."""
    found = {f"{kind}/{name}": getattr(values, kind) for kind in _KINDS for name, values in coded.items()}
    found |= {"image": x} | {f"inversion/{name}": y for name, y in inversions.items()}
    return {name: values.to(x.device).double().sum(0).cpu() for name, values in found.items()}


_TINY = 1e-12


def _energy(images: Tensor) -> Tensor:
    """The sum of squares of each (N,)."""
    return images.square().flatten(1).sum(1)


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Of each two images over pixels, all channels together (N,); 0 where one is constant."""
    a, b = (images.flatten(1) - images.flatten(1).mean(1, keepdim=True) for images in (x, y))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(_TINY)


def _settings(layer: CSC2d) -> dict[str, Any]:
    solver = layer.solver
    return {"atoms": len(layer.weight), "lambda": layer.lam.tolist(), **solver._asdict()}


def _image(trained: Trained, train: Any, n: int) -> dict[str, Any]:
    label = int(train.labels[n])
    return {"index": int(train.indices[n]), "label": label, "class": trained.split.class_names[label]}


def _no_layer(flags: Flags) -> str:
    model = flags.of(ModelSpec, only=["model"]).model
    known = ", ".join(name for name in BACKBONES if name.startswith("sdnet8"))
    return f"--mode {flags.mode}: {model} has no sparse coding layer; give weights of an SDNet ({known}, ...)"
