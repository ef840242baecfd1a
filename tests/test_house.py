"""Can another system move in? A small mode of each coming kind: rows of the tables, and no change to the loop, to the
evaluators or to `common/`."""

import contextlib
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.dist import SINGLE
from common.flags import RunSpec, parse
from common.flags import build_parser as parser
from datasets import Loading
from datasets.sets import floats
from evals.classify import Condition, classify, worst_case
from evals.trained import Trained
from models.checkpoint import find_weights, load_net
from models.insert import insert_before_activations
from program import SPECS
from tests.conftest import TINY
from train import train
from training import COMMON, Mode
from training.launch import Job, Script
from training.recipe import EpochEnd, Recipe, Step


def run(mode: Mode, logs, *more: str) -> tuple[Job, Recipe, list[dict]]:
    """Carry a mode out by the training script; its recipe, and what it recorded."""
    made = []
    rows = {"toy": Mode(lambda *args: made.append(mode.build(*args)) or made[-1], mode.specs, mode.name)}
    args = [a for a in TINY if a not in ("--one_class_idx", "3")]
    train(
        [*args, "--mode", "toy", "--log_root", str(logs), "--device", "cpu", *more],
        script := Script("toy.py", rows, "toy", "last.model", "last.resume"),
    )
    (folder,) = logs.iterdir()
    recorded = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    flags = parse([*args, "--mode", "toy", *more], parser("toy.py", rows, "toy", SPECS))
    return Job(script, flags, rows["toy"], folder, {}), made[-1], recorded


def toy(build) -> Mode:
    return Mode(build, COMMON, lambda flags: ["toy"])


# ------------------------------------------------------------- (a) alternating with a proximal step, until converged


_STILL = 0.01


def robust(flags, split, world=SINGLE) -> Recipe:
    """x = L + S: L from a linear autoencoder, S sparse, a buffer by image; S <- soft(x - L) after every epoch."""
    data = split.train(channels=1)
    pixels = floats(data.images).flatten(1)
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 64))
    model.register_buffer("sparse", torch.zeros_like(pixels))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def low_rank(x):
        return model[1](model[0](x))

    def losses(batch) -> Step:
        clean = floats(batch.local_images[0]).flatten(1) - model.sparse[batch.index]
        return Step({"fit": (low_rank(clean) - clean).square().mean()}, {})

    def end_epoch(epoch) -> EpochEnd:
        with torch.no_grad():
            residual = pixels - low_rank(pixels - model.sparse)
            sparse = F.softshrink(residual, 0.2)
            change = float((sparse - model.sparse).norm() / pixels.norm())
            model.sparse.copy_(sparse)
        return EpochEnd({"sparse/change": change}, converged=change < _STILL)

    loading = Loading(flip=False, channels=1)
    return Recipe(model, data, losses, (optimizer,), loading=loading, end_epoch=end_epoch)


def test_a_mode_that_alternates_with_a_proximal_step_stops_when_it_has_converged(tmp_path, capsys):
    job, recipe, rows = run(toy(robust), tmp_path, "--epochs", "200", "--batch_size", "256")
    assert 2 < len(rows) < 200 and rows[-1]["sparse/change"] < _STILL <= rows[-2]["sparse/change"]
    state = torch.load(job.folder / "last.model", weights_only=True)
    assert torch.equal(state["sparse"], recipe.model.sparse) and 0 < (state["sparse"] != 0).float().mean() < 0.5
    assert "converged" in capsys.readouterr().out
    train([*TINY[:-2], "--mode", "toy", "--log_root", str(tmp_path), "--device", "cpu", "--epochs", "200",
           "--batch_size", "256"], job.script)  # fmt: skip
    assert "is finished" in capsys.readouterr().out


# --------------------------------------------------------------------------- (b) weights projected after each step


def projected(flags, split, world=SINGLE) -> Recipe:
    """A linear classifier whose rows have unit norm."""
    data = split.train()
    model = nn.Linear(3 * 64, split.n_classes)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    norms = []

    def losses(batch) -> Step:
        logits = model(floats(batch.local_images[0]).flatten(1))
        return Step({"cls": F.cross_entropy(logits, batch.labels)}, {})

    def after_step() -> None:
        with torch.no_grad():
            model.weight.copy_(F.normalize(model.weight, dim=1))
        norms.append(float(model.weight.norm(dim=1).sub(1).abs().max()))

    end = lambda epoch: EpochEnd({"worst": max(norms)})  # noqa: E731
    return Recipe(model, data, losses, (optimizer,), lambda e: 0.5, after_step=after_step, end_epoch=end)


