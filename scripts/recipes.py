"""What a sweep runs: `RECIPES`, the published families of commands, and `METHODS`, the columns of their tables."""

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.flags import Flags, Parser, RunSpec, build_parser, parse
from datasets.one_class import SplitSpec
from evals import EVALS
from program import SPECS
from training import STAGE1, STAGE2, run_name

_MODES: Mapping[str, Mapping[str, Any]] = {"train.py": STAGE1, "train_cocsr.py": STAGE2, "eval.py": EVALS}


# The rows of recipes.env: FAMILY_NAME -> words.
_ROWS = {
    name: words
    for name, _, words in (
        row.partition("=") for row in shlex.split(Path(__file__).with_suffix(".env").read_text(), comments=True)
    )
}


@dataclass(frozen=True)
class Recipe:
    """A family of commands, by its name in recipes.env."""

    family: str

    def words(self, name: str) -> list[str]:
        """The words of the row `name`: the family's own, or else that of all. Raises: KeyError where there is none."""
        row = _ROWS.get(f"{self.family}_{name}")
        found: list[str] = []
        for word in (_ROWS[f"all_{name}"] if row is None else row).split():
            found += self.words(word[1:]) if word.startswith("@") else [word]
        return found

    def own(self, name: str) -> list[str]:
        """The words of the row `name` where the family, or all, have it; else none."""
        return self.words(name) if {f"{self.family}_{name}", f"all_{name}"} & _ROWS.keys() else []

    @property
    def classes(self) -> int:
        return int(*self.words("classes"))

    @property
    def epochs(self) -> int:
        """Of stage 1, where a command has none of its own."""
        return int(*self.words("epochs"))

    @property
    def minutes(self) -> float | None:
        """Of one core, that every method of a family at equal cost trains a class."""
        found = self.own("minutes")
        return float(*found) if found else None

    @property
    def more(self) -> int:
        """Epochs that stage 2 adds."""
        return int(*self.words("more"))


RECIPES = {family: Recipe(family) for family in ("cifar10", "cifar100", "imagenet", "digits", "minutes")}


@dataclass(frozen=True)
class Kind:
    """A command of a job, by its row in recipes.env. after: the command whose weights it takes."""

    row: str
    after: str | None = None

    @property
    def mode(self) -> str:
        words = RECIPES["cifar10"].words(self.row)
        return words[words.index("--mode") + 1]

    def before(self, recipe: Recipe) -> str | None:
        """`after`, or what the family has in its place."""
        return next(iter(recipe.own(f"{self.row}_after")), self.after)

    def length(self, recipe: Recipe, options: argparse.Namespace) -> list[str]:
        """The flags that say how long it trains. options: epochs, more, times."""
        if self.row in _WITHOUT_EPOCHS:
            return []
        if not recipe.own(f"{self.row}_epochs"):
            return ["--epochs", str(options.epochs + (options.more if self.after else 0))]
        earlier = self.before(recipe)
        return ["--epochs", str(self.scaled(recipe, options.times, KINDS[earlier] if earlier else None))]

    def scaled(self, recipe: Recipe, times: float, earlier: "Kind | None") -> int:
        """The last epoch where all training takes `times` as long. earlier: the command that trained before.

        What takes the same time always, such as fitting dictionaries, is in the row `fixed`, in epochs.
        """
        own, fixed = (sum(map(float, recipe.own(f"{self.row}_{name}"))) for name in ("epochs", "fixed"))
        start, start_now = 0.0, 0
        if earlier is not None:
            start, start_now = float(*recipe.own(f"{earlier.row}_epochs")), earlier.scaled(recipe, times, None)
        return start_now + max(1, round(times * (own - start + fixed) - fixed))

    def suffix(self, recipe: Recipe) -> list[str]:
        """The flags that tell its run from others of the same mode."""
        own = recipe.own(f"{self.row}_suffix") or recipe.words("stage2_suffix" if self.after else "suffix")
        return ["--suffix", *own] if own else []


# Commands that have the epochs of those they start from.
_WITHOUT_EPOCHS = ("levels",)


KINDS = {
    "simclr": Kind("simclr"),
    "rot_trans": Kind("rot_trans"),
    "csi": Kind("csi"),
    "cocsr": Kind("cocsr", "csi"),
    "mixed_csi": Kind("mixed_csi"),
    "short_rot_trans": Kind("short_rot_trans"),
    "levels": Kind("levels", "short_rot_trans"),
    "short_csi": Kind("short_csi"),
    "uniclr": Kind("uniclr"),
    "of simclr": Kind("of_simclr", "simclr"),
    "of rot_trans": Kind("of_rot_trans", "rot_trans"),
    "of csi": Kind("of_csi", "csi"),
    "fitted to csi": Kind("fitted_to_csi", "csi"),
    "of cocsr": Kind("of_cocsr", "cocsr"),
    "of levels": Kind("of_levels", "levels"),
    "of short_csi": Kind("of_short_csi", "short_csi"),
    "of uniclr": Kind("of_uniclr", "uniclr"),
}

# Columns of the table: the evaluation that fills each, and by which score.
METHODS = {
    "SimCLR": ("of simclr", "simclr"),
    "Rot+Trans": ("of rot_trans", "rot_trans"),
    "CSI": ("of csi", "CSI"),
    "k-NN": ("of csi", "knn"),
    "OC-SVM": ("of csi", "ocsvm"),
    "ICS-2020": ("fitted to csi", "CSI_sr"),
    "ADMM-SRNet": ("of cocsr", "CSI_sr"),
    "CSI-short": ("of short_csi", "CSI"),
    "shift-classifier": ("of short_csi", "shift_logsoftmax"),
    "UniCLR": ("of uniclr", "knn_cosine"),
    "transformations": ("of levels", "levels_transformations"),
    "ADMM-SRNet-levels": ("of levels", "levels"),
}


