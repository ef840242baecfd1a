"""What a sweep runs: `RECIPES`, the published families of commands, and `METHODS`, the columns of their tables."""

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.flags import Flags, Parser, build_parser, parse
from evals import EVALS
from program import SPECS
from training import STAGE1, STAGE2, run_name

_MODES: Mapping[str, Mapping[str, Any]] = {"train.py": STAGE1, "train_cocsr.py": STAGE2, "eval.py": EVALS}


@dataclass(frozen=True)
class Recipe:
    """One row: what a family of published commands has in common. Flags are as one would write them.

    images: of every command. net: of those with a projector. shift: of those that know shifts. training: of both
    stages. coding: of stage 2 and of what uses its dictionaries. stage2: of its training only. draws: of evaluation.
    """

    dataset: str
    model: str
    classes: int
    epochs: int
    more: int
    suffix: str = ""
    images: str = ""
    net: str = "--simclr_dim 512"
    shift: str = "--shift_trans_type rot_bmix --mix_alpha 0.2"
    training: str = "--batch_size 128"
    stage1: str = ""
    coding: str = "--sr_dict_size 512 --sr_lambda 1e-3 --invert_sr_feature_norm"
    stage2: str = "--sr_lr 1e-3 --loss_lambda_sr_l1 1e-3 --loss_dict_constr_mode 1 --ini_sr_dict_train"
    draws: str = "--ood_samples 10 --resize_factor 0.54 --resize_fix"


# The published ones say what sweep.sh says; `digits` is the quickstart's, done in minutes.
RECIPES = {
    "cifar10": Recipe("cifar10", "resnet18", 10, 1000, 300, "f512_mix82"),
    "cifar100": Recipe("cifar100", "resnet18", 20, 1000, 300, "f512_mix82"),
    "imagenet": Recipe(
        "imagenet",
        "resnet18_imagenet",
        30,
        1000,
        300,
        "f512_j2_mix82",
        training="--batch_size 128 --color_jitter_strength 2",
    ),
    "digits": Recipe(
        "digits",
        "resnet8",
        10,
        60,
        20,
        images="--image_size 16",
        net="",
        training="--batch_size 32",
        stage1="--optimizer adam --lr_init 3e-4 --warmup 2",
        coding="--sr_dict_size 64 --sr_lambda 1e-3 --invert_sr_feature_norm",
        draws="--ood_samples 4 --resize_factor 0.54 --resize_fix",
    ),
}


@dataclass(frozen=True)
class Kind:
    """One row: a command of a job. after: the command whose weights it takes. parts: the recipe's flags it gets."""

    script: str
    mode: str
    parts: tuple[str, ...]
    after: str | None = None


_TRAIN, _LOOK = ("net", "training", "stage1"), ("net", "shift", "draws")
KINDS = {
    "simclr": Kind("train.py", "simclr", _TRAIN),
    "rot_trans": Kind("train.py", "rot_trans", ("training", "stage1")),
    "csi": Kind("train.py", "simclr_CSI", ("net", "shift", "training", "stage1")),
    "cocsr": Kind("train_cocsr.py", "cocsr_dict", ("net", "shift", "training", "coding", "stage2"), "csi"),
    "of simclr": Kind("eval.py", "ood_pre", ("net", "draws"), "simclr"),
    "of rot_trans": Kind("eval.py", "rot_trans", (), "rot_trans"),
    "of csi": Kind("eval.py", "ood_pre_refmix", _LOOK, "csi"),
    "fitted to csi": Kind("eval.py", "ood_pre_multi_sr_refmix", (*_LOOK, "coding"), "csi"),
    "of cocsr": Kind("eval.py", "ood_pre_cocsr_refmix", (*_LOOK, "coding"), "cocsr"),
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
}


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

        The folder may hold results of other flags too, so the names of files do not tell.
        Raises: FileNotFoundError where there is none of these flags; ValueError, KeyError, TypeError for what is none.
        """
        name = f"{self.flags.mode}_{score}"
        found = [(path, json.loads(path.read_text())) for path in self.folder.glob(f"result_{name}*.json")]
        own = [(path.stat().st_mtime, path, result) for path, result in found if self._made(result, score)]
        if not own:
            raise FileNotFoundError(f"no result_{name}*.json of these flags in {self.folder}")
        _, _, result = max(own, key=lambda item: item[:2])
        plain = f"scores_{name}_{self.flags.dataset}.csv"
        return result, self.folder / result.get("scores", {}).get(self.flags.dataset, plain)

    def _made(self, result: Mapping[str, Any], score: str) -> bool:
        """Whether this command may have written a result; files of an older version record fewer settings."""
        flags = self.flags.as_dict()
        weights = result["weights"] if "weights" in result else Path(result["checkpoint"]).stem
        facts = {name: result[name] for name in ("dataset", "one_class_idx", "seed")} | result.get("settings", {})
        # A flag without a value is filled in by the mode.
        asked = {name: flags[name] for name in facts if flags.get(name) is not None}
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
    """The commands that fill the columns `methods`, each after those it needs. options: data_path, epochs, more, flags.

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
        before = make(kind.after) if kind.after else None
        words = ["--dataset", recipe.dataset, "--data_path", options.data_path, "--model", recipe.model]
        words += ["--one_class_idx", str(one_class_idx), "--seed", str(seed), "--mode", kind.mode]
        words += recipe.images.split()
        words += [word for part in kind.parts for word in getattr(recipe, part).split()]
        if kind.script == "eval.py":
            assert before is not None
            words += ["--print_score", "--save_score", "--load_path", str(before.folder), "--ood_score", *scores[name]]
        else:
            epochs = options.epochs + (options.more if before else 0)
            suffix = f"{recipe.suffix}_dm1_init" if before and recipe.suffix else recipe.suffix
            words += ["--epochs", str(epochs), "--log_root", str(out / f"seed_{seed}")]
            words += ["--suffix", suffix] if suffix else []
            words += ["--resume_path", str(before.folder)] if before else []
        words += options.flags
        flags = parse(words, _parser(kind.script))
        folder = (
            before.folder
            if kind.script == "eval.py" and before
            else Path(flags.log_root) / run_name(flags, _MODES[kind.script][kind.mode])
        )
        needs = (*before.needs, before) if before else ()
        made[name] = Step(name, (kind.script, *words), folder, needs, flags)
        return made[name]

    for name in scores:
        make(name)
    return tuple(made.values())
