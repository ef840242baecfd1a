"""t-SNE: where test images lie among the training images and, after stage 2, among the atoms.

Letters: N images, K shifts, F features, M atoms.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from torch import Tensor

from common.errors import RunStopped, UserError
from common.flags import Flags
from common.seed import seed_of
from datasets import ShiftSpec
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
) -> Iterator[Result]:
    """One result for each layer and shift, `<layer>_shift<k>`: points in the plane, by group of images.

    output: name of the network's output to show; None: `layers` of --ood_layer. With `s`, the features that are coded,
    come the atoms, scaled to the mean norm of the features. partner: as `evals.detect.detect`.
    Flags are read and test images loaded before the first result is asked for. The main rank alone gets results.
    Raises: UserError for an unknown layer and for the logits of a single shift; RunStopped where all points are equal.
    """
    flags, split = trained.flags, trained.split
    with trained.world.raise_together():
        shown, limit = shown_outputs(flags, output, layers), flags.of(TsneSpec, only=("tsne_points",)).tsne_points
        extraction = Extraction.of(extractor, trained, shown.values())
        shifts = len(extraction.draws.shifts)
        if output == "shift" and shifts < 2:
            raise UserError(f"--shift_trans_type: one shift has no logits to show in --mode {flags.mode}")
        references = flags.of(ReferenceSpec).refmix_batch_size if partner == "reference" else 0
        kind = "" if extractor.plain else flags.of(ShiftSpec, only=("shift_trans_type",)).shift_trans_type
        of_shift = f" of {kind}" if kind else ""
        test, train = trained.test_images().to(trained.device), trained.train_images()

    def results() -> Iterator[Result]:
        fitted, known = extraction.fit(train)
        pool = reference_pool(train, references, flags.seed) if references else None
        found = fitted.outputs(test, f"{trained.split.dataset} test images", pool)
        if not trained.world.is_main:
            return
        normal = split.normal(test.labels).cpu()
        data = {"training": identity(train), trained.split.dataset: identity(test)}
        facts = {"data": data, "settings": settings_of(flags)}
        for layer, name in shown.items():
            for k in range(shifts):
                groups = _groups(known[name][:, k], found[name][:, k], normal)
                groups = {title: _some(x, limit, flags.seed) for title, x in groups.items() if len(x)}
                if name == "s" and isinstance(trained.net, CocsrNet):
                    groups["atoms"] = _scaled_atoms(trained.net, k, groups)
                title = f"{trained.split.dataset}, normal: {split.normal_title}, shift {k}{of_shift}, {layer}"
                yield Result(f"{layer}_shift{k}", {}, project(groups, title), {**facts, "title": title})

    return results()


def _groups(train: Tensor, test: Tensor, normal: Tensor) -> dict[str, np.ndarray]:
    """Features (N, F) by group; normal (N,) bool, of the test images."""
    found = {"anomalous test": test[~normal], "normal training": train, "normal test": test[normal]}
    return {title: x.numpy() for title, x in found.items()}


def _scaled_atoms(net: CocsrNet, k: int, groups: Mapping[str, np.ndarray]) -> np.ndarray:
    """The atoms of shift k (M, F), scaled to the mean norm of the features."""
    atoms = net.sr_nets.dictionary[k].detach().cpu().numpy().T
    mean_norm = np.linalg.norm(np.concatenate(list(groups.values())), axis=1).mean()
    return atoms * (mean_norm / np.maximum(np.linalg.norm(atoms, axis=1, keepdims=True), 1e-12))


def shown_outputs(flags: Flags, output: str | None, layers: Mapping[str, str]) -> dict[str, str]:
    """The network's outputs to show, by the name of their layer. Raises: UserError for an unknown layer."""
    if output == "s":
        layer = flags.of(FeatureTransform, only=("sr_layer",)).sr_layer
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


def project(groups: Mapping[str, np.ndarray], title: str) -> dict[str, dict[str, np.ndarray]]:
    """All groups (n, F) embedded together, by t-SNE with seed 0: columns x and y of each.

    Raises: RunStopped, naming `title`, where all points are equal.
    """
    from sklearn.manifold import TSNE

    everything = np.concatenate(list(groups.values()))
    if (everything == everything[0]).all():  # t-SNE would end the interpreter
        raise RunStopped(
            f"{title}: all {len(everything)} points are equal, there is nothing to draw. Codes that are all zero come"
            " of training with too high a --sr_lambda"
        )
    perplexity = min(30.0, (len(everything) - 1) / 3)
    points = TSNE(random_state=0, perplexity=perplexity, init="pca").fit_transform(everything)
    parts = np.split(points, np.cumsum([len(x) for x in groups.values()])[:-1])
    return {name: {"x": part[:, 0], "y": part[:, 1]} for name, part in zip(groups, parts, strict=True)}
