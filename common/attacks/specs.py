"""Flags of attacks that training and evaluation share."""

import argparse
from dataclasses import dataclass

from common.flags import Spec, flag

# Standard deviation of the noise that PGD starts from in training (ANCRA, arXiv 2310.03358).
START_NOISE = 0.001


def fraction(text: str) -> float:
    """A type for `flag`: a number, or a fraction such as 8/255."""
    numerator, slash, denominator = text.partition("/")
    try:
        return float(numerator) / (float(denominator) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a fraction such as 8/255") from None


def radius_text(eps: float) -> str:
    """The number, or `8/255` where that is shorter."""
    text, levels = f"{eps:g}", eps * 255
    return f"{levels:.0f}/255" if len(text) > 5 and abs(levels - round(levels)) < 1e-6 else text


@dataclass(frozen=True)
class EpsilonSpec(Spec, group="attacks"):
    """How far an attacked image may lie from its own."""

    epsilon: float = flag(
        8 / 255,
        "radius of attacks, of images in [0, 1]: 8/255, say",
        type=fraction,
        at_least=0,
        at_most=1,
        origin="network",
    )


@dataclass(frozen=True)
class StepsSpec(Spec, group="adversarial training"):
    """The steps of PGD as it is used in training."""

    num_steps: int = flag(10, "steps of the attack in training, and of feature_distance", above=0)
    step_size: float = flag(0.007, "their length, L-inf", type=fraction, above=0)
