"""Flags of evaluation."""

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.attacks.ball import NORMS
from common.attacks.specs import fraction
from common.flags import Spec, class_choice, flag, path_flag
from datasets.noise import CORRUPTIONS, LEVELS, NOISES
from models.lambda_line import MEASURES

# Lambda from the residual of each image.
AUTO = "auto"
# Each kind of noise by its own line.
SAME = "same"
# Every corruption there is.
ALL = "all"
# Those that run where nothing is named.
DEFAULT = "default"


def lambda_value(text: str) -> float:
    """A type for `flag`: a finite number >= 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"lambda must be a finite number >= 0, got {text}")
    return value


def lambda_choice(text: str) -> float | str:
    """A type for `flag`: as `lambda_value`, or `auto`."""
    return AUTO if text == AUTO else lambda_value(text)


@dataclass(frozen=True)
class ScoreSpec(Spec, group="evaluation"):
    """Which scores, and what is printed of them."""

    ood_score: Sequence[str] | None = flag(None, "scores (default: the mode's own)", nargs="+")
    print_score: bool = flag(False, "print quantiles of the scores of every set")


@dataclass(frozen=True)
class SumSpec(Spec, group="evaluation"):
    """A sum of scores."""

    score_sum: bool = flag(
        False, "also the sum of the scores, each standardised and weighed by training images that were set aside"
    )


@dataclass(frozen=True)
class ImagesSpec(Spec, group="evaluation"):
    """What is written of each test image."""

    save_score: bool = flag(False, "write every image's score, or predicted class, as CSV")


@dataclass(frozen=True)
class CorruptionsSpec(Spec, group="evaluation"):
    """Detection under corruptions."""

    corruptions: Sequence[str] | None = flag(
        None,
        "detection under these corruptions of test images, each at all five severities",
        nargs="+",
        choices=lambda: (ALL, *CORRUPTIONS),
    )


@dataclass(frozen=True)
class PlaceSpec(Spec, group="evaluation"):
    """Where results go."""

    out: str | None = path_flag(None, "folder for results (default: that of the weights)")


@dataclass(frozen=True)
class AverageSpec(Spec, group="evaluation"):
    """Augmented draws that outputs are averaged over."""

    ood_samples: int = flag(1, "augmented draws per test image", above=0)


@dataclass(frozen=True)
class ReferenceSpec(Spec, group="evaluation"):
    """Training images that test images mix with."""

    refmix_batch_size: int = flag(128, "training images to take reference partners from", above=0)


@dataclass(frozen=True)
class KnnSpec(Spec, group="evaluation"):
    """Nearest neighbours."""

    knn_k: int = flag(5, "score knn: distance to which nearest training image; knn_cosine: mean over how many", above=0)


@dataclass(frozen=True)
class PartsSpec(Spec, group="evaluation"):
    """What a score of two parts leaves out."""

    disable_sim_score: bool = flag(False, "leave out the similarity or reconstruction part of a score")
    disable_shi_score: bool = flag(False, "leave out the shift part of a score")


def _rules() -> Iterable[str]:
    from evals.scores import CROSS_RULES  # Which reads the spec.

    return CROSS_RULES


@dataclass(frozen=True)
class CrossSpec(Spec, group="evaluation"):
    """How one dictionary is held against the others."""

    srm_rule: str = flag(
        "ratio", "CSI_srm: how the own dictionary's objective is compared with those of the others", choices=_rules
    )


@dataclass(frozen=True)
class FittedSpec(Spec, group="evaluation"):
    """Dictionaries fitted after the fact."""

    sr_fit_steps: int = flag(300, "multi_sr: iterations of fitting a dictionary", above=0)


@dataclass(frozen=True)
class TsneSpec(Spec, group="evaluation"):
    """Pictures of features in the plane."""

    projection: str = flag(
        "tsne",
        "features in the plane by t-SNE, or by UMAP where umap-learn is installed; auto: by UMAP if it is",
        choices=lambda: ("auto", "tsne", "umap"),
    )
    ood_layer: Sequence[str] = flag(("penultimate",), "t-SNE: penultimate or simclr", nargs="+")
    tsne_points: int = flag(1000, "t-SNE: points of each group at most", above=0)


@dataclass(frozen=True)
class InsideSpec(Spec, group="evaluation"):
    """Pictures of what sparse coding layers keep."""

    inside_images: int = flag(8, "sdnet_inside: training images to show", above=0)
    inside_taps: Sequence[str] | None = flag(
        None, "sdnet_inside: invert from stem, 1.1 (stage.block), ... (default: the published ones, or all)", nargs="+"
    )
    keep_mean: bool = flag(False, "sdnet_inside: leave in each inversion what all have in common, as published")
    equalise: bool = flag(False, "sdnet_inside: equalise the histograms of inversions")


@dataclass(frozen=True)
class DistanceSpec(Spec, group="evaluation"):
    """Whose features are compared."""

    target_label: int | str | None = flag(
        None,
        "feature_distance: test images of this class alone, its number or its name (default: of all)",
        type=class_choice,
    )


@dataclass(frozen=True)
class StemSpec(Spec, group="evaluation"):
    """Lambda of the stem of an SDNet."""

    stem_lambda: float | str | None = flag(
        None,
        "lambda of the stem of an SDNet; auto: for each image, from its residual (default: as trained)",
        type=lambda_choice,
        metavar="X|auto",
    )
    lambda_line: str = flag(
        "gaussian", "--stem_lambda auto: by the line of which kind of noise", choices=lambda: sorted(NOISES)
    )
    lambda_measure: str = flag(
        "highpass", "--stem_lambda auto: by which measure of the residual", choices=lambda: sorted(MEASURES)
    )


@dataclass(frozen=True)
class NoiseLambdaSpec(Spec, group="noise and lambda"):
    """Lambda of the stem under noise. noise_levels: by number, from 1; None: all of the protocol."""

    noises: Sequence[str] = flag(tuple(NOISES), "kinds of noise", nargs="+", choices=lambda: sorted(NOISES))
    noise_protocol: str = flag("cifar10c", "whose levels of noise", choices=lambda: sorted(LEVELS))
    noise_levels: Sequence[int] | None = flag(
        None, "which of the protocol's levels, from 1 (default: all)", type=int, nargs="+", at_least=1
    )
    lambdas: Sequence[float] = flag(
        tuple(n / 10 for n in range(1, 15)), "lambdas to try, that of training among them", type=lambda_value, nargs="+"
    )
    calibration_images: int = flag(2000, "training images that lines are fitted to, at most", above=0)
    measures: Sequence[str] = flag(
        tuple(MEASURES), "measures of the residual that lines start from", nargs="+", choices=lambda: sorted(MEASURES)
    )
    line_of: str = flag(
        SAME,
        "the kind of noise whose line predicts lambda for all kinds; same: each by its own",
        choices=lambda: (SAME, *sorted(NOISES)),
    )
    cifar10c: str | None = path_flag(None, "folder of CIFAR-10-C, whose arrays are then the noisy test images")
    control_path: str | None = path_flag(None, "run or weights of a network to compare with, without sparse coding")


def _attacks() -> Iterable[str]:
    from evals.attack import ATTACKS  # Which reads the spec.

    return (DEFAULT, *ATTACKS)


@dataclass(frozen=True)
class AttackSpec(Spec, group="attacks"):
    """Attacks on classifiers, and in part on detectors. epsilons: None: those of `evals.attack`, by the norm."""

    attacks: Sequence[str] = flag(
        (DEFAULT,),
        "which attacks; default, alone or beside others: those that take minutes for 1,000 images and a small network",
        nargs="+",
        choices=_attacks,
    )
    attack_images: int | None = flag(
        None,
        "so many test images, of each class as many as of the others; --attack: so many normal and so many anomalous"
        " ones (default: all)",
        type=int,
        above=0,
    )
    norm: str = flag("linf", "norm of --epsilon", choices=lambda: sorted(NORMS))
    attack_steps: int = flag(
        40, "steps of --attack, of APGD and of adaptive attacks (attack: 25; AutoAttack has 100 of its own)", above=0
    )
    attack_step_size: float | None = flag(
        None, "length of a step of PGD and CW (default: epsilon / 4; published: 0.007)", type=fraction, above=0
    )
    attack_restarts: int = flag(1, "restarts of attacks that start at random", above=0)
    attack_targets: int = flag(5, "classes that attacks with a target try, the likeliest first", above=0)
    square_queries: int = flag(500, "queries of the Square attack (AutoAttack has 5000 of its own)", above=0)
    epsilons: Sequence[float] | None = flag(
        None,
        "radii of the curve (default, linf: 0 1/255 2/255 4/255 8/255 16/255 1; --attack: --epsilon alone)",
        type=fraction,
        nargs="+",
        at_least=0,
    )
    transfer_path: str | None = path_flag(
        None, "run or weights of a network without the defence, whose attacked images are given to this one"
    )


def _detector_attacks() -> Iterable[str]:
    from evals.attacked import ATTACKS  # Which reads the spec.

    return ATTACKS


@dataclass(frozen=True)
class DetectorAttackSpec(Spec, group="attacks"):
    """Attacks on detectors."""

    attack: Sequence[str] | None = flag(
        None,
        "attack test images of a detection so that it fails; several: the worst of each image counts",
        nargs="+",
        choices=_detector_attacks,
    )
    attack_draws: int = flag(
        1, "--attack: how often an attacker runs a random procedure for each gradient, with draws of its own", above=0
    )


def _scan_rules() -> Iterable[str]:
    from evals.alpha_scan import RULES  # Which reads the spec.

    return RULES


@dataclass(frozen=True)
class AlphaScanSpec(Spec, group="MeanSparse"):
    """Which alpha are tried, and how one is chosen. max_clean_drop: in points of percent."""

    alphas: Sequence[float] = flag(
        tuple(n / 20 for n in range(9)), "alpha_scan: alpha to try; 0 is always tried", type=lambda_value, nargs="+"
    )
    select: str = flag("straight_through", "alpha_scan: chosen by which attack; released: as published", choices=_rules)
    max_clean_drop: float = flag(
        0.1, "alpha_scan: points of accuracy without an attack that alpha may cost (not --select released)", at_least=0
    )
    scan_images: int | None = flag(
        None, "alpha_scan: held-out training images, at most (default: all)", type=int, above=0
    )
