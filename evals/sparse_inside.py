"""What the operators of MeanSparse replace: the share of values by operator, and the values of a channel before and
after."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.seed import generator
from datasets.augment import AlignedSpec
from datasets.views import PassSpec
from evals.result import Result
from evals.trained import Trained, evaluation_mode, identity, settings_of
from models.feature_net import BackboneNet
from models.mean_sparse import MeanSparse, alpha_of, operators

# Training images that are looked at, at most.
_MEASURED = 512
# Of a histogram.
_BINS = 80
_DEVIATIONS = 4.0


def sparse_inside(trained: Trained) -> Iterator[Result]:
    """One result, `sparse_inside`, of up to 512 training images as they are.

    metrics: `blocked/<operator>`, the share of its values that are replaced. arrays: of three operators, the first, one
    in the middle and the last, of the channel with the largest variance, `edges/<operator>` of a histogram over 4
    standard deviations around the mean, and `before/...`, `after/...`, counts.
    Flags are read and images loaded before the result is asked for.
    Raises: UserError for a network without operators that act.
    """
    flags, split = trained.flags, trained.split
    with trained.world.raise_together():
        net: BackboneNet = trained.net  # type: ignore[assignment]
        found = operators(net.backbone)
        if not found or alpha_of(net) == 0:
            raise UserError(
                f"--ms_alpha: {trained.path} has no operators of MeanSparse that act; put them in by train.py --mode"
                " meansparse, and give --ms_alpha 0.2, say"
            )
        batch_size = flags.of(PassSpec).ood_batch_size
        train = split.stream(AlignedSpec(), net.in_channels).to(trained.device)
        order = torch.randperm(len(train), generator=generator(flags.seed, "inside"))[:_MEASURED]
    names = list(found)
    shown = {names[place]: _Channel(found[names[place]]) for place in sorted({0, len(names) // 2, len(names) - 1})}
    counts = {name: torch.zeros(2, dtype=torch.float64) for name in names}

    def look(name: str, x: Tensor) -> None:
        blocked = found[name].blocked(x)
        counts[name] += torch.tensor([float(blocked.sum()), blocked.numel()])
        if name in shown:
            shown[name].add(x, found[name].forward(x))  # Not by a call, which would run this hook again.

    def results() -> Iterator[Result]:
        handles = [
            operator.register_forward_pre_hook(lambda module, args, name=name: look(name, args[0]))
            for name, operator in found.items()
        ]
        try:
            with trained.world.raise_together(), evaluation_mode(net), torch.inference_mode():
                for index in order.split(batch_size):
                    net.features(train.batch(index.to(train.index_device)))
        finally:
            for handle in handles:
                handle.remove()
        metrics = {f"blocked/{name}": float(blocked / n) for name, (blocked, n) in counts.items()}
        arrays = {
            f"{kind}/{name}": value for name, channel in shown.items() for kind, value in channel.arrays().items()
        }
        facts: dict[str, Any] = {
            "data": {"training": identity(train)},
            "settings": settings_of(flags),
            "alpha": alpha_of(net),
            "measured": len(order),
            "channels": {name: channel.facts() for name, channel in shown.items()},
        }
        yield Result("sparse_inside", metrics, {}, facts, {name: x.cpu().numpy() for name, x in arrays.items()})

    return results()


class _Channel:
    """Histograms of the channel of an operator that varies most."""

    def __init__(self, operator: MeanSparse) -> None:
        self.channel = int(operator.running_var.argmax())
        self.mean = float(operator.running_mean[self.channel])
        self.std = float(operator.running_var[self.channel].sqrt())
        self.dim, reach = operator.dim, _DEVIATIONS * self.std
        self.edges = torch.linspace(self.mean - reach, self.mean + reach, _BINS + 1)
        self.before, self.after = torch.zeros(_BINS), torch.zeros(_BINS)

    def add(self, x: Tensor, y: Tensor) -> None:
        for values, counts in ((x, self.before), (y, self.after)):
            own = values.select(self.dim, self.channel).flatten().float().cpu()
            counts += torch.histogram(own, self.edges).hist

    def arrays(self) -> dict[str, Tensor]:
        return {"edges": self.edges, "before": self.before, "after": self.after}

    def facts(self) -> dict[str, float]:
        return {"channel": self.channel, "mean": self.mean, "std": self.std}
