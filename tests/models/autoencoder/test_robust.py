"""The robust autoencoder against known runs, planted outliers, and what holds after every round.

Letters: N rows, n columns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.seed import seed_of
from models.autoencoder import robust
from models.autoencoder.networks import Autoencoder, ConvAutoencoder, TruncatedSVD, VariationalAutoencoder
from models.autoencoder.robust import (
    PENALTIES,
    STOPS,
    Gradients,
    Threshold,
    batch_losses,
    batches,
    draw_weights,
    end_round,
    mu,
    reconstruct,
    restart,
    separate,
    stopped_by,
    threshold_from_contamination,
    threshold_from_lambda_mu,
    threshold_from_lambda_n,
)
from tests.fake_gpu import FakeGpu, on_gpu
from training.loop import _split

penalties = pytest.mark.parametrize("penalty", PENALTIES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass
class Exact:
    """An L-step: the best linear autoencoder of `rank`."""

    features: int
    rank: int

    def fit(self, rows: Tensor) -> None:
        self.net = TruncatedSVD(self.features, self.rank).to(rows)
        self.net.fit(rows)

    def reconstruct(self, rows: Tensor) -> Tensor:
        return self.net(rows)


@dataclass
class PlainSteps:
    """An L-step: `steps` full-batch gradient steps without momentum. losses: before the last step of each round."""

    net: nn.Module
    steps: int
    lr: float
    losses: list[float] = field(default_factory=list)

    def fit(self, rows: Tensor) -> None:
        optimizer = torch.optim.SGD(self.net.parameters(), self.lr)
        for _ in range(self.steps):
            loss = batch_losses(self.net, rows, 0, 0, 0).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.losses.append(loss.item())

    def reconstruct(self, rows: Tensor) -> Tensor:
        return reconstruct(self.net, rows)


@dataclass
class Watched:
    """An L-step that keeps what it is given, X - S of the round before, and what it returns, L."""

    step: robust.LStep
    given: list[Tensor] = field(default_factory=list)
    L: list[Tensor] = field(default_factory=list)

    def fit(self, rows: Tensor) -> None:
        self.given.append(rows)
        self.step.fit(rows)

    def reconstruct(self, rows: Tensor) -> Tensor:
        assert rows is self.given[-1]
        self.L.append(self.step.reconstruct(rows))
        return self.L[-1]

    def rounds(self, X: Tensor, S: Tensor) -> list[tuple[Tensor, Tensor]]:
        """L and S after each round; S: of the last."""
        sparse = [X - rows for rows in self.given[1:]]
        return list(zip(self.L, [*sparse, S], strict=True))


def linear(g: dict) -> Autoencoder:
    """R(Y) = (Y W1 + b1) W2 + b2 with the known weights."""
    net = Autoencoder((10, 2), output="linear").double()
    names = {"encoder.0.weight": "W1_init", "encoder.0.bias": "b1_init", "decoder.0.weight": "W2_init"}
    state = {name: g[key].t() for name, key in {**names, "decoder.0.bias": "b2_init"}.items()}
    net.load_state_dict(state)
    return net


STEPS: dict[str, Callable[[dict], robust.LStep]] = {
    "gd": lambda g: PlainSteps(linear(g), g["inner"], g["lr"]),
    "svd": lambda g: Exact(10, g["rank"]),
}
known = pytest.mark.parametrize("name", STEPS)


def known_run(g: dict, name: str, penalty: str, **settings) -> tuple[robust.Separation, Watched]:
    step = Watched(STEPS[name](g))
    settings = {"rounds": g["outer"], "eps": 0.0, "threshold": Threshold(g[f"t_{penalty}"])} | settings
    return separate(g[f"X_{penalty}"], step, penalty=penalty, **settings), step


# ------------------------------------------------------------------------------------------------- known answers


@penalties
@known
def test_known_runs(golden, penalty, name):
    g = golden("rdae_b")
    found, step = known_run(g, name, penalty)
    rounds = step.rounds(g[f"X_{penalty}"], found.S)
    assert len(rounds) == found.rounds == g["outer"] and found.stopped_by == "rounds"
    for number, (L, S) in enumerate(rounds):
        torch.testing.assert_close(L, g[f"{name}_{penalty}_L"][number], atol=1e-8, rtol=0)
        torch.testing.assert_close(S, g[f"{name}_{penalty}_S"][number], atol=1e-8, rtol=0)
    for criterion in ("c1", "c2"):
        assert found.history[criterion] == pytest.approx(g[f"{name}_{penalty}_{criterion}"].tolist(), abs=1e-8)
    torch.testing.assert_close(found.L, rounds[-1][0], atol=0, rtol=0)
    if name == "gd":
        assert step.step.losses == pytest.approx(g[f"gd_{penalty}_loss"].tolist(), abs=1e-8)
        layers = [step.step.net.encoder[0], step.step.net.decoder[0]]
        for number, layer in enumerate(layers, 1):
            torch.testing.assert_close(layer.weight.T, g[f"gd_{penalty}_W{number}_final"], atol=1e-8, rtol=0)
            torch.testing.assert_close(layer.bias, g[f"gd_{penalty}_b{number}_final"], atol=1e-8, rtol=0)


@known
def test_planted_entries_rows_and_columns_are_found_exactly(golden, name):
    g = golden("rdae_b")
    S = {penalty: known_run(g, name, penalty)[0].S != 0 for penalty in PENALTIES}
    assert torch.equal(S["l1"], g["true_spikes"].bool())
    assert S["l21_rows"].any(1).nonzero().flatten().tolist() == sorted(g["true_rows"].tolist())
    assert S["l21_cols"].any(0).nonzero().flatten().tolist() == sorted(g["true_cols"].tolist())


def test_known_criteria(golden):
    g = golden("rdae_a")
    given = robust.Penalty(lambda v, t: g["S"], torch.abs)
    found = end_round(g["X"], g["L"], g["LS_prev"], given, 1.0)
    assert (found.c1, found.c2) == pytest.approx((g["c1"], g["c2"]), abs=1e-9)


def test_known_thresholds(golden):
    g = golden("rdae_a")
    assert mu(g["X"]) == pytest.approx(g["mu_entrywise"], abs=1e-9)
    assert threshold_from_lambda_mu(0.3, g["X"]) == pytest.approx(0.3 / g["mu_entrywise"], abs=1e-9)
    assert threshold_from_lambda_n(0.00095, 5124) == pytest.approx(4.8678, abs=1e-9)


def test_mu_of_zeros_is_infinite_and_its_threshold_0():
    assert mu(torch.zeros(3, 4)) == math.inf and threshold_from_lambda_mu(0.3, torch.zeros(3, 4)) == 0


# ------------------------------------------------------------------------------------ what holds after each round


@penalties
def test_what_is_cut_off_is_at_most_the_threshold_after_every_round(penalty):
    X, t = normal(40, 8), 1.2
    step = Watched(Exact(8, 2))
    found = separate(X, step, penalty=penalty, threshold=Threshold(t), rounds=7, eps=0)
    sizes = {"l1": lambda v: v.abs(), "l21_rows": lambda v: v.norm(dim=1), "l21_cols": lambda v: v.norm(dim=0)}[penalty]
    rounds = step.rounds(X, found.S)
    assert len(rounds) == 7
    for L, S in rounds:
        left = sizes(X - L - S)
        assert left.max() <= t + 1e-12
        # What lies above is cut to the threshold, the rest is left whole.
        torch.testing.assert_close(left, sizes(X - L).clamp(max=t), atol=1e-12, rtol=0)
        assert 0 < (S != 0).float().mean() < 1 or penalty == "l21_cols"


def test_each_round_goes_on_from_the_sparse_part_before():
    """X - S, of the S of the round before: not of S = 0, and not shrunk twice."""
    X = normal(40, 8)
    step = Watched(Exact(8, 2))
    separate(X, step, penalty="l1", threshold=Threshold(0.8), rounds=3, eps=0)
    assert torch.equal(step.given[0], X)
    for before, L in zip(step.given[1:], step.L, strict=False):
        residual = X - L
        S = residual.sign() * (residual.abs() - 0.8).clamp(min=0)
        torch.testing.assert_close(before, X - S, atol=1e-14, rtol=0)


@penalties
def test_criteria_compare_with_x_and_with_the_round_before(penalty):
    X = normal(40, 8)
    step = Watched(Exact(8, 2))
    found = separate(X, step, penalty=penalty, threshold=Threshold(1.0), rounds=4, eps=0)
    before = X
    for number, (L, S) in enumerate(step.rounds(X, found.S)):
        assert found.history["c1"][number] == pytest.approx(float((X - L - S).norm() / X.norm()), rel=1e-12)
        assert found.history["c2"][number] == pytest.approx(float((before - L - S).norm() / X.norm()), rel=1e-12)
        before = L + S


def test_criteria_in_float32_are_those_of_float64():
    """One sum over four million squares would be off by 1e-4."""
    X, L, before = (x.float() for x in (normal(5124, 784), normal(5124, 784, seed=1), normal(5124, 784, seed=2)))
    found = end_round(X, L, before, PENALTIES["l1"], 0.3)
    exact = end_round(X.double(), L.double(), before.double(), PENALTIES["l1"], 0.3)
    assert (found.c1, found.c2) == pytest.approx((exact.c1, exact.c2), rel=1e-6)


def test_data_of_zeros_has_absolute_criteria():
    X, L = torch.zeros(3, 4), torch.full((3, 4), 0.5)
    found = end_round(X, L, X, PENALTIES["l1"], 0.2)
    assert (found.c1, found.c2) == pytest.approx((0.2 * 12**0.5, 0.2 * 12**0.5), rel=1e-6)
    nothing = end_round(X, X, X, PENALTIES["l21_rows"], 0.2)
    assert nothing.c1 == nothing.c2 == 0 and stopped_by(0.0, 0.0, "c2", 1e-9) == "c2"


def test_fewer_rows_are_flagged_as_the_threshold_grows():
    X, L = normal(50, 6), normal(50, 6, seed=1)
    flagged = [(end_round(X, L, X, PENALTIES["l21_rows"], t).S != 0).any(1) for t in (0.5, 2.0, 2.8, 3.5, 9.0)]
    counts = [int(rows.sum()) for rows in flagged]
    assert counts == sorted(counts, reverse=True) and counts[0] == 50 and counts[-1] == 0 and len(set(counts)) == 5
    assert all((more | fewer).equal(more) for more, fewer in zip(flagged, flagged[1:], strict=False))


# --------------------------------------------------------------------------------------------------- how it ends


@pytest.mark.parametrize(
    "stop, ends",
    [
        # By whether c1, and whether c2, lies below eps: neither, c1 alone, c2 alone, both.
        ("c2", [None, None, "c2", "c2"]),
        ("any", [None, "c1", "c2", "c1"]),
        ("all", [None, None, None, "c1"]),
    ],
)
def test_which_criterion_ends_the_rounds(stop, ends):
    cases = [(0.5, 0.5), (0.01, 0.5), (0.5, 0.01), (0.01, 0.01)]
    assert [stopped_by(c1, c2, stop, 0.1) for c1, c2 in cases] == ends


@pytest.mark.parametrize("stop", STOPS)
def test_a_criterion_equal_to_eps_and_an_eps_of_0_do_not_end_them(stop):
    assert stopped_by(0.1, 0.1, stop, 0.1) is None and stopped_by(0.0, 0.0, stop, 0.0) is None


@penalties
@pytest.mark.parametrize("stop, criterion", [("any", "c1"), ("c2", "c2"), ("all", "c1")])
def test_data_of_the_rank_ends_in_the_first_round(penalty, stop, criterion):
    X = normal(30, 3) @ normal(3, 9, seed=1)
    found = separate(X, Exact(9, 3), penalty=penalty, threshold=Threshold(0.5), stop=stop)
    assert found.rounds == 1 and found.stopped_by == criterion and found.history["c1"][0] < 1e-12
    assert (found.S == 0).all()
    torch.testing.assert_close(found.L, X, atol=1e-12, rtol=0)


def test_histories_are_as_long_as_there_were_rounds():
    X = normal(30, 3) @ normal(3, 9, seed=1) + 0.01 * normal(30, 9, seed=2)
    found = separate(X, Exact(9, 3), penalty="l1", threshold=Threshold(0.02), rounds=50, eps=1e-3)
    assert 1 < found.rounds < 50 and found.stopped_by == "c2"
    assert found.history["c2"][-1] < 1e-3 <= min(found.history["c2"][:-1])
    assert all(len(values) == found.rounds for values in found.history.values())
    assert set(found.history["threshold"]) == {0.02} and found.threshold == 0.02


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds must be >= 1, got 0"):
        separate(normal(4, 3), Exact(3, 1), rounds=0)


def test_training_that_diverges_is_reported():
    net = linear_net(1e30)
    with pytest.raises(ValueError, match="the reconstruction of round 1 is not finite: lower lr"):
        separate(normal(20, 6).float(), net, rounds=3)


def linear_net(lr: float) -> Gradients:
    return Gradients(lambda: Autoencoder((6, 3), output="linear"), epochs=20, lr=lr, batch_size=5, seed=0)


# ----------------------------------------------------------------------------------------------------- threshold


@penalties
@pytest.mark.parametrize("contamination", [0.01, 0.1, 0.37, 0.999])
def test_the_threshold_is_the_quantile_of_the_residual_of_each_round(penalty, contamination):
    X, sizes = normal(30, 7), {"l1": np.abs, "l21_rows": 1, "l21_cols": 0}[penalty]
    step = Watched(Exact(7, 2))
    found = separate(X, step, penalty=penalty, threshold=Threshold(contamination=contamination), rounds=3, eps=0)
    expected = []
    for L in step.L:
        residual = (X - L).numpy()
        values = sizes(residual) if callable(sizes) else np.linalg.norm(residual, axis=sizes)
        expected.append(np.quantile(values, 1 - contamination))
    assert found.history["threshold"] == pytest.approx(expected, rel=1e-12) and len(set(expected)) == 3
    assert found.threshold == found.history["threshold"][-1]


def test_as_many_rows_are_flagged_as_expected_however_many_rounds():
    X = normal(200, 6)
    for contamination, rounds in ((0.05, 1), (0.1, 4), (0.5, 2)):
        found = separate(X, Exact(6, 2), threshold=Threshold(contamination=contamination), rounds=rounds, eps=0)
        assert int((found.S != 0).any(1).sum()) == round(200 * contamination)


def test_a_threshold_of_one_row_is_its_norm():
    residual = torch.tensor([[3.0, 4.0]])
    assert threshold_from_contamination(0.1, residual, PENALTIES["l21_rows"]) == pytest.approx(5.0)


@pytest.mark.parametrize("settings", [{"value": 0}, {"value": -1.0}, {"value": math.nan}])
def test_a_threshold_must_be_positive(settings):
    with pytest.raises(ValueError, match="the threshold must be > 0"):
        Threshold(**settings)


@pytest.mark.parametrize("contamination", [0, 1, -0.1, math.nan])
def test_a_contamination_is_a_share(contamination):
    with pytest.raises(ValueError, match=r"the contamination must lie in \(0, 1\)"):
        Threshold(contamination=contamination)


# ------------------------------------------------------------------------------------------ training by gradients

NETS = {
    "dense": lambda: Autoencoder((12, 6, 3)),
    "tied": lambda: Autoencoder((12, 6, 3), tied=True),
    "conv": lambda: ConvAutoencoder((1, 3, 4), widths=(4,), code=3),
    "vae": lambda: VariationalAutoencoder((12, 6, 3)),
}
nets = pytest.mark.parametrize("make", NETS.values(), ids=list(NETS))


def rows(n: int = 43) -> Tensor:
    """In [0, 1], of rank 2."""
    gen = torch.Generator().manual_seed(0)
    return torch.rand(n, 2, generator=gen) @ torch.rand(2, 12, generator=gen) / 2


def gradients(make: Callable[[], nn.Module] = NETS["dense"], **settings) -> Gradients:
    return Gradients(make, **({"epochs": 4, "lr": 1e-2, "batch_size": 8, "seed": 5} | settings))


@nets
def test_an_infinite_threshold_gives_the_autoencoder_alone(make):
    """rounds x epochs of it, with the same seed: weights and reconstructions bit by bit."""
    X, step, alone = rows(), gradients(make), gradients(make, epochs=12)
    found = separate(X, step, penalty="l21_rows", threshold=Threshold(math.inf), rounds=3, eps=0)
    alone.fit(X)
    assert (found.S == 0).all() and torch.equal(found.L, alone.reconstruct(X))
    assert all(torch.equal(a, b) for a, b in zip(step.net.parameters(), alone.net.parameters(), strict=True))
    assert step.losses[-1] == alone.losses[-1] and len(step.losses) == 3


@nets
@pytest.mark.parametrize("reinit", [False, True])
def test_a_seed_decides_a_run(make, reinit):
    def run(seed: int) -> robust.Separation:
        step = gradients(make, seed=seed, reinit=reinit)
        return separate(rows(), step, penalty="l1", threshold=Threshold(0.05), rounds=3, eps=0)

    torch.manual_seed(1)
    first, state = run(5), torch.get_rng_state()
    torch.manual_seed(2)
    again, other = run(5), run(6)
    assert torch.equal(first.L, again.L) and torch.equal(first.S, again.S) and first.history == again.history
    assert not torch.equal(first.L, other.L)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # Nothing is drawn from global state.


def test_training_is_adam_on_shuffled_batches():
    """The same epochs in plain PyTorch."""
    X, step = rows(), gradients(epochs=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(5, "weights"))
        net = NETS["dense"]()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for epoch in (1, 2, 3):
        gen = torch.Generator().manual_seed(seed_of(5, "order", epoch))
        losses = []
        for index in torch.randperm(len(X), generator=gen).split(8):
            loss = nn.functional.mse_loss(net(X[index]), X[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += [loss.item()] * len(index)
    step.fit(X)
    for mine, theirs in zip(step.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert step.losses == pytest.approx([np.mean(losses)], rel=1e-4)


@nets
def test_training_lowers_the_loss(make):
    step = gradients(make, epochs=60)
    for _ in range(2):
        step.fit(rows())
    assert step.losses[1] < step.losses[0]


def test_reinit_draws_new_weights_in_each_round_and_forgets_adam():
    X = rows()
    step = gradients(reinit=True)
    step.fit(X)
    step.fit(X)
    # Round 2 alone: weights of turn 1, the order of epochs 5 to 8, a fresh optimizer.
    fresh = gradients(reinit=False)
    restart(fresh.net, fresh.optimizer, fresh.make, fresh.seed, 1)
    assert not fresh.optimizer.state
    fresh._rounds = 1
    fresh.fit(X)
    assert all(torch.equal(a, b) for a, b in zip(step.net.parameters(), fresh.net.parameters(), strict=True))


def test_weights_of_turns_differ_and_leave_global_state_alone(monkeypatch):
    """That of GPUs, too, which nothing would bring back."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU is seeded"))
    state = torch.get_rng_state()
    first, again, other, seeded = (draw_weights(NETS["dense"], *key) for key in ((3,), (3, 0), (3, 1), (4,)))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [net.encoder[0].weight for net in (first, again, other, seeded)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[3])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("n", [0, 1, 2, 5, 7, 8, 9, 16, 17])
