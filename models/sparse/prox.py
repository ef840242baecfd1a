"""Proximal operators."""

import torch
from torch import Tensor


def soft(v: Tensor, threshold: float) -> Tensor:
    """Shrink each entry towards 0 by `threshold` >= 0: argmin_p 0.5 |p - v|^2 + threshold |p|_1."""
    return v - v.clamp(-threshold, threshold)


def soft_group(v: Tensor, threshold: float, dim: int) -> Tensor:
    """Shrink the Euclidean norm of each group towards 0 by `threshold` >= 0; a norm of at most `threshold` becomes 0.

    A group is a slice along `dim`: in a matrix, dim=1 groups rows and dim=0 columns. The proximal operator of
    threshold times the sum of the groups' norms, argmin_p 0.5 |p - v|^2 + threshold sum_g |p_g|. Differentiable; the
    gradient of a group that becomes 0 is 0.
    """
    if threshold == 0:
        return v.clone()
    norm = torch.linalg.vector_norm(v, dim=dim, keepdim=True)
    kept = norm > threshold
    # Twice, since the gradient of what `where` leaves out must be finite, too: that of threshold / 0 is not.
    return v * torch.where(kept, 1 - threshold / torch.where(kept, norm, 1), 0)


def soft_adjoint(gradient: Tensor, v: Tensor, threshold: float) -> Tensor:
    """Backward pass of soft(v, threshold) with respect to v: `gradient` where |v| > threshold, else 0."""
    return torch.ops.aten.softshrink_backward(gradient, v, threshold)


def lasso_gap(D_KFM: Tensor, S: Tensor, codes_KMN: Tensor, lam: float) -> Tensor:
    """Distance of codes from the optimum, (K, N): largest violation over atoms of the lasso's optimality conditions.

    With correlation c = d'(s - D a) the violation is max(|c| - lam, 0) where a is 0 and |c - lam sign(a)| elsewhere.
    D (K, F, M); S (K, F, N) or (F, N); codes (K, M, N). 0 for exact codes; in units of lam.
    """
    correlation = D_KFM.mT @ (S - D_KFM @ codes_KMN)
    inactive = (correlation.abs() - lam).clamp_(min=0)
    active = (correlation - lam * codes_KMN.sign()).abs()
    return torch.where(codes_KMN == 0, inactive, active).amax(1)


def lambda_max(D_KFM: Tensor, S: Tensor) -> Tensor:
    """The smallest lambda at which the code of a sample is all zero: |D's|_inf, (K, N). S (K, F, N) or (F, N)."""
    return (D_KFM.mT @ S).abs().amax(1)


def lasso_objective(D_KFM: Tensor, S: Tensor, codes_KMN: Tensor, lam: float) -> Tensor:
    """0.5 |s - D a|^2 + lam |a|_1 of each sample, (K, N). S (K, F, N) or (F, N)."""
    return 0.5 * (S - D_KFM @ codes_KMN).square().sum(1) + lam * codes_KMN.abs().sum(1)
