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
from datasets.augment import AlignedSpec
from datasets.sets import evenly
from datasets.views import PassSpec
from evals.display import equalised, stretched
from evals.result import Result
from evals.specs import AUTO, InsideSpec
from evals.trained import Trained, identity, settings_of
from models import BACKBONES, ModelSpec
from models.csc import CSC2d, csc_layers
from models.feature_net import BackboneNet
from models.invert import STEM, Coded, Tap, inspect, invert_layers, tap_of, taps
from models.lambda_line import energy

# Where the published program looks.
PUBLISHED = (STEM, "1.1", "1.2", "2.2", "3.2")
# Images over which sparsity and residuals are averaged.
_MEASURED = 512
IMAGES = "images"


def inside(trained: Trained) -> Iterator[Result]:
    """One result, `inside`, of training images as they are. The published program shows them randomly cropped and
    flipped: its pictures cannot be repeated, and black borders of the augmentation look like losses of the codes.

    The inversion y of a deep place is an offset, which comes of the batch normalisations and is the same for all
    images, and beside it what the image adds: half a percent of it at the end of an sdnet8. So their mean over the
    measured images is subtracted, without --keep_mean, before a picture is made of them.
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
        chosen = chosen_taps(net.backbone, spec.inside_taps)
        batch_size = flags.of(PassSpec).ood_batch_size
        # Not decoded as a whole where training does not do so either.
        train = split.stream(AlignedSpec(), net.in_channels).to(trained.device)
        if spec.inside_images > len(train):
            raise UserError(f"--inside_images {spec.inside_images}: there are {len(train)} training images; give fewer")
        order = torch.randperm(len(train), generator=generator(flags.seed, "inside"))
        shown, measured = spread(train.labels.cpu(), order, spec.inside_images), order[:_MEASURED]

    def look(index: Tensor) -> tuple[dict[str, Coded], dict[str, Tensor]]:
        """What layers made of images; the images, normalised, and the outputs of each place."""
        x = (train.batch(index.to(train.index_device)) - net.input_mean) / net.input_std
        coded, outputs = inspect(net.backbone, x, layers, [tap.output for tap in chosen.values()])
        return coded, {IMAGES: x} | {name: outputs[tap.output] for name, tap in chosen.items()}

    def results() -> Iterator[Result]:
        with trained.world.raise_together():
            seen = look(shown)[1]
            x = seen[IMAGES]
            # First, so that a place without inverse is known at once.
            plain = _inversions(chosen, seen, x.shape[2:])
            own = [_sums(*look(index)) for index in trained.world.shard_list(list(measured.split(batch_size)))]
        sums = [part for parts in trained.world.all_gather_object(own) for part in parts]
        means = {name: torch.stack([part[name] for part in sums]).sum(0) / len(measured) for name in sums[0]}
        metrics = {name: float(means[name].mean()) for kind in _KINDS for name in means if name.startswith(f"{kind}/")}
        centred = {name: values - means[f"output/{name}"].float().to(values.device) for name, values in seen.items()}
        differences = _inversions(chosen, centred, x.shape[2:], offset=False)
        arrays = {f"inversions/{IMAGES}": train.batch(shown.to(train.index_device))}
        for name, y in plain.items():
            found = {
                "correlation": _correlation(x, y),
                "centred_correlation": _correlation(centred[IMAGES], differences[name]),
                "error": energy(x - y) / energy(x).clamp_min(_TINY),
            }
            metrics |= {f"{kind}/{name}": float(value.mean()) for kind, value in found.items()}
            pixels = y * net.input_std + net.input_mean if spec.keep_mean else differences[name] * net.input_std
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
    taken = evenly(labels, order, count)
    return taken[labels[taken].argsort(stable=True)]


def _inversions(
    chosen: Mapping[str, Tap], outputs: Mapping[str, Tensor], size: Sequence[int], *, offset: bool = True
) -> dict[str, Tensor]:
    """Normalised images (N, C, H, W), from the outputs of each place. offset: as `invert_layers`.

    Raises: UserError where a batch normalisation has no inverse."""
    found: dict[str, Tensor] = {}
    for name, tap in chosen.items():
        try:
            with torch.no_grad():
                found[name] = invert_layers(tap.layers, outputs[name], size, offset=offset)
        except ValueError as why:
            raise UserError(f"--inside_taps {name}: {why}; give other places ({' '.join(found) or STEM})") from None
    return found


def _sums(coded: Mapping[str, Coded], outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Over a batch, on the CPU: `nonzero/<layer>` (M,), `mean/...` and `residual/...` (), `output/<place>` (M, h, w)
    and of the images (C, H, W)."""
    found = {f"{kind}/{name}": getattr(values, kind) for kind in _KINDS for name, values in coded.items()}
    found |= {f"output/{name}": values for name, values in outputs.items()}
    return {name: values.cpu().double().sum(0) for name, values in found.items()}


_TINY = 1e-12


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Of each two images over pixels, all channels together (N,), however small their values; 0 where one is constant.

    On the CPU."""
    rows = [images.cpu().double().flatten(1) for images in (x, y)]
    a, b = (row - row.mean(1, keepdim=True) for row in rows)
    lengths = a.norm(dim=1) * b.norm(dim=1)
    return (a * b).sum(1) / lengths.where(lengths > 0, 1)


def _settings(layer: CSC2d) -> dict[str, Any]:
    solver = layer.solver
    # Predicted for each image of the last batch, it is no setting of the layer.
    lam = float(layer.lam) if layer.lam.ndim == 0 else AUTO
    return {"atoms": len(layer.weight), "lambda": lam, **solver._asdict()}


def _image(trained: Trained, train: Any, n: int) -> dict[str, Any]:
    label, indices = int(train.labels[n]), getattr(train, "indices", None)
    return {
        "index": n if indices is None else int(indices[n]),
        "label": label,
        "class": trained.split.class_names[label],
    }


def _no_layer(flags: Flags) -> str:
    model = flags.of(ModelSpec, only=["model"]).model
    known = ", ".join(name for name in BACKBONES if name.startswith("sdnet8"))
    return f"--mode {flags.mode}: {model} has no sparse coding layer; give weights of an SDNet ({known}, ...)"
