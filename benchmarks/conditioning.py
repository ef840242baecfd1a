"""What rounding does to codes as the penalty rho changes: `python -m benchmarks.conditioning`.

A small rho makes the system (D'D + rho I) nearly singular. Ours inverts it once in float64 and iterates with products
in float32; the published formulation solves it at every step in float32. Errors are against solving in float64.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compare import distance
from benchmarks.dictionary import code_in_every
from common.device import device_name, pick_device
from common.errors import command
from models.sparse.admm import admm_lasso
from scripts.results import markdown

RHOS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3)
_LAM, _STEPS, _FEATURES, _SAMPLES, _KINDS = 0.01, 40, 512, 128, 2


def inputs(
    atoms: int, device: torch.device, features: int = _FEATURES, samples: int = _SAMPLES
) -> tuple[Tensor, Tensor]:
    """D (K, F, M) as training starts with it, nonnegative and so with atoms much alike; features (K, F, N)."""
    g = torch.Generator().manual_seed(0)
    D = F.normalize(torch.rand(_KINDS, features, atoms, generator=g), dim=1)
    S = F.normalize(torch.randn(_KINDS, features, samples, generator=g).relu(), dim=1)
    return D.to(device), S.to(device)


def errors(D: Tensor, S: Tensor, rho: float) -> tuple[float, float]:
    """Of our codes in float32 and of those by solving, relative to float64."""
    exact = code_in_every(D.double(), S.double(), _STEPS, lam=_LAM, rho=rho)
    ours = admm_lasso(D, S, lam=_LAM, rho=rho, steps=_STEPS).codes
    return distance(ours, exact), distance(code_in_every(D, S, _STEPS, lam=_LAM, rho=rho), exact)


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conditioning", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    device = pick_device(parser.parse_args(argv).device)
    rows = []
    for atoms in (_FEATURES, 640, 2 * _FEATURES):
        D, S = inputs(atoms, device)
        found = [errors(D, S, rho) for rho in RHOS]
        rows.append([f"M {atoms}", *(f"{ours:.0e} ({theirs:.0e})" for ours, theirs in found)])
    facts = f"F {_FEATURES}, {_STEPS} steps, lambda {_LAM}"
    print(f"{device_name(device)}, torch {torch.__version__}; {facts}: ours (solving)")
    print(markdown(["rho", *(f"{rho:g}" for rho in RHOS)], rows), end="")


if __name__ == "__main__":
    sys.exit(main())
