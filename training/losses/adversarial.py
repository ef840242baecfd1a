"""Losses of adversarial training (ANCRA; TRADES, Zhang et al. 2019; MART, Wang et al. 2020).

Letters: N images, or pairs of an anchor and a negative; C classes. Logits are (N, C); every loss is a mean.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Of the argument of a logarithm.
_LEAST = 1e-4


def kl(natural: Tensor, adversarial: Tensor) -> Tensor:
    """KL(softmax of natural | softmax of adversarial), with a gradient to both. The robust term of TRADES."""
    return kl_of_each(natural, adversarial).mean()


def weighted_kl(natural: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
    """(1 - p_label) KL, p and KL of the natural images, with a gradient to the weight, too. The robust term of MART."""
    p = (natural.softmax(1) * _own(natural, labels)).sum(1)
    return ((1 - p) * kl_of_each(natural, adversarial)).mean()


def kl_of_each(natural: Tensor, adversarial: Tensor) -> Tensor:
    """`kl` of each image, (N,)."""
    log_p = natural.log_softmax(1)
    return (log_p.exp() * (log_p - adversarial.log_softmax(1))).sum(1)


def boosted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """- log p_label - log(1 - the largest p of another class): the classification term of MART."""
    others = logits.softmax(1).masked_fill(_own(logits, labels), 0).amax(1)
    return F.cross_entropy(logits, labels) - (1 - others).clamp_min(_LEAST).log().mean()


def _own(logits: Tensor, labels: Tensor) -> Tensor:
    """Where the class of each image is, (N, C) bool: by which gradients need no scattering."""
    return torch.arange(logits.shape[1], device=logits.device) == labels[:, None]


def anc(anchor_logits: Tensor, negative_logits: Tensor, *, alpha: float) -> Tensor:
    """Asymmetric negative contrast: the mean over pairs of sqrt(p q), p and q the largest probabilities of anchor and
    negative where they are of the same class, else 0.

    alpha: share of the gradient that goes to negatives; 1: none to anchors. In [0, 1]; the value does not depend on it.
    Source: ANCRA (arXiv 2310.03358), section 3.
    """
    return anc_of_pairs(anchor_logits, negative_logits, alpha=alpha).mean()


def anc_of_pairs(anchor_logits: Tensor, negative_logits: Tensor, *, alpha: float) -> Tensor:
    """`anc` of each pair, (N,)."""
    (p, a), (q, b) = (logits.softmax(1).max(1) for logits in (anchor_logits, negative_logits))
    parts = [
        weight * (one * other).sqrt()
        for weight, one, other in ((alpha, p.detach(), q), (1 - alpha, p, q.detach()))
        if weight
    ]
    return torch.where(a == b, torch.stack(parts).sum(0), 0.0)
