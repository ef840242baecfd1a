"""How well a labelled network names classes, and how well its confidence can be trusted.

Letters: N images, C classes.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from common.dist import SINGLE, World
from common.errors import UserError
from common.files import write_json
from common.flags import Flags
from evals.evidence import LABELLED
from evals.report import result_facts
from evals.scores import label_probabilities
from evals.subject import identity, load_subject
from evals.writing import place_for, read_json

_BINS = 15


def run_accuracy(flags: Flags, world: World = SINGLE, *, marginalized: bool, trained_by: Sequence[str]) -> None:
    """Accuracy and expected calibration error on the test images of the training classes, written as JSON.

    trained_by: modes of training whose weights make sense. marginalized: by the joint head, averaged over the four
    rotations, else by the linear head.
    Raises: UserError as `load_subject`; for weights of another number of classes.
    """
    begun = time.monotonic()
    names = ["baseline_marginalized"] if marginalized else ["baseline"]
    with world.raise_together():
        if flags.one_class_idx is not None:
            raise UserError(f"--one_class_idx: --mode {flags.mode} names all classes; leave it out")
        subject = load_subject(flags, LABELLED, trained_by=trained_by, names=names, world=world)
        test = subject.split.test()
        test = test.where(subject.split.normal(test.labels))
    for line in flags.unread_notes():
        print(line)
    outputs = subject.outputs(test.to(subject.device), f"{flags.dataset} test images")
    if not world.is_main:
        return
    probabilities = label_probabilities(outputs, marginalized=marginalized)
    if probabilities.shape[1] != subject.split.n_classes:
        there = probabilities.shape[1]
        raise UserError(f"--dataset: it has {subject.split.n_classes} classes, but {subject.checkpoint} knows {there}")
    found = {"accuracy": accuracy(probabilities, test.labels), "ece": calibration_error(probabilities, test.labels)}
    facts = {**result_facts(flags, subject, begun, {flags.dataset: identity(test)}), "n": len(test), **found}
    path = place_for(subject.folder, f"accuracy_{flags.mode}{subject.tag}", ".json", facts, read_json)
    write_json(path, facts)
    print(
        f"{flags.dataset}, {len(test)} test images of {subject.split.n_classes} classes:"
        f" accuracy {100 * found['accuracy']:.1f} %, expected calibration error {100 * found['ece']:.1f} %"
    )
    print(f"wrote {path}")


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Shard of the rows of (N, C) that are largest at their label (N,)."""
    return float((probabilities.argmax(1) == labels).double().mean())


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = _BINS) -> float:
    """Expected calibration error: the mean over images of |accuracy - mean confidence| in the image's bin.

    Bins of equal width split the confidences, the largest probabilities of the rows of (N, C); one on a border belongs
    to the bin below. Over the whole set, where the published program averaged over batches. Source: Guo et al. 2017.
    """
    confidence, named = probabilities.double().max(1)
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    zeros = torch.zeros(bins, dtype=torch.float64)
    right = zeros.index_add(0, which, (named == labels).double())
    claimed = zeros.index_add(0, which, confidence)
    return float((right - claimed).abs().sum() / len(labels))
