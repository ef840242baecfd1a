"""Flags of training that several modes share."""

from dataclasses import dataclass

from common.errors import UserError
from common.flags import Spec, flag

SIM_LOSSES = ("nt_xent", "uniclr")


@dataclass(frozen=True)
class StepSpec(Spec, group="training"):
    """What a step takes, and when a run saves."""

    batch_size: int = flag(128, "images per step (of each process)", above=0)
    save_step: int = flag(10, "epochs between checkpoints", above=0)
    save_minutes: float = flag(15.0, "minutes between checkpoints, 0: none by time", at_least=0)


@dataclass(frozen=True)
class CompileSpec(Spec, group="network and device"):
    """Whether to compile."""

    compile: bool = flag(False, "torch.compile network and views (needs a C++ compiler on a CPU)")


@dataclass(frozen=True)
class ContrastiveSpec(Spec, group="training"):
    """The contrastive loss."""

    temperature: float = flag(0.5, "of the contrastive loss (labelled modes: 0.07)", above=0, origin="compared")
    sim_lambda: float = flag(1.0, "weight of the contrastive loss", origin="compared")
    shift_lambda: float = flag(
        1.0,
        "simclr_CSI: weight of the classifier of the shift; 0: without, and scores have no shift term",
        at_least=0,
        origin="compared",
    )
    sim_loss: str = flag(
        "nt_xent",
        "without labels: nt_xent, a positive is the other copy of a view; uniclr, all unshifted views are positives",
        choices=lambda: SIM_LOSSES,
        origin="compared",
    )
    copies: int = flag(2, "random views of each image under each shift", at_least=2, origin="compared")
    deep_supervision: float = flag(
        0.0,
        "without labels: weight of the same loss at each earlier stage, by heads that training alone uses",
        at_least=0,
        origin="compared",
    )
    soft_temperature: float | None = flag(
        None,
        "uniclr: weigh positives by a softmax of their similarity at this temperature",
        type=float,
        above=0,
        origin="compared",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.soft_temperature is not None and self.sim_loss != "uniclr":
            raise UserError("--soft_temperature: it weighs positives of --sim_loss uniclr")


@dataclass(frozen=True)
class ProbeSpec(Spec, group="training"):
    """The linear probe beside a contrastive loss."""

    error_step: int = flag(5, "epochs between tests of the linear probe (multi-class)")
