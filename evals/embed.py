"""Features in the plane, by t-SNE or UMAP: where test images lie among the training images and, after stage 2, among
the atoms; or where the test images of each class lie.

Letters: N images, K shifts, F features, M atoms.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from common.errors import RunStopped, UserError
from common.flags import Flags
from common.seed import seed_of
from datasets import ShiftSpec, Split
from evals.extract import Extraction, Extractor, reference_pool
from evals.result import Result
from evals.specs import ReferenceSpec, TsneSpec
from evals.trained import Trained, identity, settings_of
from models.feature_net import CocsrNet, FeatureTransform

# Outputs that --ood_layer names.
LAYERS = {"penultimate": "h", "simclr": "z", "shift": "shift"}


def embed(
    trained: Trained,
    *,
    extractor: Extractor,
    output: str | None = None,
    layers: Mapping[str, str] = LAYERS,
    partner: str = "neighbour",
    by_class: bool = False,
) -> Iterator[Result]:
    """One result for each layer and shift, `<layer>_shift<k>`: points in the plane, by group of images.

    Groups are the normal training images, the normal test images and the anomalous ones; by_class: the normal test
    images of each class, and no others. What projects them is `projection` of the facts, by --projection.

    output: name of the network's output to show; None: `layers` of --ood_layer. With `s`, the features that are coded,
    come the atoms, scaled to the mean norm of the features. partner: as `evals.detect.detect`.
    Flags are read and test images loaded before the first result is asked for. The main rank alone gets results.
    Raises: UserError for an unknown layer, for the logits of a single shift and for a projection that is not
    installed; RunStopped where all points are equal.
    """
    flags, split = trained.flags, trained.split
    with trained.world.raise_together():
        projection = projection_of(flags.of(TsneSpec, only=("projection",)).projection)
        shown, limit = shown_outputs(flags, output, layers), flags.of(TsneSpec, only=("tsne_points",)).tsne_points
        extraction = Extraction.of(extractor, trained, shown.values())
        shifts = len(extraction.draws.shifts)
        if output == "shift" and shifts < 2:
            raise UserError(f"--shift_trans_type: one shift has no logits to show in --mode {flags.mode}")
        references = flags.of(ReferenceSpec).refmix_batch_size if partner == "reference" else 0
        kind = "" if extractor.plain else flags.of(ShiftSpec, only=("shift_trans_type",)).shift_trans_type
        of_shift = f" of {kind}" if kind else ""
        test = trained.test_images().to(trained.device)
        train = None if by_class else trained.train_images()

    def results() -> Iterator[Result]:
        fitted, known = (extraction, None) if train is None else extraction.fit(train)
        pool = reference_pool(train, references, flags.seed) if train is not None and references else None
        found = fitted.outputs(test, f"{trained.split.dataset} test images", pool)
        if not trained.world.is_main:
            return
        labels = test.labels.cpu()
        data = {} if train is None else {"training": identity(train)}
        data[trained.split.dataset] = identity(test)
        facts = {
            "data": data,
            "settings": settings_of(flags),
            "projection": projection.title,
            "by_class": by_class,
        }
        for layer, name in shown.items():
            for k in range(shifts):
                if known is None:
                    groups = _classes(found[name][:, k], labels, split)
                else:
                    groups = _groups(known[name][:, k], found[name][:, k], split.normal(labels))
                groups = {title: _some(x, limit, flags.seed) for title, x in groups.items() if len(x)}
                if name == "s" and isinstance(trained.net, CocsrNet):
                    groups["atoms"] = _scaled_atoms(trained.net, k, groups)
                what = "test images by class" if by_class else f"normal: {split.normal_title}, shift {k}{of_shift}"
                title = f"{trained.split.dataset}, {what}, {layer}, {projection.title}"
                points = project(groups, title, projection.fit)
                yield Result(f"{layer}_shift{k}", {}, points, {**facts, "title": title})

    return results()


def _groups(train: Tensor, test: Tensor, normal: Tensor) -> dict[str, np.ndarray]:
    """Features (N, F) by group; normal (N,) bool, of the test images."""
    found = {"anomalous test": test[~normal], "normal training": train, "normal test": test[normal]}
    return {title: x.numpy() for title, x in found.items()}


def _classes(test: Tensor, labels: Tensor, split: Split) -> dict[str, np.ndarray]:
    """Features (N, F) of the normal test images by the name of their class."""
    normal = split.normal(labels)
    classes = labels[normal].unique().tolist()
    return {split.class_names[label]: test[labels == label].numpy() for label in classes}


def _scaled_atoms(net: CocsrNet, k: int, groups: Mapping[str, np.ndarray]) -> np.ndarray:
    """The atoms of shift k (M, F), scaled to the mean norm of the features."""
    atoms = net.sr_nets.dictionary[k].detach().cpu().numpy().T
    mean_norm = np.linalg.norm(np.concatenate(list(groups.values())), axis=1).mean()
    return atoms * (mean_norm / np.maximum(np.linalg.norm(atoms, axis=1, keepdims=True), 1e-12))


def shown_outputs(flags: Flags, output: str | None, layers: Mapping[str, str]) -> dict[str, str]:
    """The network's outputs to show, by the name of their layer. Raises: UserError for an unknown layer."""
    if output == "s":
        layer = flags.of(FeatureTransform, only=("sr_layer",)).layer
        if flags.given("ood_layer") and flags.of(TsneSpec, only=("ood_layer",)).ood_layer != (layer,):
            raise UserError(f"--ood_layer: atoms live among the coded features; give {layer} (--sr_layer)")
        return {layer: output}
    if output is not None:
        return {output: output}
    asked = flags.of(TsneSpec, only=("ood_layer",)).ood_layer
    unknown = [layer for layer in asked if layer not in layers]
    if unknown:
        raise UserError(f"--ood_layer {unknown[0]}: known are {', '.join(layers)}")
    return {layer: layers[layer] for layer in asked}


