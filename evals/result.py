"""What an evaluation finds. Evaluators yield results and neither print nor write; `evals.report` does both."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


class Result(NamedTuple):
    """One finding: of a score, a condition or a layer, which gives its `name`.

    metrics: numbers by name. `auroc/<set>` is the AUROC against one test set.
    per_image: by set (or group of points), columns of equal length, one entry an image.
    facts: what the numbers depend on, in types that JSON knows.
    arrays: what its pictures show, by title.
    """

    name: str
    metrics: dict[str, float]
    per_image: dict[str, dict[str, np.ndarray]]
    facts: dict[str, Any]
    arrays: dict[str, np.ndarray] = {}


def nested(metrics: Mapping[str, float]) -> dict[str, Any]:
    """Metrics as result files hold them: `auroc/one_class_0` is the entry `one_class_0` of `auroc`."""
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        family, _, member = name.partition("/")
        if member:
            found.setdefault(family, {})[member] = value
        else:
            found[name] = value
    return found


def family(metrics: Mapping[str, T], name: str) -> dict[str, T]:
    """The members of one family of metrics, by set, or of arrays: `family(metrics, "auroc")`."""
    prefix = f"{name}/"
    return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
