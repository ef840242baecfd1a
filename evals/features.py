"""From images to draw-averaged network outputs.

Letters: N images, b of a batch, T draws, K shifts, F feature size, P projection size, M atoms.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from common.dist import SINGLE, World
from common.progress import progress
from common.seed import generator
from datasets import ImageSet
from datasets.views import DrawSpec, batches_of, draw_set, set_views
from models.feature_net import CocsrNet, FeatureNet, RotTransNet
from models.sparse.admm import RidgeSystem
from models.sparse.dictionary import DictionaryBank

Outputs = dict[str, Tensor]

# Draws of all images whose numbers, some 36 bytes a view each, are held at a time.
_TOGETHER = 32


def net_outputs(net: FeatureNet | RotTransNet) -> Callable[[Tensor], Outputs]:
    """Views (b, K, 3, H, W) -> h (b, K, F), z (b, K, P), shift (b, K, K) of a stage-1 network.

    Or the logits of Rot+Trans: rotation (b, K, 4), vertical and horizontal (b, K, 3).
    """

    def outputs(views: Tensor) -> Outputs:
        named = net(views.flatten(0, 1))._asdict()
        return {name: value.unflatten(0, views.shape[:2]) for name, value in named.items()}

    return outputs


def class_outputs(net: FeatureNet) -> Callable[[Tensor], Outputs]:
    """Views (b, K, 3, H, W) -> logits linear (b, K, C) of the class, joint (b, K, 4 C) of class + C * rotation."""

    def outputs(views: Tensor) -> Outputs:
        h = net.features(views.flatten(0, 1))
        logits = {"linear": net.linear(h), "joint": net.joint_distribution_layer(h)}
        return {name: value.float().unflatten(0, views.shape[:2]) for name, value in logits.items()}

    return outputs


def cocsr_outputs(net: CocsrNet) -> Callable[[Tensor], Outputs]:
    """Views (b, K, 3, H, W) -> s (b, K, F), codes (b, K, M), shift (b, K, K), gap (b, K, 1) of a stage-2 network.

    Each feature is coded in the dictionary of its own shift only. The dictionaries are taken as they are now.
    """
    system = net.sr_nets.system()

    def outputs(views: Tensor) -> Outputs:
        features = net(views.flatten(0, 1))
        s, shift = (x.unflatten(0, views.shape[:2]) for x in (features.s, features.shift))
        return {**code_outputs(net.sr_nets, s, system), "shift": shift}

    return outputs


def code_outputs(bank: DictionaryBank, s: Tensor, system: RidgeSystem) -> Outputs:
    """Features s (b, K, F) coded, each in the dictionary of its own shift: s, codes (b, K, M), gap (b, K, 1)."""
    code = bank.code(s.permute(1, 2, 0), system=system)
    return {"s": s, "codes": code.codes.permute(2, 0, 1), "gap": code.gap.T[..., None]}


def add_outputs(sums: Outputs, outputs: Outputs) -> None:
    """Add the outputs (b, K, .) of one more draw of the same images to `sums`, which starts empty."""
    for name, value in outputs.items():
        sums[name] = sums[name].add_(value) if name in sums else value.clone()


def mean_outputs(sums: Outputs, draws: int) -> Outputs:
    """The means (b, 1, K, .) over so many draws; changes sums."""
    return {name: value.div_(draws)[:, None] for name, value in sums.items()}


@torch.no_grad()
def draw_means(
    outputs: Callable[[Tensor], Outputs],
    images: ImageSet,
    spec: DrawSpec,
    draws: int,
    *,
    label: str,
    references: Tensor | None = None,
    world: World = SINGLE,
) -> Iterator[Outputs]:
    """Every output averaged over `draws` draws, batch by batch of the images: (b, 1, K, .) each, on their device.

    references (R, 3, H, W): draw t mixes every image with one of them, chosen by the seed; without, an image mixes with
    its neighbour by index. The draws of a batch come together, so that what they give is held for one batch only; past
    `_TOGETHER` draws, whose numbers then take more than that, sums are held for all images instead.
    world: of several processes each takes some of the batches.
    """
    parts = world.shard_list(batches_of(images, spec))
    sums: list[Outputs] = [{} for _ in parts]
    rounds = [(first, i) for first in range(0, draws, _TOGETHER) for i in range(len(parts))]
    for first, i in progress(rounds, total=len(rounds), label=label):
        if i == 0:
            last = min(first + _TOGETHER, draws)
            looks = [(draw_set(images, spec, t), _reference(references, spec.seed, t)) for t in range(first, last)]
        for draw, reference in looks:
            views = set_views(images, spec, draw, parts[i], reference)
            add_outputs(sums[i], outputs(views.unflatten(0, (-1, len(spec.shifts)))))
        if last == draws:
            found, sums[i] = sums[i], {}
            yield mean_outputs(found, draws)


def concatenate(blocks: Iterable[Outputs]) -> Outputs:
    """One set of outputs (N, ...) of those of its batches."""
    parts = list(blocks)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _reference(references: Tensor | None, seed: int, t: int) -> Tensor | None:
    if references is None:
        return None
    choice = int(torch.randint(len(references), (), generator=generator(seed, "reference", t)))
    return references[choice : choice + 1]


def reference_pool(train: ImageSet, size: int, seed: int) -> Tensor:
    """`size` training images (or all there are), chosen by the seed: (R, 3, H, W) in [0, 1]."""
    order = torch.randperm(len(train), generator=generator(seed, "reference pool"))
    return train.batch(order[:size].to(train.device))
