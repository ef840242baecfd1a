"""Networks against known answers, torch's distributions, finite differences and counts by hand."""

import copy
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.autoencoder.networks import (
    ACTIVATIONS,
    Autoencoder,
    AutoencoderSpec,
    ConvAutoencoder,
    TruncatedSVD,
    VariationalAutoencoder,
    kl,
    reconstruction_term,
    reparametrized,
    squared_error,
)
from models.autoencoder.robust import draw_weights

SLIDES = (784, 625, 400, 225, 100)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


# ------------------------------------------------------------------------------------------------------ dense


def test_parameters_are_as_many_as_published():
    assert count(Autoencoder(SLIDES)) == 1_708_384
    assert count(Autoencoder((784, 400, 200), tied=True)) == 395_384
    assert count(VariationalAutoencoder((784, 400, 20))) == 652_824


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_dense_network_is_matrices_with_activations_between(activation, tied):
    net = draw_weights(lambda: Autoencoder((6, 5, 3), activation=activation, tied=tied).double(), 0)
    for p in net.parameters():
        p.data += 0.1 * normal(*p.shape)
    x, act = normal(4, 6), ACTIVATIONS[activation]
    (W1, b1), (W2, b2) = ((layer.weight, layer.bias) for layer in net.encoder)
    c1, c2 = (layer.bias for layer in net.decoder)
    V1, V2 = (W2.T, W1.T) if tied else (layer.weight for layer in net.decoder)
    code = act(x @ W1.T + b1) @ W2.T + b2
    raw = act(code @ V1.T + c1) @ V2.T + c2
    torch.testing.assert_close(net.encode(x), code, atol=1e-12, rtol=0)
    torch.testing.assert_close(net(x), raw.sigmoid(), atol=1e-12, rtol=0)
    torch.testing.assert_close(net.losses(x), (raw.sigmoid() - x).square().mean(1), atol=1e-12, rtol=0)


def test_the_code_is_linear_and_so_is_the_output_where_asked():
    """No activation after either: doubled weights double them."""
    net = draw_weights(lambda: Autoencoder((6, 3), output="linear").double(), 0)
    x, code, found = normal(4, 6), *(f(normal(4, 6)) for f in (net.encode, net))
    assert (code < 0).any() and (found < 0).any() and (found > 1).any()
    net.encoder[0].weight.data *= 2
    torch.testing.assert_close(net.encode(x), 2 * code, atol=1e-12, rtol=0)


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_gradients_of_a_tied_network_are_those_of_finite_differences(activation):
    net = draw_weights(lambda: Autoencoder((5, 4, 2), activation=activation, tied=True).double(), 1)
    x = normal(3, 5, seed=2)
    net.losses(x).mean().backward()
    step = 1e-6
    for p in net.parameters():
        for place in np.ndindex(*p.shape):
            value = p.data[place].item()
            found = []
            for sign in (1, -1):
                p.data[place] = value + sign * step
                found.append(net.losses(x).mean().item())
            p.data[place] = value
            assert p.grad[place].item() == pytest.approx((found[0] - found[1]) / (2 * step), abs=1e-8)


def test_a_tied_network_has_no_weights_but_its_encoders():
    net = Autoencoder((6, 5, 3), tied=True)
    assert sorted(net.state_dict()) == sorted(
        [*(f"encoder.{i}.{k}" for i in (0, 1) for k in ("weight", "bias")), "decoder.0.bias", "decoder.1.bias"]
    )


def test_weights_begin_within_glorots_bounds_and_biases_at_0():
    for name, p in Autoencoder((50, 30, 20)).named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all()
        else:
            bound = math.sqrt(6 / sum(p.shape))
            assert 0.95 * bound < p.abs().max() <= bound and p.mean().abs() < 0.1 * bound


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Autoencoder((4, 2), activation="swish"), "activation must be one of relu, sigmoid, tanh, linear, got"),
        (lambda: Autoencoder((4, 2), output="relu"), "output must be one of sigmoid, linear, got 'relu'"),
        (lambda: ConvAutoencoder((1, 4, 4), output="relu"), "output must be one of sigmoid, linear, got 'relu'"),
        (lambda: VariationalAutoencoder((4, 2), likelihood="poisson"), "likelihood must be one of bernoulli, gaussian"),
        (lambda: Autoencoder((4,)), "one layer at least"),
        (lambda: VariationalAutoencoder((4,)), "one layer at least"),
        (lambda: ConvAutoencoder((1, 4, 4), widths=()), "one layer at least"),
        (lambda: TruncatedSVD(4, 5), r"the rank must lie in 1\.\.4, got 5"),
        (lambda: TruncatedSVD(4, 0), r"the rank must lie in 1\.\.4, got 0"),
        (lambda: AutoencoderSpec().build("conv", 4, None), "needs pictures"),
    ],
)
def test_what_cannot_be_built_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --------------------------------------------------------------------------------------------- all of the table