def test_batches_are_those_of_the_training_loop(n, size):
    order = torch.arange(n)
    found = [part.tolist() for part in batches(order, size)]
    assert found == [part.tolist() for part in _split(order, size)]
    assert sum(found, []) == list(range(n)) and (n < 2 or size < 2 or min(map(len, found)) > 1)


def test_what_a_batch_draws_does_not_depend_on_how_processes_share_it():
    net, X = draw_weights(NETS["vae"], 0), rows(9)
    whole = batch_losses(net, X, 0, 1, 2)
    for own in (torch.tensor([0, 3, 4]), torch.tensor([8, 1])):
        part = batch_losses(net, X[own], 0, 1, 2, own, len(X))
        torch.testing.assert_close(part, whole[own], atol=1e-5, rtol=0)
    for other in ((0, 1, 3), (0, 2, 2), (1, 1, 2)):
        assert not torch.equal(batch_losses(net, X, *other), whole)


def test_float64_is_trained_in_float64():
    X, step = rows().double(), gradients(dtype=torch.float64)
    found = separate(X, step, penalty="l1", threshold=Threshold(0.05), rounds=2, eps=0)
    assert found.L.dtype == found.S.dtype == torch.float64
    assert {p.dtype for p in step.net.parameters()} == {torch.float64}