def _some(x: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """At most `limit` rows, chosen by the seed."""
    if len(x) <= limit:
        return x
    return x[np.random.default_rng(seed_of(seed, "t-SNE points")).choice(len(x), limit, replace=False)]


class Projection(NamedTuple):
    """title: its name, as pictures say it. fit: points (n, F), not all equal -> (n, 2)."""

    title: str
    fit: Callable[[np.ndarray], np.ndarray]


def _tsne(points: np.ndarray) -> np.ndarray:
    """With seed 0."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(random_state=0, perplexity=perplexity, init="pca").fit_transform(points)


# As ANCRA's figures are drawn.
_UMAP = {"min_dist": 0.01, "metric": "correlation", "densmap": True, "dens_lambda": 1.5}
_NEIGHBOURS = 12


def projection_of(name: str) -> Projection:
    """`tsne`, `umap`, or `auto`: UMAP where umap-learn is installed, else t-SNE.

    Raises: UserError where `umap` is not installed.
    """
    if name != "tsne":
        try:
            from umap import UMAP
        except ImportError:
            if name == "umap":
                raise UserError(
                    "--projection umap: the package umap-learn is not installed (pip install umap-learn); tsne needs"
                    " nothing more"
                ) from None
        else:

            def fit(points: np.ndarray) -> np.ndarray:
                # A seed makes it run in one thread anyway; to say so spares a warning.
                neighbours = min(_NEIGHBOURS, len(points) - 1)
                return UMAP(n_neighbors=neighbours, random_state=0, n_jobs=1, **_UMAP).fit_transform(points)

            return Projection("UMAP", fit)
    return Projection("t-SNE", _tsne)


def project(
    groups: Mapping[str, np.ndarray], title: str, fit: Callable[[np.ndarray], np.ndarray] = _tsne
) -> dict[str, dict[str, np.ndarray]]:
    """All groups (n, F) embedded together by `fit`: columns x and y of each.

    Raises: RunStopped, naming `title`, where all points are equal.
    """
    everything = np.concatenate(list(groups.values()))
    if (everything == everything[0]).all():  # t-SNE would end the interpreter
        raise RunStopped(
            f"{title}: all {len(everything)} points are equal, there is nothing to draw. Codes that are all zero come"
            " of training with too high a --sr_lambda"
        )
    parts = np.split(fit(everything), np.cumsum([len(x) for x in groups.values()])[:-1])
    return {name: {"x": part[:, 0], "y": part[:, 1]} for name, part in zip(groups, parts, strict=True)}
