"""Evaluation. `EVALS` and `TSNES` are the tables of modes; scores are in `evals.scores`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from common.flags import Flags
from evals.accuracy import run_accuracy
from evals.embed import run_tsne
from evals.evidence import CONTRASTIVE, LABELLED, MULTI_SR, ROT_TRANS, SPARSE, Evidence
from evals.report import run_detection


@dataclass(frozen=True)
class EvalMode:
    """One row. run: carries it out. evidence: what it looks at. trained_by: modes of training that make its weights."""

    run: Callable[[Flags], None]
    evidence: Evidence
    trained_by: tuple[str, ...]


_CONTRASTIVE = ("simclr", "simclr_CSI", "sup_simclr", "sup_simclr_CSI")


def _detection(evidence: Evidence, trained_by: tuple[str, ...], *, reference: bool = False) -> EvalMode:
    return EvalMode(partial(run_detection, evidence=evidence, reference=reference), evidence, trained_by)


def _picture(
    evidence: Evidence, trained_by: tuple[str, ...], output: str | None, *, reference: bool = False
) -> EvalMode:
    return EvalMode(partial(run_tsne, evidence=evidence, output=output, reference=reference), evidence, trained_by)


EVALS: dict[str, EvalMode] = {
    "ood_pre": _detection(CONTRASTIVE, _CONTRASTIVE),
    "ood_pre_refmix": _detection(CONTRASTIVE, _CONTRASTIVE, reference=True),
    "ood_pre_cocsr": _detection(SPARSE, ("cocsr_dict",)),
    "ood_pre_cocsr_refmix": _detection(SPARSE, ("cocsr_dict",), reference=True),
    "ood_pre_multi_sr": _detection(MULTI_SR, _CONTRASTIVE),
    "ood_pre_multi_sr_refmix": _detection(MULTI_SR, _CONTRASTIVE, reference=True),
    "ood": _detection(LABELLED, ("sup_linear", "sup_CSI_linear")),
    "rot_trans": _detection(ROT_TRANS, ("rot_trans",)),
    "test_acc": EvalMode(partial(run_accuracy, marginalized=False), LABELLED, ("sup_linear", "sup_CSI_linear")),
    "test_marginalized_acc": EvalMode(partial(run_accuracy, marginalized=True), LABELLED, ("sup_CSI_linear",)),
}

TSNES: dict[str, EvalMode] = {
    "ood_pre_tsne": _picture(CONTRASTIVE, _CONTRASTIVE, None),
    "ood_pre_tsne_shi": _picture(CONTRASTIVE, _CONTRASTIVE, "shift"),
    "ood_pre_tsne_sr": _picture(SPARSE, ("cocsr_dict",), "codes"),
    "ood_pre_tsne_dict": _picture(SPARSE, ("cocsr_dict",), "s"),
    "ood_pre_tsne_dict_refmix": _picture(SPARSE, ("cocsr_dict",), "s", reference=True),
}
