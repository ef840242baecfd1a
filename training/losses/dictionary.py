"""The dictionary loss of stage 2.

Letters: K dictionaries, F feature size, M atoms, N samples per dictionary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def code_terms(D: Tensor, codes: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (not means) over samples: |s - D a|^2 and |a|_1.

    D (K, F, M); codes (K, M, N); S (K, F, N), or (F, N) for the same samples in every dictionary.
    Source: ADMM-SRNet (Chiou et al. 2023).
    """
    return (S - D @ codes).square().sum(), codes.abs().sum()


def atom_norm(D: Tensor, mode: int, constraint: float = 1.0) -> Tensor:
    """The constraint on the atoms of D (K, F, M), a sum over them.

    | |d| - c | in mode 0 (equal), max(|d| - c, 0) in mode 1 (at most), with c = `constraint`.
    Raises: ValueError for another mode. Source: ADMM-SRNet (Chiou et al. 2023).
    """
    excess = D.norm(dim=1) - constraint
    if mode == 0:
        return excess.abs().sum()
    if mode == 1:
        return excess.clamp(min=0).sum()
    raise ValueError(f"mode must be 0 (equal) or 1 (at most), got {mode}")


def margin_terms(costs: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the own dictionary, summed over views: that it codes a view better than the others do.

    costs (J, K, N): lasso objectives, > 0, of N samples of each shift k in each dictionary j, J = K. The logit of
    dictionary j is -log(cost) / temperature, so that nothing depends on the units of features.
    """
    logits = costs.clamp_min(torch.finfo(costs.dtype).tiny).log() / -temperature
    own = torch.arange(len(costs), device=costs.device)[:, None].expand(costs.shape[1:])
    return F.cross_entropy(logits.flatten(1).T, own.flatten(), reduction="sum")
