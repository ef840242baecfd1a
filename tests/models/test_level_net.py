"""Stage 2 at several depths, against loops, scikit-learn and values known by hand."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Lasso
from sklearn.neighbors import NearestNeighbors

from common.seed import generator
from models.checkpoint import Misfit, build_net, load_net
from models.level_net import (
    LEVELS,
    NEIGHBOURS,
    TRANSFORMATIONS,
    LevelDictionary,
    LevelNet,
    Reading,
    Transformations,
    cosine_neighbours,
    own_log_probability,
    read_levels,
    shrunk,
)
from models.sparse.prox import lambda_max, lasso_objective


def rotations() -> Transformations:
    functions = [lambda x, q=q: torch.rot90(x, q, (2, 3)) for q in range(4)]
    return Transformations(functions, range(4), {"shift": torch.arange(4)})


def level_net(levels=LEVELS, atoms: int = 6) -> LevelNet:
    net = build_net("feature", "resnet8", seed=0, n_classes=2, simclr_dim=8, n_shifts=4).eval()
    images = torch.rand(12, 3, 8, 8, generator=generator(0, "test"))
    reading = read_levels(net, images, rotations(), levels)
    sizes = {name: x.shape[1] for name, x in reading.levels.items()}
    model = LevelNet(net, sizes, atoms, (4, 12, net.feature_dim))
    with torch.no_grad():
        model.known.copy_(F.normalize(reading.h, dim=2).transpose(0, 1))
        for name, level in model.dictionaries.items():
            level.fit(reading.levels[name], share=0.1, scaled=name != "pixels", generator=generator(0, name))
    return model


def test_log_probabilities_of_several_heads_by_a_loop():
    g = torch.Generator().manual_seed(0)
    logits = {"a": torch.randn(5, 6, 4, generator=g), "b": torch.randn(5, 6, 3, generator=g)}
    truth = {"a": torch.tensor([0, 1, 2, 3, 0, 1]), "b": torch.tensor([2, 1, 0, 2, 1, 0])}
    for n, value in enumerate(own_log_probability(logits, truth)):
        parts = [sum((logits[name][n, k].softmax(0)[truth[name][k]]).log().item() for name in logits) for k in range(6)]
        assert value.item() == pytest.approx(sum(parts) / 6, abs=1e-5)


def test_cosine_neighbours_are_scikit_learns_and_no_more_than_there_are():
    g = torch.Generator().manual_seed(0)
    known, h = torch.randn(2, 20, 7, generator=g), torch.randn(9, 2, 7, generator=g)
    expected = torch.zeros(9, dtype=torch.float64)
    for k in range(2):
        index = NearestNeighbors(n_neighbors=3, metric="cosine").fit(known[k].numpy())
        expected += torch.from_numpy(1 - index.kneighbors(h[:, k].numpy())[0]).mean(1) / 2
    found = cosine_neighbours(F.normalize(known, dim=2), h, 3)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    assert cosine_neighbours(F.normalize(known[:, :2], dim=2), h, 5).shape == (9,)


def test_what_is_small_is_not_shrunk_and_the_rest_is_averaged():
    x = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    assert shrunk(x, 8) is x and shrunk(x, 32) is x
    torch.testing.assert_close(shrunk(x, 4), F.avg_pool2d(x, 2))
    assert shrunk(x[..., :3], 4).shape == (2, 3, 4, 3)


def test_codes_are_zero_from_lambda_max_on_and_the_objective_is_scikit_learns():
    """At several shares of lambda, in float64; the norm of the features stays."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 9, dtype=torch.float64, generator=g) * 3 + 1
    for share in (0.1, 0.5, 1.0):
        level = LevelDictionary(9, 14, 1.0).double()
        largest = level.fit(x, share=share, scaled=False, generator=generator(0, "k-means"))
        D, lam = level.bank.dictionary[0], level.bank.coding.lam
        centred = x - x.mean(0)
        torch.testing.assert_close(largest, (centred @ D).abs().amax(1))
        assert lam == pytest.approx(share * largest.median().item())
        cost, facts = level.costs(x)
        gap, zeros = facts["gap"], facts["zeros"]
        torch.testing.assert_close(facts["lambda_share"], lam / largest)
        for n in range(5):
            lasso = Lasso(lam / 9, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(D.numpy(), centred[n].numpy())
            a = torch.from_numpy(lasso.coef_)
            best = 0.5 * (centred[n] - D @ a).square().sum() + lam * a.abs().sum()
            assert cost[n].item() == pytest.approx(best.item(), rel=1e-4)
            assert (largest[n] <= lam) == (zeros[n] == 1)
        assert gap.max() < 0.01


def test_a_scaled_level_gives_the_same_whatever_units_its_features_have():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 6, generator=g)
    costs = []
    for units in (torch.ones(6), torch.tensor([1.0, 10, 0.1, 1, 5, 0.2])):
        level = LevelDictionary(6, 8, 1.0)
        level.fit(x * units, share=0.2, scaled=True, generator=generator(0, "k-means"))
        costs.append(level.costs(x * units)[0])
    torch.testing.assert_close(costs[0], costs[1], atol=2e-3, rtol=1e-3)
    constant = LevelDictionary(3, 2, 1.0)
    constant.fit(torch.ones(5, 3), share=0.2, scaled=True, generator=generator(0, "k-means"))
    assert constant.costs(torch.ones(5, 3))[0].isfinite().all()


