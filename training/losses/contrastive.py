"""Contrastive losses.

Letters: V views of one copy (row i of both copies shows the same image under the same shift), P projection size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _log_prob(z0_VP: Tensor, z1_VP: Tensor, temperature: float) -> Tensor:
    """(2V, 2V) log-probability of each row to pick each other; the diagonal is -inf. In float32 or better."""
    if z0_VP.shape != z1_VP.shape or z0_VP.ndim != 2:
        raise ValueError(f"both copies must be (V, P), got {tuple(z0_VP.shape)} and {tuple(z1_VP.shape)}")
    with torch.autocast(z0_VP.device.type, enabled=False):
        z = torch.cat([z0_VP, z1_VP])
        z = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)
        similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
        return similarity.log_softmax(1)


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