SPEC = AutoencoderSpec(layers=(9, 4), widths=(3, 5))
KINDS = {
    "dense": ("dense", SPEC),
    "tied": ("dense", AutoencoderSpec(layers=(9, 4), tied=True)),
    "conv": ("conv", SPEC),
    "svd": ("svd", SPEC),
    "vae": ("vae", SPEC),
    "vae, gaussian": ("vae", AutoencoderSpec(layers=(9, 4), likelihood="gaussian")),
}
every = pytest.mark.parametrize("kind, spec", KINDS.values(), ids=list(KINDS))


def losses(net, rows: Tensor) -> Tensor:
    eps = torch.zeros(len(rows), net.latents, dtype=rows.dtype) if hasattr(net, "latents") else None
    return net.losses(rows) if eps is None else net.losses(rows, eps)


@every
def test_all_networks_map_rows_to_codes_and_back(kind, spec):
    net = spec.build(kind, 2 * 5 * 3, (2, 5, 3))
    rows = torch.rand(7, 30)
    assert net.encode(rows).shape == (7, 4)
    assert net(rows).shape == rows.shape and torch.equal(net.decode(net.encode(rows)), net(rows))
    assert losses(net, rows).shape == (7,)
    assert net(rows[:0]).shape == (0, 30)


@every
def test_rows_do_not_depend_on_their_batch(kind, spec):
    net, rows = spec.build(kind, 30, (2, 5, 3)).double(), torch.rand(7, 30, dtype=torch.float64)
    if kind == "svd":
        net.fit(rows)
    torch.testing.assert_close(net(rows[2:4]), net(rows)[2:4], atol=1e-12, rtol=0)
    torch.testing.assert_close(losses(net, rows[2:4]), losses(net, rows)[2:4], atol=1e-12, rtol=0)


@every
def test_networks_can_be_copied_and_pickled(kind, spec):
    net, rows = spec.build(kind, 30, (2, 5, 3)), torch.rand(7, 30)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(rows), net(rows))


@every
def test_sizes_may_be_numbers_of_numpy(kind, spec):
    other = replace(spec, layers=list(np.array(spec.layers)), widths=list(np.array(spec.widths)))
    assert count(other.build(kind, np.int64(30), (2, 5, 3))) == count(spec.build(kind, 30, (2, 5, 3)))


def test_the_loss_of_a_row_is_its_mean_squared_error():
    rows = normal(4, 6)
    expected = torch.tensor([sum((0.5 * float(v)) ** 2 for v in row) / 6 for row in rows], dtype=torch.float64)
    torch.testing.assert_close(squared_error(lambda x: 0.5 * x, rows), expected, atol=1e-14, rtol=0)


# ------------------------------------------------------------------------------------------------- convolutional


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(28, 28), (7, 5), (1, 1), (9, 33)])
@pytest.mark.parametrize("widths", [(4,), (4, 6, 8)])
def test_pictures_of_all_sizes_come_back_in_their_size(channels, size, widths):
    net = ConvAutoencoder((channels, *size), widths=widths, code=5)
    rows = torch.rand(2, channels * math.prod(size))
    assert net(rows).shape == rows.shape and net.encode(rows).shape == (2, 5)


def test_a_convolutional_network_sees_pixels_where_they_are():
    """The transposed picture through the network with transposed filters gives the transposed reconstruction."""
    net = ConvAutoencoder((1, 6, 10), widths=(3,), code=4).double()
    other = ConvAutoencoder((1, 10, 6), widths=(3,), code=4).double()
    state = {name: p.mT if p.ndim == 4 else p for name, p in net.state_dict().items()}
    state["to_code.weight"] = state["to_code.weight"].unflatten(1, (3, 3, 5)).mT.flatten(1)
    state["from_code.weight"] = state["from_code.weight"].unflatten(0, (3, 3, 5)).transpose(1, 2).flatten(0, 2)
    other.load_state_dict(state)
    rows = torch.rand(2, 60, dtype=torch.float64)
    turned = other(rows.unflatten(1, (6, 10)).mT.flatten(1)).unflatten(1, (10, 6)).mT.flatten(1)
    torch.testing.assert_close(turned, net(rows), atol=1e-12, rtol=0)


