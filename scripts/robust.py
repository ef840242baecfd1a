"""Tables of adversarial training: `python -m scripts.robust logs` reads what scripts/robust_sweep.sh has made.

Accuracy in percent without an attack, under each attack, and in the worst case of every image over all of them; mean
and standard deviation over seeds. The last column names the signs that gradients are masked.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError, command
from common.files import write_text
from common.run import recorded_flags
from scripts.results import markdown
from scripts.tables import cell

# Modes of training, in the order of the table.
METHODS = {
    "supervised": "plain",
    "adv_fgsm_rs": "FGSM-RS",
    "adv_nfgsm": "N-FGSM",
    "adv_pgd": "PGD",
    "adv_trades": "TRADES",
    "adv_mart": "MART",
}
_PARTS = {(False, False): "", (True, False): " + RA", (False, True): " + ANC", (True, True): "-ANCRA"}
# Columns behind those of single attacks: key of the result, title.
_WORST = {"standard": "worst, final logits", "adaptive": "worst, adaptive"}


@dataclass(frozen=True)
class Attacked:
    """One result of `eval.py --mode attack`. method: place in the table and title. group: what rows must share. images:
    what distinguishes those that were attacked, which a seed draws."""

    path: Path
    method: tuple[int, int, float, str]
    seed: int
    group: tuple[Any, ...]
    images: str
    weights: str
    found: Mapping[str, Any]
    epochs: int

    @classmethod
    def of(cls, path: Path) -> "Attacked":
        """Raises: OSError, ValueError, KeyError, TypeError for what is no such result."""
        found = json.loads(path.read_text())
        flags = json.loads((path.parent / "args.json").read_text())["flags"]
        alpha = found["settings"].get("ms_alpha") if "settings" in found else None
        if alpha is not None:  # The weights say what they were trained by before MeanSparse.
            flags = {**flags, **recorded_flags(path.parent / f"{found['weights']}.model")}
        method = method_of(flags, alpha)
        images = {name: data["fingerprint"] for name, data in found["data"].items()}
        shared = found["dataset"], flags["model"], found["n"], found["norm"], round(found["epsilon"], 9)
        group, own = (*shared, found["precision"]), json.dumps(images, sort_keys=True)
        return cls(path, method, int(flags["seed"]), group, own, str(found["weights"]), found, int(found["epochs"]))

    def values(self) -> dict[str, float]:
        """Accuracies in percent, by column."""
        shares = {"natural": self.found["accuracy"], **self.found["attacked"]}
        shares |= {title: self.found["worst"][key] for key, title in _WORST.items() if key in self.found["worst"]}
        shares["worst case"] = self.found["worst_case"]
        return {name: 100 * float(share) for name, share in shares.items()}

    def signs(self) -> list[str]:
        return [sign["name"] for sign in self.found["signs"] if sign["shows"]]


def method_of(flags: Mapping[str, Any], alpha: float | None = None) -> tuple[int, int, float, str]:
    """Of a training's flags, and of alpha of MeanSparse behind it: place in tables by mode, parts of ANCRA and alpha,
    and title. Raises: KeyError."""
    mode, parts = flags["mode"], (bool(flags.get("ra")), bool(flags.get("anc")))
    title = METHODS[mode] + _PARTS[parts] + ("" if alpha is None else f" + MeanSparse {alpha:g}")
    return list(METHODS).index(mode), list(_PARTS).index(parts), -1.0 if alpha is None else alpha, title


def read(roots: Sequence[Path]) -> list[Attacked]:
    """The results below the folders, in the order of the table. Raises: UserError for one that cannot be read."""
    results = []
    for path in sorted({path for root in roots for path in root.rglob("result_attack*.json")}):
        try:
            results.append(Attacked.of(path))
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{path} is not a result of eval.py --mode attack in a run folder; move it elsewhere"
            ) from None
    return sorted(results, key=lambda one: (one.group, one.method, one.weights, one.seed))


def table(results: Sequence[Attacked], only: Sequence[str] | None = None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of results of one group. only: these columns, in this order.

    Raises: UserError for two of one row and seed, and for a column that no result has.
    """
    rows: dict[tuple[Any, ...], list[Attacked]] = defaultdict(list)
    for one in results:
        same = [other for other in rows[one.method, one.weights] if other.seed == one.seed]
        if same:
            raise UserError(f"{one.path} and {same[0].path} are of one network and seed; remove one of them")
        rows[one.method, one.weights].append(one)
    names = list(dict.fromkeys(name for one in results for name in one.values()))
    last = [*_WORST.values(), "worst case"]
    columns = [*(name for name in names if name not in last), *(name for name in last if name in names)]
    if only is not None:
        if missing := [name for name in only if name not in columns]:
            raise UserError(f"--columns {missing[0]}: there are {', '.join(columns)}")
        columns = list(only)
    found = []
    for (method, weights), of_row in rows.items():
        known = [one.values() for one in of_row]
        numbers = [cell([values[name] for values in known if name in values], 1) for name in columns]
        signs = list(dict.fromkeys(sign for one in of_row for sign in one.signs()))
        epochs = ", ".join(map(str, sorted({one.epochs for one in of_row})))
        found.append([method[-1], weights, epochs, *numbers, ", ".join(signs)])
    return ["training", "weights", "epochs", *columns, "masked gradients"], found


def tables(roots: Sequence[Path], only: Sequence[str] | None = None) -> str:
    """All tables as text. only: as `table`. Raises: UserError where there is none, and as `read` and `table`."""
    results = read(roots)
    drawn: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for one in results:
        drawn[one.group, one.seed].add(one.images)
    # Each seed draws its images; where one has several, networks are compared on the same ones only.
    several = {group for (group, _), images in drawn.items() if len(images) > 1}
    groups: dict[tuple[Any, ...], list[Attacked]] = defaultdict(list)
    for one in results:
        groups[*one.group, one.images if one.group in several else ""].append(one)
    if not groups:
        raise UserError(f"nothing to show below {', '.join(map(str, roots))}; scripts/robust_sweep.sh makes it")
    parts = []
    for (dataset, model, n, norm, eps, precision, _), own in groups.items():
        seeds = ", ".join(map(str, sorted({one.seed for one in own})))
        title = f"**{dataset}, {model}, {n} images, {norm} {255 * eps:.3g}/255, {precision}, seeds {seeds}**"
        parts.append(f"{title}\n\n{markdown(*table(own, only))}")
    return "\n".join(parts)


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.robust", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="folders to search for runs")
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="these alone: natural, pgd40, 'worst case', say")
    parser.add_argument("--out", type=Path, help="write the tables to this file as well")
    args = parser.parse_args(argv)
    text = tables([folder.expanduser() for folder in args.folders], args.columns)
    if args.out:
        try:
            write_text(args.out.expanduser(), text)
        except OSError as error:
            raise UserError(f"--out: cannot write {args.out} ({error.strerror})") from None
    print(text, end="")


if __name__ == "__main__":
    sys.exit(main())
