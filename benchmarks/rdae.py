"""Robust autoencoders against the published formulation and plain PyTorch: `python -m benchmarks.rdae`.

Results are compared first, then all sides alternate; medians. `loader`: our network and our S-step in plain PyTorch, a
shuffled DataLoader and torch's Adam. `slides`: the published program's loops over entries or columns, its loader that
does not shuffle, its copies to the device and its network with a ReLU after every layer; a plot after each training is
left out. The loop over entries is timed on a part of them, and scaled. The last table: what a step of ours needs, and
what its parts take by themselves.

Letters: N images, n pixels, B images of a batch.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ceilings import Ceilings
from benchmarks.compare import distance, timed
from common.device import device_name, pick_device, reuse_host_memory
from common.errors import UserError, command
from common.seed import generator
from models.autoencoder.networks import Autoencoder
from models.autoencoder.robust import Gradients, Penalty, adam, draw_weights, end_round, reconstruct
from models.sparse.prox import soft, soft_group
from scripts.results import markdown

# Bytes that Adam reads and writes of each weight in a step: weight, two moments, and the gradient, which it only reads.
_ADAM_BYTES = 7 * 4


@dataclass(frozen=True)
class Size:
    """A round: `epochs` over (images, layers[0]) entries in batches."""

    images: int = 5124
    layers: tuple[int, ...] = (784, 625, 400, 225, 100)
    batch: int = 133
    epochs: int = 10
    lr: float = 1e-3

    @property
    def steps(self) -> int:
        return self.epochs * -(-self.images // self.batch)

    def data(self, device: torch.device) -> Tensor:
        """Roughly as digits have it: a fifth of the entries is lit, of some columns more than of others."""
        draws = torch.rand(self.images, self.layers[0], generator=generator(0, "benchmark rdae"))
        lit = torch.linspace(0, 0.4, self.layers[0])
        return ((draws - 1 + lit) / lit.clamp_min(0.01)).clamp(0, 1).to(device)


# ---------------------------------------------------------------------------------------- the published formulation


def entry_loop(v: Tensor, t: float) -> Tensor:
    """The proximal operator of t |s|_1, entry by entry."""
    s = v.flatten().clone()
    for i in range(len(s)):
        if s[i] > t:
            s[i] = s[i] - t
        elif s[i] < -t:
            s[i] = s[i] + t
        else:
            s[i] = 0
    return s.view_as(v)


def column_loop(v: Tensor, t: float) -> Tensor:
    """The proximal operator of t times the sum of the columns' norms, column by column."""
    s, norms = torch.zeros_like(v), v.norm(dim=0)
    for i in range(v.shape[1]):
        if norms[i] > t:
            s[:, i] = v[:, i] - t * v[:, i] / norms[i]
    return s


def slides_net(layers: Sequence[int]) -> nn.Sequential:
    """A ReLU after every layer, the code and the output included."""
    sizes = [*layers, *reversed(layers[:-1])]
    pairs = zip(sizes, sizes[1:], strict=False)
    return nn.Sequential(*(part for i, o in pairs for part in (nn.Linear(i, o), nn.ReLU())))


def slides_training(net: nn.Module, rows: Tensor, size: Size) -> list[Tensor]:
    """`epochs` of Adam without shuffling, each batch moved and converted; the losses of all steps."""
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=size.lr), []
    loader: Any = DataLoader(rows, batch_size=size.batch, shuffle=False)  # type: ignore[arg-type]
    for _ in range(size.epochs):
        for batch in loader:
            batch = batch.to(rows.device).view(-1, size.layers[0]).float()
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(batch, net(batch))
            loss.backward()
            optimizer.step()
            losses.append(loss)
    return losses


