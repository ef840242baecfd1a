"""The dictionary loss of stage 2.

Letters: K dictionaries, F feature size, M atoms, N samples per dictionary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def dictionary_terms(
    D: Tensor, codes: Tensor, S: Tensor, *, constraint_mode: int, constraint: float = 1.0, also: Sequence[Tensor] = ()
) -> dict[str, Tensor]:
    """Unweighted sums (not means) over samples and atoms: `fit`, `l1`, `atom_norm`.

    D (K, F, M); codes (K, M, N); S (K, F, N), or (F, N) for the same samples in every dictionary.
    fit: |s - D a|^2. l1: |a|_1. atom_norm: | |d| - c | in mode 0 (equal), max(|d| - c, 0) in mode 1 (at most), with
    c = `constraint`. also: further codes of the same samples (deep supervision), whose fit and l1 are added.
    Raises: ValueError for another mode. Source: ADMM-SRNet (Chiou et al. 2023).
    """
    excess = D.norm(dim=1) - constraint
    if constraint_mode == 0:
        atom_norm = excess.abs().sum()
    elif constraint_mode == 1:
        atom_norm = excess.clamp(min=0).sum()
    else:
        raise ValueError(f"constraint_mode must be 0 (equal) or 1 (at most), got {constraint_mode}")
    every = (codes, *also)
    fit = torch.stack([(S - D @ a).square().sum() for a in every]).sum()
    return {"fit": fit, "l1": torch.stack([a.abs().sum() for a in every]).sum(), "atom_norm": atom_norm}
