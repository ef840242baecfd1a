"""Evaluation. `EVALS` and `TSNES` are the tables of modes; scores are in `evals.scores`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from common.dist import World
from common.flags import Flags
from evals.accuracy import run_accuracy
from evals.embed import run_tsne
from evals.evidence import CONTRASTIVE, LABELLED, MULTI_SR, ROT_TRANS, SPARSE, Evidence
from evals.report import run_detection


@dataclass(frozen=True)
class EvalMode:
    """One row. run: carries it out. evidence: what it looks at. trained_by: modes of training that make its weights."""

    run: Callable[[Flags, World], None]
    evidence: Evidence
    trained_by: tuple[str, ...]


# A stage-2 file holds the stage-1 network; linear heads leave it as it was.
_CONTRASTIVE = ("simclr", "simclr_CSI", "sup_simclr", "sup_simclr_CSI", "sup_linear", "sup_CSI_linear", "cocsr_dict")
_LABELLED = ("sup_linear", "sup_CSI_linear")


def _row(run: Callable[..., None], looks_at: Evidence, trained_by: tuple[str, ...], **settings: Any) -> EvalMode:
    return EvalMode(partial(run, trained_by=trained_by, **settings), looks_at, trained_by)


def _detection(evidence: Evidence, trained_by: tuple[str, ...], *, reference: bool = False) -> EvalMode:
    return _row(run_detection, evidence, trained_by, evidence=evidence, reference=reference)


def _picture(
    evidence: Evidence, trained_by: tuple[str, ...], output: str | None, *, reference: bool = False
) -> EvalMode:
    return _row(run_tsne, evidence, trained_by, evidence=evidence, output=output, reference=reference)


EVALS: dict[str, EvalMode] = {
    "ood_pre": _detection(CONTRASTIVE, _CONTRASTIVE),
    "ood_pre_refmix": _detection(CONTRASTIVE, _CONTRASTIVE, reference=True),
    "ood_pre_cocsr": _detection(SPARSE, ("cocsr_dict",)),
    "ood_pre_cocsr_refmix": _detection(SPARSE, ("cocsr_dict",), reference=True),
    "ood_pre_multi_sr": _detection(MULTI_SR, _CONTRASTIVE),
    "ood_pre_multi_sr_refmix": _detection(MULTI_SR, _CONTRASTIVE, reference=True),
    "ood": _detection(LABELLED, _LABELLED),
    "rot_trans": _detection(ROT_TRANS, ("rot_trans",)),
    "test_acc": _row(run_accuracy, LABELLED, _LABELLED, marginalized=False),
    "test_marginalized_acc": _row(run_accuracy, LABELLED, ("sup_CSI_linear",), marginalized=True),
}

TSNES: dict[str, EvalMode] = {
    "ood_pre_tsne": _picture(CONTRASTIVE, _CONTRASTIVE, None),
    "ood_pre_tsne_shi": _picture(CONTRASTIVE, _CONTRASTIVE, "shift"),
    "ood_pre_tsne_sr": _picture(SPARSE, ("cocsr_dict",), "codes"),
    "ood_pre_tsne_dict": _picture(SPARSE, ("cocsr_dict",), "s"),
    "ood_pre_tsne_dict_refmix": _picture(SPARSE, ("cocsr_dict",), "s", reference=True),
}