def loader_training(net: nn.Module, rows: Tensor, size: Size, orders: Sequence[Sequence[int]] = ()) -> None:
    """`epochs` of Adam as PyTorch's tutorials have them; orders: of the rows in each epoch, in place of shuffling."""
    optimizer = torch.optim.Adam(net.parameters(), lr=size.lr)
    how: list[dict[str, Any]] = [{"sampler": order} for order in orders] or [{"shuffle": True}] * size.epochs
    for epoch in how:
        loader: Any = DataLoader(rows, batch_size=size.batch, **epoch)  # type: ignore[arg-type]
        for batch in loader:
            loss = nn.functional.mse_loss(net(batch), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


# ------------------------------------------------------------------------------------------------------- equal results


def check(size: Size, device: torch.device) -> str:
    """Raises: AssertionError unless all sides give the same; returns how far they are apart."""
    rows = size.data(device)
    v, few = rows - 0.5, (rows - 0.5)[:4]
    assert torch.equal(soft(few, 0.3), entry_loop(few, 0.3)), "soft differs from the loop over entries"
    t = _threshold(v)
    found = distance(soft_group(v, t, 0), column_loop(v, t))
    assert found < 1e-5, f"soft_group differs from the loop over columns by {found:.1e}"

    ours = gradients(size, device)
    net = copy.deepcopy(ours.net)
    ours.fit(rows)
    gens = (generator(ours.seed, "order", epoch) for epoch in range(1, size.epochs + 1))
    loader_training(net, rows, size, [torch.randperm(size.images, generator=gen).tolist() for gen in gens])
    trained = distance(weights(ours.net), weights(net))
    assert trained < 1e-3, f"weights differ from those of the loader by {trained:.1e}"

    slides = slides_net(size.layers).to(device)
    other = copy.deepcopy(slides)
    slides_training(slides, rows, size)
    loader_training(other, rows, size, [range(size.images)] * size.epochs)
    unshuffled = distance(weights(other), weights(slides))
    assert unshuffled < 1e-3, f"weights differ from those of the slides by {unshuffled:.1e}"
    return f"weights after training differ by {trained:.1e} from the loader's, columns by {found:.1e} from the loop's"


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def gradients(size: Size, device: torch.device) -> Gradients:
    make = partial(Autoencoder, size.layers)
    return Gradients(make, epochs=size.epochs, lr=size.lr, batch_size=size.batch, seed=0, device=device)


# -------------------------------------------------------------------------------------------------------------- sides


@dataclass(frozen=True)
class Clock:
    """Seconds of a call. of_process: those that this process computed, in all threads, not those that passed."""

    device: torch.device
    of_process: bool = False

    def __call__(self, run: Callable[[], Any]) -> float:
        if not self.of_process:
            return timed(run, self.device)
        begun = time.process_time()
        run()
        return time.process_time() - begun

    def alternate(self, sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
        """Medians of all sides, in turns, after one call of each that is not counted."""
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(repeats + 1):
            for name, run in sides.items():
                seconds = self(run)
                if turn:
                    times[name].append(seconds)
        return {name: statistics.median(found) for name, found in times.items()}


def operators(size: Size, clock: Clock, repeats: int, entries: int) -> dict[str, tuple[float, float]]:
    """Seconds of each proximal operator, ours and by its loop; that over entries is timed on `entries` of them."""
    v = size.data(clock.device) - 0.5
    few, t = v.flatten()[:entries], _threshold(v)
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "entries": (lambda: soft(v, 0.3), lambda: entry_loop(few, 0.3)),
        "columns": (lambda: soft_group(v, t, 0), lambda: column_loop(v, t)),
        "rows": (lambda: soft_group(v, t, 1), lambda: column_loop(v.T, t).T),
    }
    found = {}
    for name, (ours, loop) in pairs.items():
        seconds = clock.alternate({"ours": ours, "loop": loop}, repeats)
        found[name] = seconds["ours"], seconds["loop"] * (v.numel() / len(few) if name == "entries" else 1)
    return found


def _threshold(v: Tensor) -> float:
    """Some columns' norms lie above."""
    return float(v.norm(dim=0).median())


def rounds(size: Size, clock: Clock, repeats: int) -> dict[str, float]:
    """Seconds of the training of a round by each side, from new weights, and of L and the criteria after it."""
    rows, device = size.data(clock.device), clock.device
    make, trained = partial(Autoencoder, size.layers), draw_weights(partial(Autoencoder, size.layers), 0).to(device)

    def rest() -> None:
        end_round(rows, reconstruct(trained, rows), rows, Penalty(lambda v, t: v, torch.abs), 0.0)

    return clock.alternate(
        {
            "ours": lambda: gradients(size, device).fit(rows),
            "loader": lambda: loader_training(draw_weights(make, 0).to(device), rows, size),
            "slides": lambda: slides_training(slides_net(size.layers).to(device), rows, size),
            "rest": rest,
        },
        repeats,
    )


# ------------------------------------------------------------------------------------------------ what bounds a step


def step_parts(size: Size, clock: Clock, repeats: int) -> dict[str, float]:
    """Seconds of one step of ours, and of parts of it by themselves; of torch's Adam and of the loader beside."""
    data = size.data(clock.device)
    rows, net = data[: size.batch], draw_weights(partial(Autoencoder, size.layers), 0).to(clock.device)
    fused, plain = adam(net, size.lr), torch.optim.Adam(net.parameters(), lr=size.lr)

    def passes() -> None:
        fused.zero_grad()
        net.losses(rows).mean().backward()  # type: ignore[operator]

    def step() -> None:
        passes()
        fused.step()

    def load() -> None:
        for _ in DataLoader(data, batch_size=size.batch, shuffle=True):  # type: ignore[arg-type,var-annotated]
            pass

    passes()
    sides: dict[str, Callable[[], Any]] = {
        "products": products(size, clock.device),
        "passes": passes,
        "adam": fused.step,
        "step": step,
        "torch's adam": plain.step,
    }
    per_step = clock.alternate({"loader": load}, max(1, repeats // 10))["loader"] * size.epochs / size.steps
    return clock.alternate(sides, repeats) | {"loader": per_step}


def products(size: Size, device: torch.device) -> Callable[[], None]:
    """The matrix products of a step, forward and backward, and nothing else; into memory that is there."""
    sizes = [*size.layers, *reversed(size.layers[:-1])]
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    for depth, (i, o) in enumerate(zip(sizes, sizes[1:], strict=False)):
        x, w, g = (torch.rand(*shape, device=device) for shape in ((size.batch, i), (o, i), (size.batch, o)))
        calls += [(x, w.T, torch.empty_like(g)), (g.T, x, torch.empty_like(w))]
        if depth:  # The input has no gradient.
            calls.append((g, w, torch.empty_like(x)))

    def run() -> None:
        for a, b, out in calls:
            torch.mm(a, b, out=out)

    return run


def operations(size: Size) -> int:
    """Of the products of a step."""
    with FlopCounterMode(display=False) as counter:
        products(size, torch.device("cpu"))()
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------------------------------- tables


def operator_table(found: dict[str, tuple[float, float]]) -> str:
    rows = [[name, _time(ours), _time(loop), f"{loop / ours:.0f}"] for name, (ours, loop) in found.items()]
    return markdown(["proximal operator", "ours", "loop", "ratio"], rows)


def round_table(size: Size, found: dict[str, float], prox: dict[str, tuple[float, float]]) -> str:
    rows, seen = [], size.images * size.epochs
    for name in ("ours", "loader", "slides"):
        row = [name, _time(found[name]), f"{seen / found[name]:.0f}", f"{found[name] / found['ours']:.2f}"]
        for penalty in ("entries", "columns"):
            whole, ours = (found[side] + found["rest"] + prox[penalty][side == "slides"] for side in (name, "ours"))
            row += [_time(whole), f"{whole / ours:.2f}"]
        rows.append(row)
    header = ["a round", f"training, {size.epochs} epochs", "images/s", "ratio"]
    return markdown([*header, "whole, S by entries", "ratio", "whole, S by columns", "ratio"], rows)


def step_table(size: Size, takes: dict[str, float], limits: Ceilings) -> str:
    needed, moved = operations(size), _ADAM_BYTES * sum(p.numel() for p in Autoencoder(size.layers).parameters())
    at_best = {"products": needed / limits.product, "adam": moved / limits.copy}
    at_best["step"] = sum(at_best.values())
    needs = {"products": f"{needed / size.batch / 1e6:.1f} MFLOP an image", "adam": f"{moved / 1e6:.1f} MB"}
    names = {
        "products": "matrix products",
        "passes": "forward and backward pass",
        "adam": "Adam, fused",
        "step": "a step of ours",
        "torch's adam": "Adam as torch has it by default",
        "loader": "the loader",
    }
    rows = [
        [text, needs.get(name, ""), _time(at_best[name]) if name in at_best else "", _time(takes[name])]
        for name, text in names.items()
    ]
    return markdown(["of a step", "needs", "at the machine's ceilings", "takes"], rows)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rdae", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--images", type=int, default=Size.images)
    parser.add_argument("--layers", type=int, nargs="+", default=list(Size.layers), help="sizes, the input's first")
    parser.add_argument("--batch_size", type=int, default=Size.batch)
    parser.add_argument("--epochs", type=int, default=Size.epochs, help="of a round")
    parser.add_argument("--entries", type=int, default=20_000, help="of the data that the loop over entries sees")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each side; ten times as many of steps")
    parser.add_argument("--process_time", action="store_true", help="CPU seconds: on a machine that others use, too")
    parser.add_argument("--keep_memory", action="store_true", help="the memory policy of train.py, for all sides")
    args = parser.parse_args(argv)
    if min(args.threads, args.batch_size, args.epochs, args.entries, args.repeats, *args.layers) < 1:
        raise UserError("--threads, --batch_size, --epochs, --entries, --repeats and --layers must be > 0")
    if args.images < 4 or len(args.layers) < 2:
        raise UserError("--images must be > 3, and --layers needs two sizes at least")
    device = pick_device(args.device)
    if args.process_time and device.type != "cpu":
        raise UserError("--process_time: a GPU's work is not in it; leave it out")
    torch.set_num_threads(args.threads)
    if args.keep_memory:
        reuse_host_memory()
    size = Size(args.images, tuple(args.layers), args.batch_size, args.epochs)
    limits, clock = Ceilings.of(device), Clock(device, args.process_time)
    print(f"{device_name(device)}, torch {torch.__version__}: {limits}")
    print(f"{size.images} images, {'-'.join(map(str, size.layers))}, batch {size.batch}, {args.threads} thread(s)")
    print(check(replace(size, epochs=min(size.epochs, 2)), device), flush=True)
    prox = operators(size, clock, args.repeats, args.entries)
    print(operator_table(prox), flush=True)
    print(round_table(size, rounds(size, clock, args.repeats), prox), flush=True)
    print(step_table(size, step_parts(size, clock, 10 * args.repeats), limits), end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