def planned_minutes(recipe: Recipe, method: str, times: float) -> float:
    """How many minutes a method of a family at equal time trains, stage 2 included: whole epochs, `times` as many."""
    kind = KINDS[METHODS[method][0]]
    # The last command that has epochs counts those of the commands before it.
    while not recipe.own(f"{kind.row}_epochs"):
        kind = KINDS[str(kind.before(recipe))]
    earlier = kind.before(recipe)
    now = kind.scaled(recipe, times, KINDS[earlier] if earlier else None)
    own, fixed = (sum(map(float, recipe.own(f"{kind.row}_{name}"))) for name in ("epochs", "fixed"))
    assert recipe.minutes is not None
    return recipe.minutes * (now + fixed) / (own + fixed)


@dataclass(frozen=True)
class Step:
    """A command of a job and the folder that it works in. needs: those before it, on which its result depends. flags:
    its arguments, parsed."""

    kind: str
    arguments: tuple[str, ...]
    folder: Path
    needs: tuple["Step", ...]
    flags: Flags = field(default=Flags({}), compare=False)

    @property
    def key(self) -> str:
        """What it depends on: its own command and those before it."""
        return "\n".join(shlex.join(step.arguments) for step in (*self.needs, self))

    def result(self, score: str) -> tuple[dict[str, Any], Path]:
        """Of an evaluation: its result, and the scores of the images of its data set.

        The folder may hold results of other flags too, so the names of files are not enough.
        Raises: FileNotFoundError where there is none of these flags; ValueError, KeyError, TypeError for what is none.
        """
        name, dataset = f"{self.flags.mode}_{score}", self.flags.of(SplitSpec).dataset
        found = [(path, json.loads(path.read_text())) for path in self.folder.glob(f"result_{name}*.json")]
        own = [(path.stat().st_mtime, path, result) for path, result in found if self._made(result, score)]
        if not own:
            raise FileNotFoundError(f"no result_{name}*.json of these flags in {self.folder}")
        _, _, result = max(own, key=lambda item: item[:2])
        plain = f"scores_{name}_{dataset}.csv"
        return result, self.folder / result.get("scores", {}).get(dataset, plain)

    def _made(self, result: Mapping[str, Any], score: str) -> bool:
        """Whether this command may have written a result; files of an older version record fewer settings."""
        flags = self.flags.as_dict()
        weights = result["weights"] if "weights" in result else Path(result["checkpoint"]).stem
        facts = {name: result[name] for name in ("dataset", "one_class_idx", "seed")} | result.get("settings", {})
        # A flag without a value is filled in by the mode; some that are not given are for the weights to say.
        told = [name for name in facts if self.flags.given(name) or not self.flags.inheritable(name)]
        asked = {name: flags[name] for name in told if flags.get(name) is not None}
        return (result["score"], weights) == (score, "last") and all(facts[name] == asked[name] for name in asked)


# What a sweep gives every command itself, and how one asks for something else.
_OWN = {
    "overwrite": "a sweep goes on from what there is; remove its --out to start anew",
    "mode": "choose columns by --methods",
    "ood_score": "choose columns by --methods",
    "one_class_idx": "give --classes",
    "seed": "give --seeds",
    "epochs": "give --epochs and --more before the --",
    "log_root": "give --out",
    "resume_path": "every command starts from the one before it",
    "load_path": "every command starts from the one before it",
    "dry_run": "give --dry_run before the --",
}


def refuse_own(words: Sequence[str]) -> None:
    """Raises: UserError for flags of every command that are the sweep's to give, or that do not parse."""
    given = parse(words, _parser("train.py"))
    for name, remedy in _OWN.items():
        if given.given(name):
            raise UserError(f"--{name} after -- : {remedy}")


def _parser(script: str) -> Parser:
    modes = _MODES[script]
    return build_parser(script, modes, next(iter(modes)), SPECS)


def steps_of(
    recipe: Recipe, methods: Sequence[str], one_class_idx: int, seed: int, out: Path, options: argparse.Namespace
) -> tuple[Step, ...]:
    """The commands that fill the columns `methods`, each after those it needs.

    options: data_path, epochs, more, times, flags.

    Raises: UserError for flags that do not parse.
    """
    made: dict[str, Step] = {}
    scores: dict[str, list[str]] = {}
    for method in methods:
        scores.setdefault(METHODS[method][0], []).append(METHODS[method][1])

    def make(name: str) -> Step:
        if name in made:
            return made[name]
        kind = KINDS[name]
        earlier = kind.before(recipe)
        before = make(earlier) if earlier else None
        script, *row = recipe.words(kind.row)
        words = ["--dataset", *recipe.words("dataset"), "--data_path", options.data_path]
        words += ["--model", *recipe.words("model"), "--one_class_idx", str(one_class_idx), "--seed", str(seed), *row]
        if script == "eval.py":
            assert before is not None
            words += ["--print_score", "--save_score", "--load_path", str(before.folder), "--ood_score", *scores[name]]
        else:
            words += [*kind.length(recipe, options), "--log_root", str(out / f"seed_{seed}"), *kind.suffix(recipe)]
            words += ["--resume_path", str(before.folder)] if before else []
        words += options.flags
        flags = parse(words, _parser(script))
        folder = (
            before.folder
            if script == "eval.py" and before
            else Path(flags.of(RunSpec, only=("log_root",)).log_root) / run_name(flags, _MODES[script][kind.mode])
        )
        needs = (*before.needs, before) if before else ()
        made[name] = Step(name, (script, *words), folder, needs, flags)
        return made[name]

    for name in scores:
        make(name)
    return tuple(made.values())