def test_a_mode_projects_its_weights_after_each_step(tmp_path):
    _, recipe, rows = run(toy(projected), tmp_path, "--epochs", "3")
    assert [row["worst"] < 1e-6 for row in rows] == [True] * 3 and rows[2]["train/loss_cls"] < rows[0]["train/loss_cls"]


# ----------------------------------------------- (c) an attack inside the loss, judged by the worst of two conditions


def attack(net, images, labels, generator=None, *, eps=0.05):
    images = images.detach().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(net(images.flatten(1)), labels), images)
    return (images + eps * grad.sign()).clamp(0, 1).detach()


def adversarial(flags, split, world=SINGLE, *, eps=0.1) -> Recipe:
    data = split.train()
    with torch.random.fork_rng():
        torch.manual_seed(flags.of(RunSpec).seed)
        model = nn.Sequential(nn.Linear(3 * 64, 32), nn.ReLU(), nn.Linear(32, split.n_classes))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def losses(batch) -> Step:
        images = attack(model, floats(batch.local_images[0]), batch.labels, eps=eps)
        return Step({"robust": F.cross_entropy(model(images.flatten(1)), batch.labels)}, {})

    return Recipe(model, data, losses, (optimizer,), lambda epoch: 3e-3, Loading(flip=False))


def test_a_mode_attacks_in_its_loss_and_is_judged_by_the_worst_of_two_conditions(tmp_path):
    found = {}
    for eps in (0.0, 0.05):
        job, recipe, _ = run(toy(partial(adversarial, eps=eps)), tmp_path / str(eps), "--epochs", "40")
        from training.launch import read_split

        trained = Trained.of(recipe.model, job.flags, read_split(job.flags, SINGLE))
        conditions = [Condition(), Condition("fgsm", attack)]
        results = classify(
            trained, predict=lambda net, x: net(x.flatten(1)), conditions=conditions, summarise=worst_case
        )
        found[eps] = {result.name: result.metrics["accuracy"] for result in results}
    for accuracy in found.values():
        assert accuracy["worst_case"] <= min(accuracy["clean"], accuracy["fgsm"])
    assert found[0.05]["worst_case"] > found[0.0]["worst_case"] + 0.05 and found[0.0]["clean"] > 0.7


# --------------------------------------- (d) trains nothing: an operator before every activation of a trained network


class Counting(nn.Module):
    """Remembers the mean of what goes through it, and lets it pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.collecting = False

    def forward(self, x):
        if self.collecting:
            self.mean.copy_(x.detach().mean())
        return x


def counting(flags, split, world=SINGLE, *, start) -> Recipe:
    state = torch.load(find_weights(str(start), ("last.model",), flag="resume_path"), weights_only=True)
    net = load_net("feature", state, model="resnet8", path=start, flag="resume_path", n_shifts=None)
    data, net = split.train(), insert_before_activations(net.eval(), lambda name: Counting())

    def begin(run) -> None:
        operators = [module for module in net.modules() if isinstance(module, Counting)]
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for operator in operators:
                operator.collecting = True
                stack.callback(setattr, operator, "collecting", False)
            net(floats(data.images[:64]))
        run.say(f"{len(operators)} operators")

    return Recipe(net, data, lambda batch: Step({}, {}), begin=begin)


def test_a_mode_that_trains_nothing_collects_statistics_in_zero_epochs(stage1, tmp_path, capsys):
    job, recipe, rows = run(toy(partial(counting, start=stage1)), tmp_path, "--epochs", "0")
    state = torch.load(job.folder / "last.model", weights_only=True)
    means = {key: value for key, value in state.items() if key.endswith(".0.mean")}
    assert rows == [] and len(means) == 8 and all(value != 0 for value in means.values())
    start = torch.load(stage1 / "last.model", weights_only=True)
    assert all(torch.equal(state[key], value) for key, value in start.items())  # published keys, unchanged
    plain = load_net("feature", start, model="resnet8", path=stage1, flag="resume_path", n_shifts=None).eval()
    images = torch.rand(4, 3, 8, 8)
    assert torch.equal(recipe.model.eval()(images).h, plain(images).h)


def test_a_mode_that_trains_needs_an_epoch(tmp_path):
    from train import main

    assert main([*TINY, "--mode", "simclr", "--epochs", "0", "--log_root", str(tmp_path)]) == 2
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="activation"):
        insert_before_activations(nn.Linear(2, 2), lambda name: nn.Identity())
