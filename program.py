"""All flags of all scripts: those that the modes of training and evaluation read. Users share one file of flags between
scripts, so that every script knows all of them."""

from common.flags import LauncherSpec, RefusedSpec, Spec
from evals import EVALS, TSNES
from training import STAGE1, STAGE2

_TRAINING = [spec for mode in (STAGE1 | STAGE2).values() for spec in mode.specs]
_EVALUATION = [spec for row in (EVALS | TSNES).values() for spec in row.specs]

SPECS: tuple[type[Spec], ...] = tuple(dict.fromkeys([*_TRAINING, *_EVALUATION, LauncherSpec, RefusedSpec]))
