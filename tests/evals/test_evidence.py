import torch

from common.flags import Flags
from evals.evidence import MULTI_SR
from evals.features import Outputs
from models.checkpoint import build_net
from models.sparse.learn import objective

FLAGS = {"sr_layer": "penultimate", "invert_sr_feature_norm": True, "normalize_sr_dict_feature": False}
FLAGS |= {"normalize_sr_feature": False, "sr_lambda": 1e-3, "sr_rho": 1.0, "sr_dict_size": 20, "sr_fit_steps": 60}


def outputs(n: int, seed: int) -> Outputs:
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(9))
    h = torch.einsum("nkc,kcf->nkf", torch.rand(n, 2, 6, generator=g), basis).abs()
    return {"h": h[:, None], "z": torch.randn(n, 1, 2, 8, generator=g), "shift": torch.randn(n, 1, 2, 2, generator=g)}


def test_fitted_dictionaries_code_averaged_features_to_the_stated_gap():
    """Features are averaged, then inverted, then coded; the codes are those of the lasso to a gap of 1e-3 lambda."""
    net = build_net("feature", "resnet8", n_classes=2, simclr_dim=8, n_shifts=2, seed=0)
    train, test = outputs(50, 0), outputs(9, 1)
    finished = MULTI_SR.finish(Flags({**FLAGS, "seed": 0}), net, train)
    out = finished.finish(test)
    h = test["h"][:, 0]
    torch.testing.assert_close(out["s"][:, 0], h / h.square().sum(2, keepdim=True))
    assert out["codes"].shape == (9, 1, 2, 20) and torch.equal(out["shift"], test["shift"])
    assert out["gap"].max() <= 1e-3 * 1e-3
    D = finished.dictionary
    assert D.shape == (2, 64, 20) and D.norm(dim=1).max() <= 1 + 1e-5
    s, codes = out["s"][:, 0].permute(1, 2, 0), out["codes"][:, 0].permute(1, 2, 0)
    nothing = objective(D, s, torch.zeros_like(codes), 1e-3)
    assert (objective(D, s, codes, 1e-3) < 0.5 * nothing).all()


def test_draws_are_averaged_before_features_are_inverted_and_coded():
    """Mean first, then h / |h|^2: the other order gives other features."""
    net = build_net("feature", "resnet8", n_classes=2, simclr_dim=8, n_shifts=2, seed=0)
    draws = [outputs(50, seed) for seed in range(3)]
    several = {name: torch.cat([draw[name] for draw in draws], 1) for name in draws[0]}
    out = MULTI_SR.finish(Flags({**FLAGS, "seed": 0}), net, several).finish(several)
    h = several["h"].mean(1)
    torch.testing.assert_close(out["s"][:, 0], h / h.square().sum(2, keepdim=True))


def test_fitted_dictionaries_follow_the_seed():
    net = build_net("feature", "resnet8", n_classes=2, simclr_dim=8, n_shifts=2, seed=0)
    few = {**FLAGS, "sr_fit_steps": 2}
    a, b, c = (MULTI_SR.finish(Flags({**few, "seed": s}), net, outputs(50, 0)).dictionary for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.allclose(a, c)
