"""Contrastive losses.

Letters: C copies, V views of one copy, P projection size. Projections z (C V, P) are blocks, a copy each; row i of
every block shows the same image under the same shift.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _similarity(z: Tensor, copies: int) -> Tensor:
    """(CV, CV) cosines of all rows with all rows; the diagonal is -inf. In float32 or better."""
    if z.ndim != 2 or copies < 2 or len(z) % copies:
        raise ValueError(f"{copies} copies must be two blocks of as many rows or more, got {tuple(z.shape)}")
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)
        return (z @ z.T).fill_diagonal_(-torch.inf)


def _log_prob(z: Tensor, copies: int, temperature: float) -> Tensor:
    """(CV, CV) log-probability of each row to pick each other; the diagonal is -inf. In float32 or better."""
    return (_similarity(z, copies) / temperature).log_softmax(1)


def nt_xent(z: Tensor, temperature: float = 0.5, copies: int = 2) -> Tensor:
    """NT-Xent: the mean over rows, and over the C - 1 other copies of each, of -log p(other copy | row), p a softmax of
    cosine / temperature over all other rows.

    z: (C V, P) projections, not normalised. Equal projections give log(CV - 1).
    Raises: ValueError for a shape without so many copies. Source: SimCLR (Chen et al. 2020), eq. 1, for C = 2.
    """
    log_prob, views = _log_prob(z, copies, temperature), len(z) // copies
    offsets = [views * k for k in range(1, copies)]
    total = torch.stack([log_prob.diagonal(k).sum() + log_prob.diagonal(-k).sum() for k in offsets]).sum()
    return -total / (len(z) * (copies - 1))


def sup_nt_xent(z: Tensor, labels: Tensor, temperature: float = 0.07, copies: int = 2) -> Tensor:
    """Supervised NT-Xent: every row of the same label is a positive.

    z: (C V, P); labels: (V,). Row i with n_i rows of its label, itself included, contributes the sum over the others
    of -log p(other | i) / n_i, as published, where the textbook divides by n_i - 1; and, as published, the constant
    -log(1e-8) / n_i for itself, so that values compare. The mean over rows.
    Raises: ValueError as `nt_xent`. Source: Khosla et al. 2020; CSI (Tack et al. 2020), labelled form.
    """
    log_prob = _log_prob(z, copies, temperature)
    every = labels.repeat(copies)
    same = every[:, None] == every[None, :]
    log_prob = log_prob.masked_fill(torch.eye(len(every), dtype=torch.bool, device=same.device), math.log(1e-8))
    per_row = torch.where(same, -log_prob, 0.0).sum(1) / same.sum(1)
    return per_row.mean()


def uniclr(
    z: Tensor,
    normal: Tensor,
    temperature: float = 0.5,
    soft_temperature: float | None = None,
    copies: int = 2,
) -> Tensor:
    """UniCLR: all unshifted rows, of all copies, are positives of one another; a shifted row has its other copies.

    z: (C V, P) projections, not normalised; normal: (V,) bool, which rows are unshifted. Mean over rows of the mean
    over a row's positives of -log p, p a softmax of cosine / temperature over all other rows.
    soft_temperature: positives count by a softmax of cosine / soft_temperature instead, without a gradient to it.
    Raises: ValueError as `nt_xent`. Source: UniCon-HA (Wang et al., ICCV 2023), section 3.
    """
    similarity = _similarity(z, copies)
    log_prob = (similarity / temperature).log_softmax(1)
    every = normal.repeat(copies)
    view = torch.arange(len(normal), device=z.device).repeat(copies)
    positive = (every[:, None] & every[None]) | (view[:, None] == view[None])
    positive = positive.fill_diagonal_(False)
    if soft_temperature is None:
        weights = positive.to(similarity) / positive.sum(1, keepdim=True)
    else:
        weights = (similarity.detach() / soft_temperature).masked_fill(~positive, -torch.inf).softmax(1)
    # Zero times -inf, on the diagonal, is no number.
    return (weights * log_prob.masked_fill(~positive, 0)).sum(1).neg().mean()
