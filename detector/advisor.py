"""Which shifts the pictures make meaningless: a small network is trained to tell each shift's copies apart.

A shift that it cannot tell on pictures that it has not seen says nothing of them (rotation of a turned part, or of a
texture): a shifted picture is as normal as an upright one, and must not stand for an anomaly.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.progress import progress
from common.seed import generator, seed_of
from datasets import ShiftSpec
from datasets.sets import floats
from datasets.views import apply_shift
from models import backbone_spec

CANDIDATES = ("rotation", "cutperm")
# Seen at so many pixels, for so many steps of so many pictures: half a minute each.
_SIZE, _STEPS, _BATCH, _RATE = 32, 300, 16, 2e-3
# The share of the way from chance to certainty from which on a shift is told apart.
_ENOUGH = 0.5


class Advice(NamedTuple):
    """accuracy: on pictures that were not trained on, over the shifts of each. chance: 1 / how many shifts."""

    shift: str
    accuracy: float
    chance: float

    @property
    def means_something(self) -> bool:
        return self.accuracy - self.chance > _ENOUGH * (1 - self.chance)

    def __str__(self) -> str:
        verdict = "told apart" if self.means_something else "not told apart: these pictures make it meaningless"
        return f"shift {self.shift}: {100 * self.accuracy:.0f} % (chance {100 * self.chance:.0f} %), {verdict}"


def advise(images: Tensor, seed: int = 0, steps: int = _STEPS) -> list[Advice]:
    """Of images (n, 3, S, S), uint8, for each candidate; a quarter of them is not trained on."""
    small = F.interpolate(floats(images), (_SIZE, _SIZE), mode="bilinear", antialias=True)
    order = torch.randperm(len(small), generator=generator(seed, "advisor"))
    aside, rest = small[order[: max(1, len(small) // 4)]], small[order[max(1, len(small) // 4) :]]
    return [_advice(name, rest, aside, seed, steps) for name in CANDIDATES]


def _advice(name: str, rest: Tensor, aside: Tensor, seed: int, steps: int) -> Advice:
    shifts = ShiftSpec(name).functions()
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, f"advisor {name}"))
        net = backbone_spec("resnet8").make()
        head = torch.nn.Linear(net.feature_dim, len(shifts))  # type: ignore[arg-type]
    whole = torch.nn.Sequential(net, head).train()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    gen = generator(seed, f"advisor batches {name}")

    def shifted(x: Tensor) -> tuple[Tensor, Tensor]:
        views = torch.cat([apply_shift(shift, x, x, None) for shift in shifts])
        return views * 2 - 1, torch.arange(len(shifts)).repeat_interleave(len(x))

    for _ in progress(range(steps), total=steps, label=f"shift {name}"):
        x = rest[torch.randint(len(rest), (_BATCH,), generator=gen)]
        views, labels = shifted(x)
        loss = F.cross_entropy(whole(views), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        views, labels = shifted(aside)
        right = (whole.eval()(views).argmax(1) == labels).float().mean()
    return Advice(name, float(right), 1 / len(shifts))