def test_the_gradient_of_a_cost_is_that_of_the_lasso():
    """By Danskin's theorem: minus the residual's, with the code held, s - D a."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 6, dtype=torch.float64, generator=g)
    level = LevelDictionary(6, 8, 1.0).double()
    level.fit(x, share=0.2, scaled=False, generator=generator(0, "k-means"))
    level.bank.coding = level.bank.coding.__class__(level.bank.coding.lam, 1.0, 3000, tol=None)
    point = x[:4].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(level.costs(point)[0].sum(), point)
    step, numeric = 1e-5, torch.zeros(4, 6, dtype=torch.float64)
    for i in range(6):
        moved = torch.zeros(6, dtype=torch.float64)
        moved[i] = step
        up, down = (level.costs(x[:4] + sign * moved)[0] for sign in (1, -1))
        numeric[:, i] = (up - down).detach() / (2 * step)
    torch.testing.assert_close(gradient, numeric, atol=1e-5, rtol=0)


def test_the_score_is_the_weighted_sum_of_standardised_terms():
    model = level_net(levels=("pixels",))
    model.means.copy_(torch.tensor([1.0, 2, 3]))
    model.deviations.copy_(torch.tensor([2.0, 4, 5]))
    model.weights.copy_(torch.tensor([10.0, 0, 1]))
    values = {TRANSFORMATIONS: torch.tensor([3.0]), NEIGHBOURS: torch.tensor([100.0]), "pixels": torch.tensor([-7.0])}
    assert model.terms == (TRANSFORMATIONS, NEIGHBOURS, "pixels")
    assert model.score(values).item() == pytest.approx(10 * (3 - 1) / 2 + 0 + (-7 - 3) / 5)


def test_terms_of_a_network_one_by_one():
    model, images = level_net(), torch.rand(5, 3, 8, 8, generator=generator(1, "test"))
    views = rotations()
    with torch.no_grad():
        values = model.values(model.read(images, views), views)
        expected = torch.zeros(5)
        for k, function in enumerate(views.functions):
            shift = model.feature_net(function(images)).shift
            expected += shift.log_softmax(1)[:, k] / 4
        torch.testing.assert_close(values[TRANSFORMATIONS], expected)
        stem = model.feature_net.backbone.stem(model.feature_net.normalise(images))
        one = model.feature_net.backbone.layers()[0](stem)
        two = model.feature_net.backbone.layers()[1](one)
        maps = torch.cat([F.adaptive_avg_pool2d(x, 4).flatten(1) for x in (one, two)], 1)
        level = model.dictionaries["stages"]
        x = ((maps - level.centre) / level.scale).mT
        codes = level.bank.code(x[None]).codes
        cost = lasso_objective(level.bank.dictionary, x[None], codes, level.bank.coding.lam)[0]
        torch.testing.assert_close(values["stages"], -cost)
        of_turned = [model.feature_net(function(images)).z for function in views.functions]
        level = model.dictionaries["simclr"]
        x = ((torch.cat(of_turned, 1) - level.centre) / level.scale).mT
        cost = lasso_objective(level.bank.dictionary, x[None], level.bank.code(x[None]).codes, level.bank.coding.lam)[0]
        torch.testing.assert_close(values["simclr"], -cost, atol=1e-4, rtol=1e-4)
    assert model.train().training and not model.feature_net.training  # it stays frozen


def test_terms_do_not_depend_on_autocast():
    """Of cosines near 1, bf16 would tell hardly two apart."""
    model, views = level_net(), rotations()
    with torch.no_grad():
        reading = model.read(torch.rand(30, 3, 8, 8, generator=generator(1, "test")), views)
        expected = model.values(reading, views)
        with torch.autocast("cpu", torch.bfloat16):
            found = model.values(reading, views)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_known_image_is_its_own_neighbour_and_an_odd_one_costs_more():
    model = level_net()
    views = rotations()
    known = torch.rand(12, 3, 8, 8, generator=generator(0, "test"))
    odd = torch.zeros(12, 3, 8, 8)
    odd[:, :, ::2] = 1
    with torch.no_grad():
        a, b = (model.values(model.read(x, views), views) for x in (known, odd))
    assert all((a[name] > b[name]).all() for name in (NEIGHBOURS, "pixels", "stages"))


def test_a_file_gives_the_same_network_with_its_own_lambdas(tmp_path):
    model = level_net()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    again = load_net("levels", state, model="resnet8", path=tmp_path, flag="load_path")
    lams = {name: level.bank.coding.lam for name, level in model.dictionaries.items()}
    assert {n: level.bank.coding.lam for n, level in again.dictionaries.items()} == pytest.approx(lams, rel=1e-6)
    images, views = torch.rand(3, 3, 8, 8), rotations()
    with torch.no_grad():
        one, two = (m.score(m.values(m.read(images, views), views)) for m in (model, again))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("broken", ["known", "levels.pixels.bank.dictionary"])
def test_a_file_whose_parts_do_not_fit_is_corrupt(broken, tmp_path):
    from common.errors import UserError

    state = {key: value.clone() for key, value in level_net().state_dict().items()}
    state[broken] = state[broken][0]
    with pytest.raises((UserError, Misfit), match="corrupt"):
        load_net("levels", state, model="resnet8", path=tmp_path, flag="load_path")


def test_readings_are_joined_in_order():
    parts = [Reading({"a": torch.full((2, 1, 3), float(n))}, torch.full((2, 1, 4), float(n)), {}) for n in range(3)]
    whole = Reading.joined(parts).to("cpu")
    assert whole.h[:, 0, 0].tolist() == [0, 0, 1, 1, 2, 2] == whole.logits["a"][:, 0, 0].tolist()


def test_lambda_max_by_hand():
    D = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    assert lambda_max(D, torch.tensor([[3.0, -1.0], [1.0, -5.0]])).tolist() == [[3.0, 5.0]]