def test_a_convolutional_network_learns_pictures_by_heart():
    rows = torch.rand(4, 3 * 7 * 9, generator=torch.Generator().manual_seed(0))
    net = draw_weights(lambda: ConvAutoencoder((3, 7, 9), code=8, activation="relu"), 0)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        net.losses(rows).mean().backward()
        optimizer.step()
    assert net.losses(rows).mean() < 0.02 < 0.05 < rows.var()


# ---------------------------------------------------------------------------------------------------- variational


def test_known_terms_of_the_variational_loss(golden):
    g = golden("rdae_a")
    mean, log_variance, x, logits = (g[f"vae_{name}"] for name in ("mu", "logvar", "x", "logits"))
    found = {
        "vae_z": reparametrized(mean, log_variance, g["vae_eps"]),
        "vae_kl": kl(mean, log_variance),
        "vae_bce": reconstruction_term(logits, x, "bernoulli"),
        "vae_sse": 2 * reconstruction_term(logits.sigmoid(), x, "gaussian", sigma=1.0),
    }
    for name, value in found.items():
        torch.testing.assert_close(value, g[name], atol=1e-9, rtol=0)
    assert (found["vae_bce"] + found["vae_kl"]).mean().item() == pytest.approx(g["vae_loss_bernoulli"], abs=1e-9)
    assert (found["vae_sse"] / 2 + found["vae_kl"]).mean().item() == pytest.approx(g["vae_loss_gaussian"], abs=1e-9)
    assert F.mse_loss(logits.sigmoid(), x).item() == pytest.approx(g["vae_loss_slides"], abs=1e-9)


def test_kl_is_that_of_torchs_distributions():
    mean, log_variance = 2 * normal(50, 6), 3 * normal(50, 6, seed=1)
    found = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (log_variance / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    ).sum(1)
    torch.testing.assert_close(kl(mean, log_variance), found, atol=1e-10, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1e-1, 1.0, 10.0])
def test_kl_is_never_negative_and_0_for_the_standard_normal_alone(scale):
    log_variance = scale * torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    assert (kl(torch.zeros(2000, 3), log_variance) >= 0).all()
    assert (kl(scale * torch.ones(2, 3), torch.zeros(2, 3)) > 0).all()
    assert (kl(torch.zeros(2, 3), scale * torch.ones(2, 3)) > 0).all()
    assert (kl(torch.zeros(2, 3), torch.zeros(2, 3)) == 0).all()


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_reconstruction_terms_are_negative_log_likelihoods(likelihood):
    """Up to a constant of the data, which the Gaussian form leaves out."""
    raw, x, sigma = normal(5, 4), torch.rand(5, 4, dtype=torch.float64).round(), 0.3
    if likelihood == "bernoulli":
        expected = -torch.distributions.Bernoulli(logits=raw).log_prob(x).sum(1)
    else:
        density = torch.distributions.Normal(raw, sigma)
        expected = (density.log_prob(raw) - density.log_prob(x)).sum(1)
    torch.testing.assert_close(reconstruction_term(raw, x, likelihood, sigma), expected, atol=1e-10, rtol=0)


