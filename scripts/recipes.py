"""What a sweep runs: `RECIPES`, the published families of commands, and `METHODS`, the columns of their tables."""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.flags import Tables, build_parser, parse, run_name
from datasets import DATASETS, SHIFTS
from datasets.outliers import OUTLIERS
from evals import EVALS
from models import BACKBONES
from training import STAGE1, STAGE2

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
    """A command of a job and the folder that it works in. needs: those before it, on which its result depends."""

    kind: str
    arguments: tuple[str, ...]
    folder: Path
    needs: tuple["Step", ...]

    @property
    def key(self) -> str:
        """What it depends on: its own command and those before it."""
        return "\n".join(shlex.join(step.arguments) for step in (*self.needs, self))

    def files(self, score: str) -> tuple[Path, Path]:
        """Of an evaluation: its result, and the scores of the images of its data set."""
        name = f"{KINDS[self.kind].mode}_{score}"
        return self.folder / f"result_{name}.json", self.folder / f"scores_{name}_{self.value('dataset')}.csv"

    def value(self, flag: str) -> str:
        """What the command gives a flag, the last time it does."""
        last = max(i for i, word in enumerate(self.arguments) if word == f"--{flag}")
        return self.arguments[last + 1]


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
        tables = Tables(DATASETS, OUTLIERS, BACKBONES, SHIFTS)
        flags = parse(words, build_parser(kind.script, _MODES[kind.script], kind.mode, tables))
        folder = before.folder if kind.script == "eval.py" and before else Path(flags.log_root) / run_name(flags)
        needs = (*before.needs, before) if before else ()
        made[name] = Step(name, (kind.script, *words), folder, needs)
        return made[name]

    for name in scores:
        make(name)
    return tuple(made.values())
