"""Flags of evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass

from common.flags import Spec, flag, path_flag


@dataclass(frozen=True)
class ScoreSpec(Spec, group="evaluation"):
    """Which scores, and what is written of them."""

    ood_score: Sequence[str] | None = flag(None, "scores (default: the mode's own)", nargs="+")
    print_score: bool = flag(False, "print quantiles of the scores of every set")
    save_score: bool = flag(False, "write every image's score as CSV")


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

    knn_k: int = flag(5, "score knn: distance to which nearest training image", above=0)


@dataclass(frozen=True)
class PartsSpec(Spec, group="evaluation"):
    """What a score of two parts leaves out."""

    disable_sim_score: bool = flag(False, "leave out the similarity or reconstruction part of a score")
    disable_shi_score: bool = flag(False, "leave out the shift part of a score")


@dataclass(frozen=True)
class FittedSpec(Spec, group="evaluation"):
    """Dictionaries fitted after the fact."""

    sr_fit_steps: int = flag(300, "multi_sr: iterations of fitting a dictionary", above=0)


@dataclass(frozen=True)
class TsneSpec(Spec, group="evaluation"):
    """t-SNE pictures."""

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