def test_samples_have_the_mean_and_variance_that_they_should():
    mean, log_variance = torch.tensor([0.5, -2.0]), torch.tensor([-1.0, 1.5])
    eps = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0))
    found = reparametrized(mean.expand_as(eps), log_variance.expand_as(eps), eps)
    torch.testing.assert_close(found.mean(0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(found.var(0), log_variance.exp(), atol=0, rtol=0.02)


@pytest.mark.parametrize("likelihood, output", [("bernoulli", torch.sigmoid), ("gaussian", lambda raw: raw)])
def test_evaluation_decodes_the_mean(likelihood, output):
    net = draw_weights(lambda: VariationalAutoencoder((6, 5, 2), likelihood=likelihood).double(), 0)
    x = torch.rand(4, 6, dtype=torch.float64)
    mean = net.distribution(x)[0]
    hidden = (mean @ net.decoder[0].weight.T + net.decoder[0].bias).sigmoid()
    raw = hidden @ net.decoder[1].weight.T + net.decoder[1].bias
    torch.testing.assert_close(net(x), output(raw), atol=1e-12, rtol=0)
    assert torch.equal(net.encode(x), mean)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_loss_is_made_of_its_terms_with_their_weights(likelihood):
    net = draw_weights(
        lambda: VariationalAutoencoder((6, 5, 2), likelihood=likelihood, beta=0.7, sigma=0.2), 0
    ).double()
    x, eps = torch.rand(4, 6, dtype=torch.float64), normal(4, 2)
    mean, log_variance = net.distribution(x)
    output = net.decode(mean + (log_variance / 2).exp() * eps)
    fit = {
        "bernoulli": lambda: F.binary_cross_entropy(output, x, reduction="none").sum(1),
        "gaussian": lambda: (output - x).square().sum(1) / (2 * 0.2**2),
    }[likelihood]()
    torch.testing.assert_close(net.losses(x, eps), fit + 0.7 * kl(mean, log_variance), atol=1e-9, rtol=0)


def test_a_smaller_beta_lowers_the_reconstruction_term_and_raises_the_kl_term():
    x = torch.rand(60, 8, generator=torch.Generator().manual_seed(0)).round()

    def trained(beta: float) -> tuple[float, float]:
        net = draw_weights(lambda: VariationalAutoencoder((8, 16, 3), beta=beta), 0)
        optimizer, gen = torch.optim.Adam(net.parameters(), 1e-2), torch.Generator().manual_seed(1)
        for _ in range(300):
            optimizer.zero_grad()
            net.losses(x, torch.randn(60, 3, generator=gen)).mean().backward()
            optimizer.step()
        with torch.no_grad():
            mean, log_variance = net.distribution(x)
            raw = net._raw(reparametrized(mean, log_variance, torch.randn(60, 3, generator=gen)))
            return float(reconstruction_term(raw, x, "bernoulli").mean()), float(kl(mean, log_variance).mean())

    (low_fit, low_kl), (fit, some_kl), (high_fit, high_kl) = map(trained, (0.01, 1.0, 10.0))
    assert low_fit < 0.5 * fit < 0.5 * high_fit and low_kl > 2 * some_kl > 2 * high_kl


# ------------------------------------------------------------------------------------------------- truncated SVD


def test_the_truncated_svd_is_the_best_of_its_rank():
    X = normal(20, 8)
    net = TruncatedSVD(8, 3).double()
    net.fit(X)
    U, s, Vt = np.linalg.svd(X.numpy(), full_matrices=False)
    np.testing.assert_allclose(net(X).numpy(), (U[:, :3] * s[:3]) @ Vt[:3], atol=1e-12)
    assert float((X - net(X)).square().sum()) == pytest.approx(float((s[3:] ** 2).sum()), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_the_truncated_svd_of_exact_rank_is_exact(scale):
    """Of singular values over six orders of magnitude, too, which the Gram matrix would lose."""
    left, right = torch.linalg.qr(normal(30, 4)).Q, torch.linalg.qr(normal(12, 4, seed=1)).Q
    X = scale * (left * torch.tensor([1.0, 1e-2, 1e-4, 1e-6], dtype=torch.float64)) @ right.T
    net = TruncatedSVD(12, 4).double()
    net.fit(X)
    assert (net(X) - X).norm() < 1e-14 * X.norm()


def test_the_truncated_svd_takes_wide_data_and_needs_as_many_rows_as_components():
    X, net = normal(4, 9), TruncatedSVD(9, 4).double()
    net.fit(X)
    torch.testing.assert_close(net(X), X, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="4 components need as many rows, there are 3"):
        net.fit(X[:3])


def test_the_truncated_svd_has_no_weights_to_train_and_keeps_its_components():
    net = TruncatedSVD(9, 4)
    net.fit(torch.rand(20, 9))
    other = TruncatedSVD(9, 4)
    other.load_state_dict(net.state_dict())
    rows = torch.rand(3, 9)
    assert count(net) == 0 and torch.equal(other(rows), net(rows))
