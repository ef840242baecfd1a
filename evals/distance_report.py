"""The writer of `evals.distance`: JSON, a table, and images as CSV."""

from collections.abc import Iterator

from common.files import write_json
from evals.distance import QUANTITIES, STATISTICS
from evals.report import result_facts, result_place, write_tables
from evals.result import Result, family, nested
from evals.trained import Trained

# A longer table by class is in the file alone.
_ROWS = 20


def write_feature_distance(result: Result, trained: Trained, begun: float) -> None:
    """`result_<mode>.json`, of one class `result_<mode>_class_<label>.json`, a table, with --save_score `pairs_...csv`,
    which `scripts.robust_figures` draws histograms of."""
    facts = {**result_facts(result, trained, begun), **nested(result.metrics)}
    name = "" if result.name == "all" else f"_{result.name}"
    path = result_place(trained, f"result_{trained.flags.mode}{name}", ".json", facts)
    tables = write_tables(result, trained, path.with_name(path.name.replace("result_", "pairs_", 1)))
    write_json(path, {**facts, "pairs": tables})
    print(f"{trained.split.dataset}: {title_of(result)}")
    for line in distance_lines(result):
        print(f"  {line}")
    for place in [*map(path.with_name, tables.values()), path]:
        print(f"wrote {place}", flush=True)


def title_of(result: Result) -> str:
    """What was measured."""
    facts, settings = result.facts, result.facts["settings"]
    of = "all classes" if facts["target"] is None else f"class {facts['target']}"
    attack = f"PGD-{settings['num_steps']} at {255 * settings['epsilon']:.3g}/255"
    return (
        f"features of {facts['n']} test images, {of}; positive pairs by {attack}, negative ones {settings['strategy']}"
    )


def distance_lines(result: Result) -> Iterator[str]:
    """Statistics of each quantity, and where there are several classes the means of each."""
    titles = {name: name.replace("_", " ").replace("l2", "L2") for name in QUANTITIES}
    yield f"{'':<18}" + "".join(f"{kind:>10}" for kind in STATISTICS)
    for name, title in titles.items():
        values = family(result.metrics, name)
        if values:
            yield f"{title:<18}" + "".join(f"{values[kind]:>10.4g}" for kind in STATISTICS)
    if result.facts["without_negative"]:
        yield f"{result.facts['without_negative']} images have no negative"
    by_class = result.facts["by_class"]
    if len(by_class) > _ROWS:
        yield f"means of each of {len(by_class)} classes are in the file"
    elif len(by_class) > 1:
        yield f"{'means':<18}" + "".join(f"{title:>17}" for title in titles.values())
        for name, of in by_class.items():
            shown = [f"{of[title]['mean']:>17.4g}" if title in of else f"{'':>17}" for title in titles]
            yield f"{name[:17]:<18}" + "".join(shown)
