"""Contrastive losses.

Letters: V views of one copy (row i of both copies shows the same image under the same shift), P projection size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _similarity(z0_VP: Tensor, z1_VP: Tensor) -> Tensor:
    """(2V, 2V) cosines of all rows with all rows; the diagonal is -inf. In float32 or better."""
    if z0_VP.shape != z1_VP.shape or z0_VP.ndim != 2:
        raise ValueError(f"both copies must be (V, P), got {tuple(z0_VP.shape)} and {tuple(z1_VP.shape)}")
    with torch.autocast(z0_VP.device.type, enabled=False):
        z = torch.cat([z0_VP, z1_VP])
        z = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)
        return (z @ z.T).fill_diagonal_(-torch.inf)


def _log_prob(z0_VP: Tensor, z1_VP: Tensor, temperature: float) -> Tensor:
    """(2V, 2V) log-probability of each row to pick each other; the diagonal is -inf. In float32 or better."""
    return (_similarity(z0_VP, z1_VP) / temperature).log_softmax(1)


def nt_xent(z0: Tensor, z1: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent: mean over 2V rows of -log p(other copy | row), p a softmax of cosine / temperature over all other rows.

    z0, z1: (V, P) projections of two copies, not normalised. Equal projections give log(2V - 1).
    Raises: ValueError for shapes that differ. Source: SimCLR (Chen et al. 2020), eq. 1.
    """
    log_prob = _log_prob(z0, z1, temperature)
    v = len(z0)
    return -(log_prob.diagonal(v).sum() + log_prob.diagonal(-v).sum()) / (2 * v)


def sup_nt_xent(z0: Tensor, z1: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """Supervised NT-Xent: every row of the same label is a positive.

    z0, z1: (V, P); labels: (V,). Row i with n_i rows of its label, itself included, contributes the sum over the others
    of -log p(other | i) / n_i, as published, where the textbook divides by n_i - 1; and, as published, the constant
    -log(1e-8) / n_i for itself, so that values compare. The mean over 2V rows.
    Raises: ValueError for shapes that differ. Source: Khosla et al. 2020; CSI (Tack et al. 2020), labelled form.
    """
    log_prob = _log_prob(z0, z1, temperature)
    both = labels.repeat(2)
    same = both[:, None] == both[None, :]
    log_prob = log_prob.masked_fill(torch.eye(len(both), dtype=torch.bool, device=same.device), math.log(1e-8))
    per_row = torch.where(same, -log_prob, 0.0).sum(1) / same.sum(1)
    return per_row.mean()


def uniclr(
    z0: Tensor, z1: Tensor, normal: Tensor, temperature: float = 0.5, soft_temperature: float | None = None
) -> Tensor:
    """UniCLR: all unshifted rows, of both copies, are positives of one another; a shifted row has its other copy alone.

    z0, z1: (V, P) projections of two copies, not normalised; normal: (V,) bool, which rows are unshifted. Mean over 2V
    rows of the mean over a row's positives of -log p, p a softmax of cosine / temperature over all other rows.
    soft_temperature: positives count by a softmax of cosine / soft_temperature instead, without a gradient to it.
    Raises: ValueError for shapes that differ. Source: UniCon-HA (Wang et al., ICCV 2023), section 3.
    """
    similarity = _similarity(z0, z1)
    log_prob = (similarity / temperature).log_softmax(1)
    both, rows = normal.repeat(2), torch.arange(2 * len(z0), device=z0.device)
    positive = both[:, None] & both[None] & (rows[:, None] != rows)
    positive = positive | ((rows[:, None] - rows).abs() == len(z0))
    if soft_temperature is None:
        weights = positive.to(similarity) / positive.sum(1, keepdim=True)
    else:
        weights = (similarity.detach() / soft_temperature).masked_fill(~positive, -torch.inf).softmax(1)
    # Zero times -inf, on the diagonal, is no number.
    return (weights * log_prob.masked_fill(~positive, 0)).sum(1).neg().mean()
