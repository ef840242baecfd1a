"""Evaluation. `EVALS` and `TSNES` are the tables of modes; scores are in `evals.scores`."""

from collections.abc import Callable
from functools import partial

from common.flags import Flags
from evals.embed import run_tsne
from evals.report import run_detection

EVALS: dict[str, Callable[[Flags], None]] = {
    "ood_pre": partial(run_detection, sparse=False, reference=False),
    "ood_pre_refmix": partial(run_detection, sparse=False, reference=True),
    "ood_pre_cocsr": partial(run_detection, sparse=True, reference=False),
    "ood_pre_cocsr_refmix": partial(run_detection, sparse=True, reference=True),
}

TSNES: dict[str, Callable[[Flags], None]] = {
    "ood_pre_tsne": partial(run_tsne, sparse=False, reference=False),
    "ood_pre_tsne_dict": partial(run_tsne, sparse=True, reference=False),
    "ood_pre_tsne_dict_refmix": partial(run_tsne, sparse=True, reference=True),
}
