"""alpha of MeanSparse: accuracy without an attack, under APGD, and under APGD that knows the operators, on held-out
training images, over a grid of alpha; and a choice.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.errors import UserError
from common.files import read_facts, save_tensors, write_json
from common.seed import generator
from datasets import ImageSet, PictureSet
from datasets.sets import evenly
from evals.attack import ATTACKS, Victim, heads_of, some_images, straight_through, victim_of
from evals.classify import CLEAN, Condition, classify
from evals.result import Result
from evals.specs import AlphaScanSpec, AttackSpec, PlaceSpec
from evals.trained import Trained, identity, settings_of
from evals.writing import read_json
from models.mean_sparse import alpha_of, check_statistics, operators, with_alpha

# Columns: which attack of `evals.attack`.
PLAIN, STRAIGHT = "apgd_ce", "straight"
COLUMNS = (CLEAN, PLAIN, STRAIGHT)
_READ = ("norm", "attack_steps", "attack_restarts")
# alpha -> accuracies by column.
Table = dict[float, dict[str, float]]


class Rule(NamedTuple):
    """How alpha is chosen: the largest accuracy in a column, the smallest alpha of equals. bounded: among those that
    lose no more than --max_clean_drop without an attack."""

    column: str
    bounded: bool


RULES = {
    # By the attack that MeanSparse cannot mislead.
    "straight_through": Rule(STRAIGHT, bounded=True),
    # As published.
    "released": Rule(PLAIN, bounded=False),
}


def choose(table: Mapping[float, Mapping[str, float]], rule: Rule, max_drop: float) -> float:
    """alpha by a rule. table: with an entry of alpha 0. max_drop: a share."""
    least = table[0.0][CLEAN] - max_drop if rule.bounded else 0.0
    # Differences of shares are rounded.
    kept = [alpha for alpha in sorted(table) if table[alpha][CLEAN] >= least - 1e-9]
    return max(kept, key=lambda alpha: table[alpha][rule.column])


def alpha_scan(trained: Trained) -> Iterator[Result]:
    """One result. Metrics: `alpha`, chosen; `<column>/<alpha>` of every alpha. facts: `table`, and what it depends on.

    What has been measured is written after each alpha, and read where the same scan is asked for again.
    Raises: UserError for a network without operators or statistics, and without held-out images.
    """
    flags, world = trained.flags, trained.world
    with world.raise_together():
        _check(trained)
        spec, attack = flags.of(AlphaScanSpec), flags.of(AttackSpec, only=_READ)
        images = _held_out(trained, spec.scan_images)
        victim = victim_of(trained, attack, images)
        path = state_file(trained)
    alphas = sorted({0.0, *spec.alphas})

    def measured() -> Iterator[Result]:
        key = _key(trained, victim, images)
        table = world.broadcast_object(_begun(path, key) if world.is_main else {})
        before = alpha_of(trained.net)
        path.parent.mkdir(parents=True, exist_ok=True)
        if table:
            print(f"going on with {path}: {len(table)} of {len(alphas)} alpha are there", flush=True)
        for alpha in alphas:
            if alpha not in table:
                table[alpha] = _measure(trained, victim, images, alpha)
                print(f"alpha {alpha:g}: {_line(table[alpha])}", flush=True)
                if world.is_main:
                    write_json(path, {"key": key, "table": [{"alpha": a, **row} for a, row in table.items()]})
        table = {alpha: table[alpha] for alpha in alphas}
        assert alpha_of(trained.net) == before
        yield _result(trained, spec, victim, images, table)

    return measured()


def state_file(trained: Trained) -> Path:
    """Where a scan keeps what it has measured: in --out, else beside the weights."""
    assert trained.path is not None
    out = trained.flags.of(PlaceSpec).out
    tag = "" if trained.path.stem == "last" else f"_{trained.path.stem}"
    return (Path(out) if out else trained.path.parent) / f"alpha_scan{tag}.partial.json"


def write_sparse(trained: Trained, alpha: float, path: Path) -> None:
    """The weights with this alpha, which say of their training what those of --load_path say, and alpha."""
    assert trained.path is not None
    facts = read_facts(trained.path)
    facts = {**facts, "flags": {**facts.get("flags", {}), "ms_alpha": alpha}}
    with with_alpha(trained.net, alpha):
        save_tensors(path, trained.net.state_dict(), facts=facts)


def _check(trained: Trained) -> None:
    found, path = operators(trained.net), trained.path
    if not found:
        raise UserError(
            f"--load_path: {path} has no operators of MeanSparse; train.py --mode meansparse --load_path {path} puts"
            " them in"
        )
    try:
        check_statistics(found)
    except ValueError as error:
        raise UserError(f"--load_path: {path}: {error}") from None


def _held_out(trained: Trained, n: int | None) -> ImageSet:
    found = trained.split.held_out_images()
    if found is None:
        raise UserError(
            "--held_out: alpha is chosen on training images that the training has not seen; give --held_out 500, say,"
            " and the same to the training"
        )
    if isinstance(found, PictureSet):
        if n is None:
            raise UserError("--scan_images: pictures of this data set are decoded on demand; say how many, 1000 say")
        order = torch.randperm(len(found), generator=generator(trained.flags.seed, "scanned pictures"))
        place = evenly(found.labels.cpu(), order, n)
        found = found.where(torch.isin(torch.arange(len(found)), place))
        return found.loaded().to(trained.device)
    return some_images(found.to(trained.device), n, trained.flags.seed)


def _key(trained: Trained, victim: Victim, images: ImageSet) -> dict[str, Any]:
    """What two scans must have in common for one to go on with the other."""
    assert trained.path is not None
    settings = {k: v for k, v in settings_of(trained.flags).items() if k not in _CHOICE}
    weights: dict[str, Any] = {"path": str(trained.path.resolve()), "size": trained.path.stat().st_size}
    weights["written"] = trained.path.stat().st_mtime_ns
    # Draws follow from these, too.
    drawn = {"seed": trained.flags.seed, "precision": victim.precision, "batch_size": victim.batch_size}
    return {"weights": weights, "settings": settings, **drawn, **identity(images)}


# Flags by which no measured number changes.
_CHOICE = ("alphas", "select", "max_clean_drop", "ms_alpha")


def _begun(path: Path, key: Mapping[str, Any]) -> Table:
    """What the same scan has measured before."""
    found = read_json(path)
    try:
        if found is None or found["key"] != dict(key):
            return {}
        return {float(row["alpha"]): {name: float(row[name]) for name in COLUMNS} for row in found["table"]}
    except (KeyError, TypeError, ValueError):
        return {}


def _measure(trained: Trained, victim: Victim, images: ImageSet, alpha: float) -> dict[str, float]:
    def perturb(name: str) -> Callable[..., Any]:
        run = ATTACKS[name].run
        return lambda net, x, labels, gen: run(victim, x, labels, gen)

    at = f"alpha {alpha:g}"
    conditions = [
        Condition(at=at),
        Condition(PLAIN, perturb(PLAIN), at=at),
        Condition(STRAIGHT, perturb(STRAIGHT), straight_through, at),
    ]
    with with_alpha(trained.net, alpha):
        results = classify(trained, predict=lambda net, x: heads_of(net)(x).final, conditions=conditions, test=images)
        return {result.facts["condition"]: result.metrics["accuracy"] for result in results}


def _line(row: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {100 * row[name]:.1f} %" for name in COLUMNS)


def _result(trained: Trained, spec: AlphaScanSpec, victim: Victim, images: ImageSet, table: Table) -> Result:
    rule, max_drop = RULES[spec.select], spec.max_clean_drop / 100
    alpha = choose(table, rule, max_drop)
    metrics = {"alpha": alpha} | {f"{name}/{a:g}": row[name] for a, row in table.items() for name in COLUMNS}
    facts = {
        "data": {trained.split.dataset: identity(images)},
        "settings": settings_of(trained.flags),
        "n": len(images),
        "operators": len(operators(trained.net)),
        "epsilon": victim.eps,
        "norm": victim.spec.norm,
        "precision": victim.precision,
        "rule": {"select": spec.select, **rule._asdict(), "max_clean_drop": max_drop},
        "chosen_by": {name: choose(table, own, max_drop) for name, own in RULES.items()},
        "table": [{"alpha": a, **row} for a, row in table.items()],
    }
    return Result("alpha_scan", metrics, {}, facts)
