"""t-SNE pictures: where test images lie among the training images and, after stage 2, among the atoms.

Letters: N images, K shifts, F feature size, M atoms.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.dist import SINGLE, World
from common.errors import RunStopped, UserError
from common.files import write_whole
from common.flags import Flags
from common.seed import seed_of
from evals.evidence import Evidence
from evals.report import result_facts
from evals.subject import identity, load_subject
from evals.writing import place_for
from models.feature_net import CocsrNet

# Okabe and Ito's palette, which most colour-blind readers can tell apart; drawn in this order, atoms on top.
_STYLE: dict[str, dict[str, Any]] = {
    "anomalous test": {"c": "#E69F00", "marker": ".", "s": 14, "alpha": 0.55},
    "normal training": {"c": "#999999", "marker": ".", "s": 14, "alpha": 0.7},
    "normal test": {"c": "#0072B2", "marker": ".", "s": 22, "alpha": 0.9},
    "atoms": {"c": "#D55E00", "marker": "*", "s": 45, "alpha": 1.0, "edgecolors": "black", "linewidths": 0.4},
}
# The key of a picture's facts in its file.
_FACTS = "Comment"
_LAYERS = {"penultimate": "h", "simclr": "z", "shift": "shift"}


def run_tsne(
    flags: Flags,
    world: World = SINGLE,
    *,
    evidence: Evidence,
    trained_by: Sequence[str],
    output: str | None,
    reference: bool = False,
) -> None:
    """Draw one picture per shift (and layer) beside the checkpoint.

    output: name of the network's output to show; None: the layers of --ood_layer. With `s`, the features that are
    coded, come the atoms, scaled to the mean norm of the features.
    Raises: UserError as `load_subject`; for an unknown layer; for the logits of a single shift.
    """
    begun = time.monotonic()
    with world.raise_together():
        shown, limit = _shown(flags, output), flags.tsne_points
        subject = load_subject(flags, evidence, trained_by=trained_by, reference=reference, world=world)
        if output == "shift" and len(subject.draws.shifts) < 2:
            raise UserError(f"--shift_trans_type: one shift has no logits to show in --mode {flags.mode}")
    for line in flags.unread_notes():
        print(line)
    test = subject.split.test().to(subject.device)
    train, references, data = subject.training()
    test_outputs = subject.outputs(test, f"{flags.dataset} test images", references)
    if not world.is_main:
        return
    normal = subject.split.normal(test.labels).cpu().numpy()
    facts = result_facts(flags, subject, begun, data | {flags.dataset: identity(test)})
    for layer, name in shown.items():
        for k in range(len(subject.draws.shifts)):
            test_x = test_outputs[name][:, 0, k].numpy()
            groups = {
                "anomalous test": test_x[~normal],
                "normal training": train[name][:, 0, k].numpy(),
                "normal test": test_x[normal],
            }
            groups = {title: _some(x, limit, flags.seed) for title, x in groups.items() if len(x)}
            if name == "s" and isinstance(subject.net, CocsrNet):
                atoms = subject.net.sr_nets.dictionary[k].detach().cpu().numpy().T
                mean_norm = np.linalg.norm(np.concatenate(list(groups.values())), axis=1).mean()
                norms = np.linalg.norm(atoms, axis=1, keepdims=True)
                groups["atoms"] = atoms * (mean_norm / np.maximum(norms, 1e-12))
            of = subject.split.normal_title
            title = f"{flags.dataset}, normal: {of}, shift {k} of {flags.shift_trans_type}, {layer}"
            stem = f"{flags.mode}_{layer}_shift{k}{subject.tag}"
            path = place_for(subject.folder, stem, ".png", facts, _read_facts)
            draw_tsne(groups, path, title=title, facts=facts)
            print(f"wrote {path}", flush=True)


def _shown(flags: Flags, output: str | None) -> dict[str, str]:
    """What the pictures show, by the name in their files: the network's outputs. Raises: UserError, unknown layer."""
    if output == "s":
        layer = flags.sr_layer
        if flags.given("ood_layer") and flags.ood_layer != [layer]:
            raise UserError(f"--ood_layer: atoms live among the coded features; give {layer} (--sr_layer)")
        return {layer: output}
    if output is not None:
        return {output: output}
    unknown = [layer for layer in flags.ood_layer if layer not in _LAYERS]
    if unknown:
        raise UserError(f"--ood_layer {unknown[0]}: known are {', '.join(_LAYERS)}")
    return {layer: _LAYERS[layer] for layer in flags.ood_layer}


def _some(x: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """At most `limit` rows, chosen by the seed."""
    if len(x) <= limit:
        return x
    return x[np.random.default_rng(seed_of(seed, "t-SNE points")).choice(len(x), limit, replace=False)]


def _read_facts(path: Path) -> Any:
    """What `draw_tsne` has written into a picture beside its pixels; None where there is nothing."""
    try:
        with Image.open(path) as picture:
            return json.loads(picture.info[_FACTS])
    except (OSError, ValueError, KeyError):
        return None


def draw_tsne(groups: dict[str, np.ndarray], path: Path, *, title: str, facts: Mapping[str, Any]) -> None:
    """Embed all groups together, t-SNE with seed 0, and write a scatter plot. groups: name in `_STYLE` -> (n, F).

    facts: what the picture depends on, which is kept in its file. Raises: RunStopped where all points are equal.
    """
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    everything = np.concatenate(list(groups.values()))
    if (everything == everything[0]).all():  # t-SNE would end the interpreter
        raise RunStopped(
            f"{title}: all {len(everything)} points are equal, there is nothing to draw. Codes that are all zero come"
            " of training with too high a --sr_lambda"
        )
    perplexity = min(30.0, (len(everything) - 1) / 3)
    points = TSNE(random_state=0, perplexity=perplexity, init="pca").fit_transform(everything)
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.add_subplot()
    start = 0
    for name, x in groups.items():
        part = points[start : start + len(x)]
        start += len(x)
        axes.scatter(part[:, 0], part[:, 1], label=f"{name} ({len(x)})", **_STYLE[name])
    axes.set_title(title, fontsize=11)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=len(groups), frameon=False, markerscale=1.6)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120, metadata={_FACTS: json.dumps(facts)}))