def test_other_rows_of_any_number_are_reconstructed_in_blocks(monkeypatch):
    step = gradients()
    step.fit(rows())
    expected = step.net(rows(11)).detach()
    monkeypatch.setattr(robust, "_BLOCK", 4)
    found = step.reconstruct(rows(11))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert not found.requires_grad and step.reconstruct(rows(0)).shape == (0, 12)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@nets
def test_a_round_waits_for_a_gpu_once(make, kind):
    """To read the loss, however many steps it has; and nothing of it needs float64."""
    with FakeGpu(kind) as gpu:
        step = gradients(make, device=gpu.device)
        X = rows().to(gpu.device)
        gpu.waits.clear()
        step.fit(X)
        assert len(gpu.waits) == 1 and len(step.losses) == 1
        assert all(on_gpu(p) for p in step.net.parameters())


@penalties
def test_rounds_on_a_gpu(penalty):
    with FakeGpu() as gpu:
        found = separate(rows().to(gpu.device), gradients(device=gpu.device), penalty=penalty, rounds=2, eps=0)
        assert on_gpu(found.L) and on_gpu(found.S)
        L, S = found.L.cpu(), found.S.cpu()
    expected = separate(rows(), gradients(), penalty=penalty, rounds=2, eps=0)
    torch.testing.assert_close(L, expected.L, atol=1e-5, rtol=0)
    torch.testing.assert_close(S, expected.S, atol=1e-5, rtol=0)


def test_the_exact_step_runs_where_there_is_no_float64():
    with FakeGpu("mps") as gpu:
        step = Exact(12, 2)
        found = separate(rows().to(gpu.device), step, penalty="l1", threshold=Threshold(0.05), rounds=2)
        assert on_gpu(found.L) and found.rounds == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@nets
def test_a_real_gpu_trains_as_the_cpu_does(make):
    X = rows()
    found = [
        separate(X.to(device), gradients(make, device=torch.device(device)), threshold=Threshold(0.3), rounds=2, eps=0)
        for device in ("cpu", "cuda")
    ]
    if make is not NETS["vae"]:  # Its draws are another generator's.
        torch.testing.assert_close(found[1].L.cpu(), found[0].L, atol=1e-3, rtol=0)
    assert found[1].rounds == 2
