"""A training step of ANCRA as the released program takes it, by our description of it; for `benchmarks.adversarial`.

Letters: B images of a batch, C classes.
"""

import copy
import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.reverse_attention import RaClassifier

_NOISE = 0.001


class ReleasedNet(nn.Module):
    """The network of `net`, whose pooled map is pooled once more after it is weighted.

    It puts itself in training mode where labels are given, and in evaluation mode otherwise.
    """

    def __init__(self, net: RaClassifier) -> None:
        super().__init__()
        self.net = net
        self.count = int(net.ra_blocks)
        assert net.backbone.grid == 1

    def forward(self, images: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        """The final logits (B, C), and the auxiliary ones of each block."""
        net, backbone = self.net.train(labels is not None), self.net.backbone
        x, auxiliary = backbone.stem((images - net.input_mean) / net.input_std), []
        blocks = [block for layer in backbone.layers() for block in layer]
        for block in blocks[: -self.count]:
            x = block(x)
        for use, block in enumerate(blocks[-self.count :]):
            z = backbone.tail(block(x), use)
            auxiliary.append(net.linear(F.avg_pool2d(z, z.shape[2:]).flatten(1)))
            rows = auxiliary[-1].argmax(1) if labels is None else labels
            x = z * net.linear.weight[rows].view(*z.shape[:2], 1, 1)
            final = net.linear(F.avg_pool2d(x, x.shape[2:]).flatten(1))
        return [final, *auxiliary]


def of_heads(losses: Sequence[Tensor], weight: float) -> Tensor:
    """That of the final head and the weighted mean of the others."""
    final, *auxiliary = losses
    return final + weight * sum(auxiliary, final.new_zeros(())) / len(auxiliary)


def untargeted_attack(
    net: ReleasedNet, images: Tensor, labels: Tensor, noise: Tensor, eps: float, step: float, steps: int, beta: float
) -> Tensor:
    """Away from the labels."""
    x = images + _NOISE * noise
    for _ in range(steps):
        x.requires_grad_()
        loss = of_heads([F.cross_entropy(logits, labels) for logits in net(x)], beta)
        (grad,) = torch.autograd.grad(loss, [x])
        x = x.detach() + step * torch.sign(grad.detach())
        x = torch.min(torch.max(x, images - eps), images + eps)
        x = torch.clamp(x, 0.0, 1.0)
    return x


def targeted_attack(
    net: ReleasedNet,
    images: Tensor,
    targets: Tensor,
    noise: Tensor,
    *,
    eps: float,
    step: float,
    steps: int,
    beta: float,
) -> Tensor:
    """Towards the targets."""
    x = images + _NOISE * noise
    for _ in range(steps):
        x.requires_grad_()
        loss = of_heads([F.cross_entropy(logits, targets) for logits in net(x)], beta)
        (grad,) = torch.autograd.grad(loss, [x])
        x = x.detach() - step * torch.sign(grad.detach())
        x = torch.min(torch.max(x, images - eps), images + eps)
        x = torch.clamp(x, 0.0, 1.0)
    return x


def pick_loop(labels: Tensor, logits: Tensor | None, rule: str) -> list[int]:
    """Of each image the place of one of another class, image by image. logits (B, C): None for `random`.

    Both are copied to the host first, which favours this side: nothing says whether the released program does.
    """
    classes, found = labels.tolist(), []
    values = logits.tolist() if logits is not None else []
    named = [row.index(max(row)) for row in values]
    fits = {
        "random": lambda i, j: False,
        "soft": lambda i, j: named[j] == named[i],
        "hard": lambda i, j: named[j] == classes[i],
        "easy": lambda i, j: named[j] not in (named[i], classes[i]),
    }[rule]
    for i, own in enumerate(classes):
        members: dict[int, list[int]] = {}
        candidates = []
        for j, other in enumerate(classes):
            if other != own:
                members.setdefault(other, []).append(j)
                if fits(i, j):
                    candidates.append(j)
        if candidates:
            found.append(max(candidates, key=lambda j: values[j][own]))
        else:
            found.append(random.choice(members[random.choice(list(members))]))
    return found


def contrast_loop(anchors: Tensor, negatives: Tensor, alpha: float) -> Tensor:
    """The asymmetric contrast of logits (B, C), pair by pair."""
    total = torch.zeros((), device=anchors.device)
    for p, q in zip(anchors.softmax(1), negatives.softmax(1), strict=True):
        if p.argmax() == q.argmax():  # which reads the device
            one = torch.sqrt(p.max().detach() * q.max())
            other = torch.sqrt(p.max() * q.max().detach())
            total = total + alpha * one + (1 - alpha) * other
        else:
            total = total + torch.tensor(0.0, device=anchors.device)
    return total / len(anchors)


def trades_ancra(
    net: ReleasedNet,
    images: Sequence[Tensor],
    labels: Tensor,
    negative_labels: Tensor,
    *,
    cr_beta: float,
    beta: float,
    zeta: float,
    alpha: float,
) -> list[Tensor]:
    """The terms of the loss. images: natural ones, attacked ones and negatives, in this order."""
    natural, attacked, negatives = net(images[0], labels), net(images[1], labels), net(images[2], negative_labels)
    pairs = list(zip(natural, attacked, strict=True))
    divergence = [F.kl_div(q.log_softmax(1), p.softmax(1), reduction="batchmean") for p, q in pairs]
    contrast = [contrast_loop(p, q, alpha) for p, q in zip(natural, negatives, strict=True)]
    return [
        of_heads([F.cross_entropy(logits, labels) for logits in natural], cr_beta),
        beta * of_heads(divergence, cr_beta),
        zeta * of_heads(contrast, cr_beta),
    ]


def logging_passes(net: ReleasedNet, images: Sequence[Tensor], labels: Sequence[Tensor]) -> list[float]:
    """Accuracies of each, in evaluation mode, with gradients on."""
    found = []
    for x, y in zip(images, labels, strict=True):
        final, *_ = net(x)
        found.append((final.argmax(1) == y).float().mean().item())
    return found


def released_copy(net: RaClassifier, *, contiguous: bool) -> ReleasedNet:
    """With weights of its own. contiguous: in torch's own memory format."""
    form = torch.contiguous_format if contiguous else torch.channels_last
    return ReleasedNet(copy.deepcopy(net).to(memory_format=form))
