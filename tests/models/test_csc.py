"""Convolutional sparse coding against known answers, scikit-learn and what follows from its definition."""

import copy

import numpy as np
import pytest
import torch
from sklearn.linear_model import ElasticNet

from models.csc import CSC1d, CSC2d

FILES = pytest.mark.parametrize("name", ["sdnet_a", "sdnet_b"])


def layer_of(g, **changes) -> CSC2d:
    """The layer of a golden file, in float64."""
    atoms, channels, kernel, _ = g["weight"].shape
    own = {"lam": float(g["lam"]), "mu": float(g["mu"]), **changes}
    net = CSC2d(channels, atoms, kernel, int(g["stride"]), int(g["padding"]), **own).double()
    net.set_lambda(own["lam"])
    with torch.no_grad():
        net.weight.copy_(g["weight_raw"])
        net.project_()
        net.step.fill_(float(g["step"]))
    return net


def small(seed=0, **changes) -> CSC2d:
    """Three channels, four atoms of 3 x 3."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = CSC2d(3, 4, 3, padding=1, **changes).double()
    net.set_lambda(changes.get("lam", 0.1))
    return net


def images(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@FILES
def test_known_codes(golden, name):
    g = golden(name)
    x, more = g["x"], int(g["k_extra"])
    settings = {
        "code_k1": {"steps": 1},
        "code_k2": {},
        "code_kx_fista": {"steps": more},
        "code_kx_released": {"steps": more, "gradient_at": "iterate"},
        "code_k2_signed": {"nonneg": False},
        "code_k2_lam_hi": {"lam": float(g["lam_hi"])},
    }
    for key, changes in settings.items():
        torch.testing.assert_close(layer_of(g, **changes)(x), g[key], atol=1e-9, rtol=0, msg=key)
    found = layer_of(g).float()(x.float())
    torch.testing.assert_close(found.double(), g["code_k2"], atol=1e-4, rtol=0)


@FILES
def test_known_parts_of_the_objective(golden, name):
    g = golden(name)
    net, x, size = layer_of(g), g["x"], g["x"].shape[2:]
    torch.testing.assert_close(net.weight.detach(), g["weight"], atol=1e-12, rtol=0)
    torch.testing.assert_close(net.synthesise(g["code_k2"], size), g["recon_k2"], atol=1e-9, rtol=0)
    for key in ("k1", "k2", "opt"):
        assert float(net.objective(x, g[f"code_{key}"]).sum()) == pytest.approx(float(g[f"objective_{key}"]), abs=1e-9)
    residual = (x - net.synthesise(g["code_k2"], size)).square().flatten(1).sum(1)
    torch.testing.assert_close(residual, g["residual_sq_per_sample_k2"], atol=1e-9, rtol=0)


@pytest.mark.parametrize("recompute", [True, False])
@FILES
def test_known_gradients(golden, name, recompute):
    g = golden(name)
    net, x = layer_of(g, recompute=recompute), g["x"].clone().requires_grad_()
    (net(x) * g["cotangent"]).sum().backward()
    torch.testing.assert_close(x.grad, g["grad_x_k2"], atol=1e-9, rtol=0)
    torch.testing.assert_close(net.weight.grad, g["grad_weight_k2"], atol=1e-9, rtol=0)


@FILES
def test_the_optimum_is_reached_and_meets_its_conditions(golden, name):
    g = golden(name)
    net, x = layer_of(g, steps=20_000), g["x"]
    with torch.no_grad():
        z = net(x)
        slope = net.analyse(x - net.synthesise(z, x.shape[2:])) - float(g["mu"]) * z
    torch.testing.assert_close(z, g["code_opt"], atol=1e-7, rtol=0)
    lam = float(g["lam"])
    assert (slope[z > 0] - lam).abs().max() < 1e-6 and slope[z == 0].max() < lam + 1e-6


@FILES
def test_known_step_sizes(golden, name):
    g = golden(name)
    net = layer_of(g)
    net.power = g["v0"] / g["v0"].norm()
    net.refresh_step(g["x"].shape[2:], fresh=True)
    assert 0.9 / float(net.step) == pytest.approx(float(g["lambda_max_50it"]), rel=1e-9)
    for _ in range(3000):
        net.refresh_step(g["x"].shape[2:])
    assert 0.9 / float(net.step) == pytest.approx(float(g["lambda_max"]), rel=1e-4)
    fresh = CSC2d(*g["weight"].shape[1::-1], g["weight"].shape[2], int(g["stride"]), int(g["padding"])).double()
    with torch.no_grad():
        fresh.weight.copy_(g["weight"])
    assert fresh._bound() >= float(g["lambda_max"])  # a step that no size makes too long


def test_known_codes_of_a_dense_dictionary(golden):
    g = golden("sdnet_b")
    atoms, features = g["msc_weight"].shape
    for key, steps, at in (("k1", 1, "iterate"), ("k2", 2, "iterate"), ("kx_fista", 0, "extrapolated"),
                           ("kx_released", 0, "iterate")):  # fmt: skip
        net = CSC1d(
            features, atoms, mu=float(g["msc_mu"]), steps=steps or int(g["msc_k_extra"]), gradient_at=at
        ).double()
        net.set_lambda(float(g["msc_lam"]))
        with torch.no_grad():
            net.weight.copy_(g["msc_weight_raw"])
            net.project_()
            net.step.fill_(float(g["msc_step"]))
        torch.testing.assert_close(net.weight.detach(), g["msc_weight"], atol=1e-12, rtol=0)
        torch.testing.assert_close(net(g["msc_x2"]), g[f"msc_code2_{key}"], atol=1e-9, rtol=0)
        if key == "k2":
            torch.testing.assert_close(net(g["msc_x3"]), g["msc_code3_k2"], atol=1e-9, rtol=0)
            torch.testing.assert_close(net.synthesise(net(g["msc_x2"])), g["msc_recon2_k2"], atol=1e-9, rtol=0)


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (11, 10)])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_synthesis_is_the_adjoint_of_analysis(stride, kernel, size):
    net = CSC2d(2, 5, kernel, stride, kernel // 2).double()
    x, z = images(3, 2, *size), images(3, 5, *net.code_size(size), seed=1)
    assert net.analyse(x).shape == z.shape and net.synthesise(z, size).shape == x.shape
    left, right = (net.synthesise(z, size) * x).sum(), (z * net.analyse(x)).sum()
    assert float(left) == pytest.approx(float(right), rel=1e-10)


@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_the_converged_code_is_that_of_scikit_learn(mu):
    net = small(steps=4000, mu=mu, lam=0.2)
    x, size = images(1, 3, 5, 4), (5, 4)
    net.refresh_step(size, fresh=True)
    columns = torch.eye(4 * 20, dtype=torch.float64).view(-1, 4, *size)
    matrix = net.synthesise(columns, size).flatten(1).T.detach().numpy()
    n, lam = x.numel(), 0.2
    solver = ElasticNet(
        alpha=(lam + mu) / n, l1_ratio=lam / (lam + mu), positive=True, fit_intercept=False, tol=1e-12, max_iter=200_000
    )
    expected = solver.fit(matrix, x.flatten().numpy()).coef_
    with torch.no_grad():
        assert np.abs(net(x).flatten().numpy() - expected).max() < 1e-6
    assert 0 < (expected > 0).mean() < 0.9


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("nonneg", [True, False])
def test_gradients_are_those_of_differences(steps, nonneg):
    net = small(steps=steps, nonneg=nonneg)
    x = images(2, 3, 4, 5).requires_grad_()

    def code(x, weight):
        with torch.no_grad():
            own = copy.deepcopy(net)
        del own.weight
        own.weight = weight
        return own(x)

    assert torch.autograd.gradcheck(code, (x, net.weight.detach().clone().requires_grad_()), atol=1e-6)
    net(x).sum().backward()
    assert not net.step.requires_grad and not net.lam.requires_grad


@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("gradient_at", ["extrapolated", "iterate"])
@pytest.mark.parametrize(
    "steps, nonneg, size", [(1, True, (8, 8)), (3, True, (9, 8)), (3, False, (8, 8)), (5, True, (8, 6))]
)
def test_gradients_are_those_of_autograd(steps, nonneg, size, gradient_at, recompute, per_image):
    settings = {"steps": steps, "mu": 0.3, "nonneg": nonneg, "gradient_at": gradient_at, "recompute": recompute}
    net = CSC2d(3, 4, 3, 2, 1, **settings).double()
    net.refresh_step(size)
    lam = torch.tensor([0.05, 0.0, 0.2] if per_image else 0.1, dtype=torch.float64, requires_grad=True)
    net.set_lambda(lam)
    x = images(3, 3, *size).requires_grad_()
    found = net(x)
    cotangent = images(*found.shape, seed=1)

    def ascend(r, t):
        return net.step * net.analyse(r) - (0 if t is None else t)

    t = net.step * (lam.view(-1, 1, 1, 1) if per_image else lam)
    expected = net.solver.solve(x, ascend, lambda z: x - net.synthesise(z, size), net.step, t)
    torch.testing.assert_close(found, expected)
    pairs = [torch.autograd.grad((code * cotangent).sum(), (x, net.weight, lam)) for code in (found, expected)]
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_needs_no_gradient_gets_none():
    net, x = small(), images(2, 3, 6, 6)
    net(x).sum().backward()
    whole = net.weight.grad.clone()
    own = x.clone().requires_grad_()
    net.zero_grad()
    net(own).sum().backward()
    torch.testing.assert_close(net.weight.grad, whole)
    net.zero_grad()
    net.weight.requires_grad_(False)
    (of_x,) = torch.autograd.grad(net(own).sum(), own)
    torch.testing.assert_close(of_x, own.grad)
    assert net.weight.grad is None and not net(x).requires_grad


@pytest.mark.parametrize("recompute", [True, False])
def test_codes_and_gradients_in_bf16(recompute):
    net, x = small(recompute=recompute).float(), images(4, 3, 16, 16).float().requires_grad_()
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            code = net(x)
        loss = (code.float() * images(*code.shape, seed=1)).sum()
        found.append((code.detach().float(), *torch.autograd.grad(loss, (x, net.weight))))
    assert code.dtype == torch.bfloat16 and all(part.dtype == torch.float32 for part in found[1])
    for exact, rounded in zip(*found, strict=True):
        assert 0 < (exact - rounded).norm() / exact.norm() < 0.05


def kept_numbers(net: CSC2d, x: torch.Tensor) -> int:
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        net(x)
    return sum(sizes)


def test_recomputing_keeps_no_iterates_but_the_output():
    x = images(4, 3, 16, 16).requires_grad_()
    net = small(steps=6)
    code, fixed = net(x).numel(), x.numel() + net.weight.numel() + 2
    assert kept_numbers(net, x) == fixed + code
    net.recompute = False
    assert kept_numbers(net, x) == fixed + 6 * code + 5 * x.numel()


def test_residuals_are_kept_where_all_of_them_are_smaller_than_a_code():
    net, x = CSC2d(1, 4, 3, padding=1, steps=4).double(), images(2, 1, 8, 8).requires_grad_()
    fixed, code = x.numel() + net.weight.numel() + 2, 4 * x.numel()
    assert kept_numbers(net, x) == fixed + code + 3 * x.numel()
    net.set_solver(net.solver._replace(steps=5))
    assert kept_numbers(net, x) == fixed + code


def test_one_step_without_lambda_is_a_convolution_and_a_relu():
    net = small(steps=1, lam=0.0)
    x = images(2, 3, 6, 6)
    torch.testing.assert_close(net(x), net.step * net.analyse(x).relu())


def test_a_large_lambda_leaves_no_code():
    net = small(steps=5)
    x = images(1, 3, 6, 6)
    largest = float(net.analyse(x).max())
    net.set_lambda(largest * (1 + 1e-12))  # up to rounding
    assert not net(x).any()
    one = small(steps=1)
    one.set_lambda(0.999 * largest)
    assert one(x).any()


def test_an_orthogonal_dictionary_is_solved_in_one_step():
    net = CSC1d(6, 6, steps=1, step_ratio=1.0).double()
    with torch.no_grad():
        net.weight.copy_(torch.linalg.qr(images(6, 6)).Q)
    net.set_lambda(0.3)
    net.refresh_step(fresh=True)
    assert float(net.step) == pytest.approx(1)
    x = images(5, 6)
    torch.testing.assert_close(net(x), (x @ net.weight.T - 0.3).relu(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_code_of_a_scaled_image_is_the_scaled_code(steps):
    net, x = small(steps=steps), images(2, 3, 6, 6)
    z = net(x)
    net.set_lambda(0.1 * 2.5)
    torch.testing.assert_close(net(2.5 * x), 2.5 * z)


def test_the_objective_falls_for_every_image():
    x = images(8, 3, 7, 7)
    net = small()
    net.refresh_step((7, 7), fresh=True)
    values = [net.objective(x, torch.zeros_like(net(x)))]
    for steps in (1, 2):
        own = small(steps=steps)
        own.step.copy_(net.step)
        values.append(net.objective(x, own(x)))
    assert (values[0] >= values[1]).all() and (values[1] >= values[2]).all() and (values[2] < values[0]).all()


def test_a_larger_lambda_makes_the_optimum_sparser_and_its_residual_larger():
    x, norms, residuals = images(3, 3, 5, 4), [], []
    for lam in (0.05, 0.1, 0.3, 0.6):
        net = small(steps=4000, lam=lam)
        net.refresh_step((5, 4), fresh=True)
        with torch.no_grad():
            z = net(x)
            norms.append(z.abs().flatten(1).sum(1))
            residuals.append((x - net.synthesise(z, (5, 4))).square().flatten(1).sum(1))
    assert (torch.stack(norms).diff(dim=0) < 0).all() and (torch.stack(residuals).diff(dim=0) > 0).all()


def test_each_image_may_have_a_lambda_of_its_own():
    net, x, lams = small(), images(3, 3, 6, 6), torch.tensor([0.05, 0.2, 0.6], dtype=torch.float64)
    net.set_lambda(lams)
    together, objective = net(x), net.objective(x, net(x))
    for n, lam in enumerate(lams):
        net.set_lambda(float(lam))
        torch.testing.assert_close(net(x[n : n + 1]), together[n : n + 1])
        torch.testing.assert_close(net.objective(x, together)[n], objective[n])


def test_the_step_follows_the_largest_eigenvalue():
    net, size = small(), (6, 5)
    columns = torch.eye(4 * 30, dtype=torch.float64).view(-1, 4, *size)
    for stride in (1, 2):
        net = CSC2d(3, 4, 3, stride, 1).double()
        columns = torch.eye(4 * int(np.prod(net.code_size(size))), dtype=torch.float64)
        matrix = net.synthesise(columns.view(-1, 4, *net.code_size(size)), size).flatten(1)
        exact = float(torch.linalg.matrix_norm(matrix, ord=2).square())
        net.refresh_step(size)
        assert 0.98 * exact <= 0.9 / float(net.step) <= exact * (1 + 1e-9) and float(net.step) * exact <= 0.92


def test_evaluation_changes_nothing_and_files_keep_everything():
    net, x = small(), images(2, 3, 6, 6)
    net.refresh_step((6, 6))
    net.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert torch.equal(net(x), net(x))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    other = small(seed=1)
    other.load_state_dict(before)
    assert torch.equal(other(x), net(x)) and torch.equal(other.power, net.power)
    net.set_lambda(torch.tensor([0.1, 0.4], dtype=torch.float64))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x)) and not torch.equal(other(x)[1], small(seed=0)(x)[1])


def test_atoms_keep_their_norm_when_they_are_projected():
    net = small()
    with torch.no_grad():
        net.weight.mul_(3).add_(0.1)
    net.project_()
    torch.testing.assert_close(net.weight.flatten(1).norm(dim=1), torch.ones(4, dtype=torch.float64))


def test_an_image_that_moves_by_the_stride_moves_its_code_by_one():
    net = CSC2d(1, 3, 3, 2, 1).double()
    x = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    x[..., 6:9, 6:9] = images(3, 3)
    moved = net(x.roll((2, 2), (2, 3)))
    torch.testing.assert_close(moved, net(x).roll((1, 1), (2, 3)))


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"lam": -0.1}, {"lam": float("nan")}, {"mu": -1}, {"gradient_at": "x"}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("lam", "lambda")):
        CSC2d(3, 4, 3, **wrong)
    with pytest.raises(ValueError, match="smaller than atoms of 7"):
        CSC2d(3, 4, 7)(torch.zeros(1, 3, 5, 5))
