"""`--recipe`: named sets of flags, a row each. What the user gives comes before them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from common.flags import Flags, Spec, flag

# Few epochs: Adam at a high rate in small steps, and a schedule that ends. A tenth of the images is set aside for
# stage 2. Chosen on classes 1, 4 and 8 of CIFAR-10 (docs/results.md).
_SOON = {
    "model": "resnet8",
    "optimizer": "adam",
    "lr_init": 2e-3,
    "batch_size": 32,
    "lr_scheduler": "cosine_to_zero",
    "warmup_share": 0.05,
    "held_out": "auto",
}
_MIXED = {"shift_trans_type": "rot_bmix", "mix_alpha": 0.2, "simclr_dim": 512}
_CODED = {"sr_lambda": 1e-3, "invert_sr_feature_norm": True, "loss_lambda_sr_l1": 1e-3, "loss_dict_constr_mode": 1}

# Recipe -> mode -> flags. Of the modes of a script, the first is what it trains where no --mode is given.
NAMED: dict[str, dict[str, dict[str, Any]]] = {
    # As the publication has it: days of a GPU.
    "published": {
        "simclr_CSI": _MIXED,
        "simclr": {"simclr_dim": 512},
        "rot_trans": {},
        "cocsr_dict": {**_MIXED, **_CODED, "ini_sr_dict_train": True},
    },
    # Five minutes of one CPU core for 5,000 pictures of 32 pixels.
    "short": {
        "rot_trans": {**_SOON, "epochs": 11},
        "simclr_CSI": {**_SOON, "shift_trans_type": "rotation", "epochs": 6},
        "level_dict": {},
    },
    # For a GPU: the published stage 1 under rotations alone, then dictionaries at several depths.
    "best": {
        "simclr_CSI": {"shift_trans_type": "rotation", "held_out": "auto"},
        "rot_trans": {"held_out": "auto"},
        "level_dict": {},
    },
}


# A flag and another that sets the same thing: whoever gives one wants neither from a recipe.
_OTHER_FORM = {"warmup_share": "warmup"}


@dataclass(frozen=True)
class NamedSpec(Spec, group="what to run"):
    """A named set of flags."""

    recipe: str | None = flag(
        None, "a named set of flags; those that are given come before it", choices=lambda: sorted(NAMED)
    )


def named(flags: Flags, modes: Mapping[str, Any]) -> tuple[Flags, dict[str, Any]]:
    """The flags with the mode of --recipe where none is given, and those of the recipe that are not given.

    modes: of the script. Raises: UserError for a mode that the recipe does not have.
    """
    name = flags.of(NamedSpec).recipe
    if name is None:
        return flags, {}
    own = [mode for mode in NAMED[name] if mode in modes]
    flags = flags.filled({"mode": own[0]})
    if flags.mode not in own:
        raise UserError(f"--recipe {name}: it has --mode {', '.join(own)}; leave it out for --mode {flags.mode}")
    return flags, {flag: value for flag, value in NAMED[name][flags.mode].items() if not _given(flags, flag)}


def told(flags: Flags, defaults: Mapping[str, Any]) -> str | None:
    """A line that says what --recipe stands for, and what was given in its place; None without one.

    defaults: of the mode, which belong to it.
    """
    name = flags.of(NamedSpec).recipe
    if name is None:
        return None
    own = {**defaults, **NAMED[name][flags.mode]}
    given = [other for flag in own for other in _given(flags, flag)]
    rest = _words(flags, [flag for flag in own if not _given(flags, flag)])
    line = f"recipe {name}: --mode {flags.mode} {rest}".rstrip()
    return line + (f"; in place of its own: {_words(flags, given)}" if given else "")


def _given(flags: Flags, flag: str) -> list[str]:
    """Which of the forms of a flag the user gave."""
    return [form for form in (flag, _OTHER_FORM.get(flag)) if form is not None and flags.given(form)]


def _words(flags: Flags, names: Sequence[str]) -> str:
    """As they are written on a command line."""
    values = flags.as_dict()
    words = []
    for name in names:
        value = values[name]
        if value is not False:
            parts = [] if value is True else value if isinstance(value, list | tuple) else [value]
            words.append(" ".join([f"--{name}", *map(str, parts)]))
    return " ".join(words)
