"""Detectors under attack: against linear scores whose attacked values are known, finite differences, and loops."""

import csv
import json
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import eval as evaluate
import evals.extract as extract
from common.attacks.specs import radius_text
from common.dist import SINGLE
from common.dist import World as RealWorld
from datasets.augment import AlignedSpec
from datasets.sets import image_set
from datasets.shifts import ShiftSpec, rotations_and_translations
from datasets.views import DrawSpec
from evals import EVALS
from evals.attacked import ATTACKS, SIDES, Attacker, Chosen, Plan, attack_detector
from evals.coding import Coder, FittedDictionaries, Outputs, TrainedDictionaries
from evals.extract import (
    Extraction,
    Part,
    autoencoder_outputs,
    class_outputs,
    cocsr_outputs,
    feature_outputs,
    net_outputs,
)
from evals.scores import (
    SCORES,
    CsiSparseScore,
    LabelScore,
    MarginalizedLabelScore,
    NearestScore,
    OneClassSvmScore,
    ReconstructionScore,
    Scorer,
    TransformationScore,
    fit_csi,
)
from models.autoencoder.networks import AutoencoderSpec
from models.checkpoint import build_net
from models.feature_net import CocsrNet, FeatureTransform
from models.mode import frozen
from models.sparse.dictionary import CodingSpec, DictionaryBank
from tests.evals.test_trained import trained_of
from tests.test_commands import refused

IDENTITY = ShiftSpec("none").functions()
ROTATIONS = ShiftSpec("rotation").functions()
MIXED = ShiftSpec("rot_bmix", 0.2).functions()


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 7, *, grey: bool = False, seed: int = 0):
    pixels = torch.randint(0, 256, (n, 1 if grey else 3, 8, 8), dtype=torch.uint8, generator=gen(seed))
    return image_set(pixels.expand(-1, 3, -1, -1).contiguous(), torch.arange(n) % 3)


def features(seed: int = 0):
    return build_net("feature", "resnet8", n_classes=2, simclr_dim=6, n_shifts=4, seed=seed).eval()


def attacker_of(read, scorer: Scorer, draws: DrawSpec, *, net=None, coder=None, samples=1, runs=1, world=SINGLE):
    net = net or nn.Identity()
    extraction = Extraction(net, read, coder or Coder(), None, draws, samples, scorer.needs, world)
    return Attacker(extraction, scorer, None, runs, 0)


def plan(*attacks: str, **more) -> Plan:
    settings = {"epsilon": 0.1, "steps": 10, "runs": 1, "images": None, "seed": 0} | more
    radii = tuple(sorted({*settings.pop("radii", ()), settings["epsilon"]}))
    return Plan(attacks=attacks or ("pgd",), radii=radii, **settings)


def chosen(data, n=None) -> Chosen:
    return Chosen.of("digits", data, data.labels == 0, lambda label: f"one_class_{label}", n=n, seed=0)


# -------------------------------------------------------------------------------------------- what is known exactly


@dataclass(frozen=True)
class LinearScore(Scorer):
    """<w, x>."""

    weight: Tensor

    needs = frozenset({"x"})

    def __call__(self, outputs: Outputs) -> Tensor:
        return outputs["x"][:, 0] @ self.weight


def pixels_as_they_are(views: Tensor) -> Outputs:
    return {"x": views.flatten(2)}


def by_pairs(normal, anomalous) -> float:
    return float(np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a in normal for b in anomalous]))


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_a_linear_score_falls_and_rises_by_what_is_known(name):
    data = images(24)
    weight = torch.randn(192, generator=gen(1))
    attacker = attacker_of(pixels_as_they_are, LinearScore(weight), DrawSpec(IDENTITY, None, 0, batch_size=5))
    x, normal = data.images.flatten(1).float() / 255, (data.labels == 0).numpy()
    clean = (x @ weight).numpy()
    eps = 0.03
    down, up = ((x + sign * eps * weight.sign()).clamp(0, 1) @ weight for sign in (-1, 1))
    pushed = np.where(normal, down.numpy(), up.numpy())
    found = attack_detector(plan(name, epsilon=eps, steps=30), attacker, [chosen(data)])
    np.testing.assert_allclose(found.columns["digits"]["attacked"], pushed, atol=1e-4)
    classes = [(data.labels == c).numpy() for c in (1, 2)]
    expected = {
        "clean": np.mean([by_pairs(clean[normal], clean[c]) for c in classes]),
        "normal": np.mean([by_pairs(pushed[normal], clean[c]) for c in classes]),
        "anomalous": np.mean([by_pairs(clean[normal], pushed[c]) for c in classes]),
        "both": np.mean([by_pairs(pushed[normal], pushed[c]) for c in classes]),
    }
    assert found.metrics == pytest.approx({f"attacked/{side}": value for side, value in expected.items()}, abs=1e-12)
    assert 0 < expected["both"] < expected["normal"] < expected["clean"] < 1
    (row,) = found.facts["curve"]
    of_classes = {f"one_class_{c}": by_pairs(pushed[normal], pushed[which]) for c, which in enumerate(classes, 1)}
    assert row["both"]["auroc"] == pytest.approx(of_classes, abs=1e-12)
    assert row["both"]["pooled"] == pytest.approx(by_pairs(pushed[normal], pushed[~normal]), abs=1e-12)
    # One step from the image itself reaches it, too, and at eps 1 nothing is left: no sign.
    assert not any(sign["shows"] for sign in found.facts["health"]) and "MASKED" not in found.facts["health_line"]


# ---------------------------------------------------------------------------------------- against finite differences


def random_outputs(seed: int, n: int = 9, shifts: int = 4) -> Outputs:
    shapes = {"z": (n, shifts, 6), "shift": (n, shifts, shifts), "h": (n, shifts, 64)}
    found = {name: torch.randn(shape, generator=gen(seed), dtype=torch.float64) for name, shape in shapes.items()}
    return {**found, "shift": found["shift"] + 2}


def dictionaries(net) -> DictionaryBank:
    bank = DictionaryBank(4, 64, 9, CodingSpec(0.005, 1.0, 40), gen(1)).double()
    return bank.requires_grad_(False)


def csi(**more):
    net = features().double()
    scorer = fit_csi(random_outputs(0))
    return attacker_of(net_outputs(net), scorer, DrawSpec(ROTATIONS, AlignedSpec(), 3), net=net, **more)


def csi_sr():
    net = features().double()
    model = CocsrNet(net, dictionaries(net), FeatureTransform(invert_sr_feature_norm=True)).eval()
    scorer = CsiSparseScore(*(torch.rand(4, generator=gen(i), dtype=torch.float64) for i in (0, 1)))
    coder = TrainedDictionaries(model.sr_nets)
    draws = DrawSpec(ROTATIONS, AlignedSpec(), 3)
    return attacker_of(cocsr_outputs(model), scorer, draws, net=model, coder=coder, samples=2)


def multi_sr():
    net = features().double()
    coder = FittedDictionaries(dictionaries(net), FeatureTransform())
    scorer = CsiSparseScore(*(torch.rand(4, generator=gen(i), dtype=torch.float64) for i in (0, 1)))
    return attacker_of(net_outputs(net), scorer, DrawSpec(ROTATIONS, AlignedSpec(), 3), net=net, coder=coder)


def rot_trans():
    net = build_net("rot_trans", "resnet8", seed=0).eval().double()
    draws = DrawSpec(rotations_and_translations(), None, 0)
    return attacker_of(net_outputs(net), TransformationScore(), draws, net=net)


def on_features(scorer: Scorer):
    net = features().double()
    return attacker_of(feature_outputs(net), scorer, DrawSpec(ROTATIONS, AlignedSpec(), 3), net=net)


def unit_features(n: int = 12) -> Tensor:
    """Of images, so that none of them is far from those that are attacked."""
    found = attacker_of(feature_outputs(features().double()), LabelScore(), DrawSpec(IDENTITY, None, 3)).extraction
    data = images(n, seed=5)
    with torch.no_grad():
        h = found.read(data.batch(torch.arange(n)).double()[:, None])["h"][:, 0]
    return nn.functional.normalize(h, dim=1)


def classes(scorer: Scorer):
    net = features().double()
    return attacker_of(class_outputs(net), scorer, DrawSpec(ROTATIONS, None, 3), net=net)


def reconstruction():
    autoencoder = build_net("autoencoder", "dense", spec=AutoencoderSpec(layers=(9, 4)), seed=0, **AUTOENCODER)
    return attacker_of(
        autoencoder_outputs(autoencoder.double()), ReconstructionScore(), DrawSpec(IDENTITY, None, 0), net=autoencoder
    )


AUTOENCODER = {"rows": 0, "features": 192, "shape": (3, 8, 8)}

DETECTORS = {
    "CSI": csi,
    "CSI, two runs of two samples": lambda: csi(samples=2, runs=2),
    "CSI, a mix partner": lambda: replace(
        csi(), extraction=replace(csi().extraction, draws=DrawSpec(MIXED[1:], AlignedSpec(), 3))
    ),
    "CSI_sr": csi_sr,
    "multi_sr": multi_sr,
    "rot_trans": rot_trans,
    "knn": lambda: on_features(NearestScore.of(unit_features(), 3)),
    "ocsvm": lambda: on_features(OneClassSvmScore.of(unit_features())),
    "baseline": lambda: classes(LabelScore()),
    "baseline_marginalized": lambda: classes(MarginalizedLabelScore()),
    "reconstruction": reconstruction,
}


WITH_SMOOTH_FORM = [name for name in DETECTORS if name.startswith(("CSI,", "rot", "knn", "base")) or name == "CSI"]


@pytest.mark.parametrize(
    "name, attack", [*((name, "pgd") for name in DETECTORS), *((name, "pgd_smooth") for name in WITH_SMOOTH_FORM)]
)
def test_the_gradient_of_a_score_is_that_of_finite_differences(name, attack):
    """Of the loss as a whole, in float64: views, network, averages, codes and score."""
    attacker, data = DETECTORS[name](), images()
    assert attack == "pgd" or type(attacker.scorer).smooth is not Scorer.smooth
    index, direction = torch.tensor([1, 4, 6]), torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    x = (data.batch(index).double() * 0.98 + 0.01).requires_grad_()
    with frozen(attacker.extraction.net):
        value = attacker.loss(data, ATTACKS[attack])(x, index, direction)
        assert value.dtype == torch.float64 and value.shape == (3,)
        (grad,) = torch.autograd.grad(value.sum(), x)
        assert all(p.grad is None for p in attacker.extraction.net.parameters())
        for seed in (0, 1):
            v = torch.randn(x.shape, generator=gen(seed), dtype=torch.float64)
            h = 1e-7
            with torch.no_grad():
                above, below = (attacker.loss(data, ATTACKS[attack])(x + s * v, index, direction) for s in (h, -h))
            slope = (grad * v).flatten(1).sum(1)
            torch.testing.assert_close((above - below) / (2 * h), slope, rtol=1e-4, atol=1e-6 * float(grad.norm()))


@pytest.mark.parametrize("name", ["CSI, two runs of two samples", "CSI_sr", "multi_sr", "rot_trans"])
def test_what_is_attacked_is_what_is_judged(name):
    """With the draws of the judge the attacker would see its scores to the bit."""
    attacker, data, index = DETECTORS[name](), images(), torch.tensor([1, 4, 6])
    part = Part(index, data.batch(index).double())
    (outputs,) = attacker.extraction.blocks(data, "test", None, [part])
    with torch.no_grad():
        again = attacker.extraction.run(data, 0, None, part)
    assert set(outputs) == set(again) == attacker.scorer.needs
    assert all(torch.equal(outputs[name], again[name]) for name in again)
    assert torch.equal(attacker.scorer(outputs), attacker.scorer(again))


# ----------------------------------------------------------------------------------------------------------- draws


@pytest.fixture
def drawn(monkeypatch):
    """The numbers of draws, in order."""
    seen, real = [], extract.draw_set
    monkeypatch.setattr(extract, "draw_set", lambda images, spec, t: (seen.append(t), real(images, spec, t))[1])
    return seen


@pytest.mark.parametrize("attack, fresh", [("pgd", True), ("apgd", False)])
def test_an_attacker_has_draws_of_its_own_and_the_judge_those_of_the_procedure(attack, fresh, drawn):
    attacker, data = float_csi(samples=2, runs=2), images()
    found = attacker.attacked(chosen(data, 1), ATTACKS[attack], 0.1, 3, "test")
    calls = [drawn[i : i + 4] for i in range(0, len(drawn), 4)]
    assert len(calls) >= 3 and min(map(min, calls)) > 10**6
    assert all(call == list(range(call[0], call[0] + 4)) for call in calls)
    # Two batches of one image, which see the same draws.
    assert len(set(map(tuple, calls))) == (len(calls) / 2 if fresh else 1)
    drawn.clear()
    attacker.judge(chosen(data, 1), found)
    assert drawn == [0, 1]


def test_to_some_the_draws_of_the_procedure_are_known_and_they_do_more_harm(drawn):
    attacker, data = float_csi(samples=2, runs=2), images(12)
    of, scores = chosen(data), {}
    for name in ("pgd", "pgd_known"):
        drawn.clear()
        parts = attacker.attacked(of, ATTACKS[name], 0.03, 8, "test")
        assert (set(drawn) == {0, 1}) == (name == "pgd_known")
        scores[name] = attacker.judge(of, parts)
    gain = of.direction.numpy() * (scores["pgd_known"] - scores["pgd"])
    assert gain.mean() > 0 and (gain > 0).mean() > 0.6


def float_csi(**more):
    net = features()
    scorer = fit_csi({name: value.float() for name, value in random_outputs(0).items()})
    return attacker_of(net_outputs(net), scorer, DrawSpec(ROTATIONS, AlignedSpec(), 3, batch_size=4), net=net, **more)


def test_an_attack_is_of_each_image_for_itself_whatever_batches_and_ranks():
    """And its network has the mode and the gradients it had."""
    attacker, data = float_csi(), images()
    net = attacker.extraction.net.train()
    of, eps = chosen(data), 0.1
    (one, two) = attacker.attacked(of, ATTACKS["pgd"], eps, 3, "test")
    assert all(module.training for module in net.modules()) and all(p.requires_grad for p in net.parameters())
    assert all(p.grad is None for p in net.parameters())
    both = torch.cat([one.pixels, two.pixels])
    x = data.batch(torch.arange(7))
    assert (both - x).abs().max() <= eps + 1e-6 and 0 <= both.min() and both.max() <= 1
    alone = replace(attacker.extraction, draws=replace(attacker.extraction.draws, batch_size=1))
    found = replace(attacker, extraction=alone).attacked(of, ATTACKS["pgd"], eps, 3, "test")
    # Rounding may turn the sign of a gradient near 0.
    assert (torch.cat([part.pixels for part in found]) - both).abs().gt(1e-6).double().mean() < 0.02
    scores = attacker.judge(of, [one, two])
    parts = []
    for rank in (0, 1):
        world = World(rank)
        own = replace(attacker, extraction=replace(attacker.extraction, world=world))
        (part,) = own.attacked(of, ATTACKS["pgd"], eps, 3, "test")
        assert torch.equal(part.pixels, (one, two)[rank].pixels)
        parts.append(own.judge(of, [part]))
    assert np.array_equal(np.concatenate(parts), scores)


@dataclass(frozen=True)
class World:
    """One of two ranks, that hears nothing of the other."""

    rank: int
    size: int = 2

    shard_list = RealWorld.shard_list

    def all_gather_object(self, value):
        return [value]


def test_mix_partners_stay_clean(monkeypatch):
    data, index = images(), torch.tensor([2])
    attacker = DETECTORS["CSI, a mix partner"]()
    spec, pixels = attacker.extraction.draws, torch.rand(1, 3, 8, 8, generator=gen(), dtype=torch.float64)
    plain = replace(spec, aligned=None)
    (look,) = extract.looks(data, plain, [0], None)
    views = extract.set_views(data, plain, look.draw, index, None, pixels)
    partner = data.batch(torch.tensor([3])).double()
    torch.testing.assert_close(views[3], 0.8 * pixels[0] + 0.2 * partner[0], atol=1e-7, rtol=0)
    torch.testing.assert_close(views[0], torch.rot90(pixels[0], 1, (1, 2)))


# --------------------------------------------------------------------------------------------- what must always hold


def small_net() -> Attacker:
    """A score that is not linear, of views that are drawn."""
    return float_csi()


def test_columns_and_radii_are_in_order_and_at_eps_1_nothing_is_left():
    data = images(9)
    asked = plan("pgd", "apgd", epsilon=8 / 255, radii=(0, 4 / 255, 0.5, 1), steps=8)
    found = attack_detector(asked, small_net(), [chosen(data)])
    curve = found.facts["curve"]
    assert [radius_text(row["epsilon"]) for row in curve] == ["0", "4/255", "8/255", "0.5", "1"]
    for row in curve:
        both, one, other, clean = (row[side]["mean"] for side in ("both", "normal", "anomalous", "clean"))
        assert both <= min(one, other) + 1e-12 and max(one, other) <= clean + 1e-12
    for side in SIDES:
        values = [row[side]["mean"] for row in curve]
        assert all(after <= before + 1e-12 for before, after in zip(values, values[1:], strict=False))
    assert curve[0]["both"] == curve[0]["clean"] and curve[-1]["both"]["mean"] == 0
    assert found.metrics["attacked/both"] == curve[2]["both"]["mean"] < curve[0]["both"]["mean"]
    assert all(found.metrics["attacked/both"] <= value + 1e-12 for value in found.facts["by_attack"].values())
    signs = {sign["name"]: sign for sign in found.facts["health"]}
    assert signs["left at an unlimited radius"]["number"] == 0 and signs["images without gradient"]["number"] == 0
    # The same again: nothing is drawn from global state.
    again = attack_detector(asked, small_net(), [chosen(data)])
    assert again.metrics == found.metrics and np.array_equal(
        again.columns["digits"]["attacked"], found.columns["digits"]["attacked"]
    )


def test_what_helps_the_detector_counts_as_nothing_and_is_reported(monkeypatch):
    """An attack that goes the wrong way from the second radius on: of each image the smaller radius counts."""
    data = images(24)
    pgd = ATTACKS["pgd"]

    def climb(loss, x, index, direction, *, eps, **settings):
        return pgd.climb(loss, x, index, direction * (1 if eps < 0.02 else -1), eps=eps, **settings)

    monkeypatch.setitem(ATTACKS, "pgd", pgd._replace(climb=climb))
    weight = torch.randn(192, generator=gen(1))
    attacker = attacker_of(pixels_as_they_are, LinearScore(weight), DrawSpec(IDENTITY, None, 0))
    found = attack_detector(plan(epsilon=0.05, radii=(0, 0.01), steps=8), attacker, [chosen(data)])
    first, second, third = (row["both"]["mean"] for row in found.facts["curve"])
    assert first > second == third
    assert np.array_equal(found.columns["digits"]["attacked"], found.columns["digits"]["attacked 0.01"])
    signs = {sign["name"]: sign for sign in found.facts["health"]}
    above, larger = signs["left under attack above natural"], signs["a larger radius leaves more by"]
    assert (
        above["shows"] and above["number"] == pytest.approx(found.facts["by_attack"]["pgd"] - first) and larger["shows"]
    )
    assert signs["one step leaves less than many by"]["shows"] and "MASKED GRADIENTS" in found.facts["health_line"]


@dataclass(frozen=True)
class Broken(LinearScore):
    """Rounded, so that there is no gradient; NaN far from the images."""

    def __call__(self, outputs: Outputs) -> Tensor:
        value = super().__call__(outputs)
        return torch.where(value.abs() > 3, torch.nan, value.round() + 0 * value)


def test_a_score_without_gradient_is_reported_and_no_number_is_no_success():
    data = images(24)
    attacker = attacker_of(
        pixels_as_they_are, Broken(0.1 * torch.randn(192, generator=gen(1))), DrawSpec(IDENTITY, None, 0)
    )
    found = attack_detector(plan(epsilon=1.0, steps=3), attacker, [chosen(data)])
    assert np.isfinite(found.columns["digits"]["attacked"]).all()
    signs = {sign["name"]: sign for sign in found.facts["health"]}
    assert signs["images without gradient"] == {"name": "images without gradient", "number": 1.0, "shows": True}
    assert signs["left at an unlimited radius"]["shows"] and found.facts["health_line"].startswith("MASKED GRADIENTS: ")


@pytest.mark.parametrize("name", ["baseline", "rot_trans"])
def test_what_saturates_has_a_smooth_form_with_a_gradient(name):
    logits = {"linear": torch.tensor([[[200.0, 0.0, -30.0]]])}
    k = torch.arange(36)
    truth = {"rotation": (k // 9, 4), "vertical": (k // 3 % 3, 3), "horizontal": (k % 3, 3)}
    if name == "rot_trans":
        logits = {key: 200.0 * nn.functional.one_hot(index, n)[None].float() for key, (index, n) in truth.items()}
    scorer = SCORES[name].scorer()
    for form, lives in ((scorer, False), (scorer.smooth, True)):
        given = {key: value.clone().requires_grad_() for key, value in logits.items()}
        grads = torch.autograd.grad(form(given).sum(), list(given.values()))
        assert all(bool(grad.abs().max() > 1e-3) == lives for grad in grads)


def test_a_soft_maximum_is_near_the_maximum_and_its_gradient_goes_to_all_that_are():
    known = nn.functional.normalize(torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.0], [0.0, 1.0]]), dim=1)
    x = torch.tensor([[[1.0, 0.001]]]).requires_grad_()
    hard = NearestScore.of(known)
    (one,), (all_,) = (torch.autograd.grad(form({"h": x}).sum(), x) for form in (hard, hard.smooth))
    # Between two neighbours: towards the one, or along none of them.
    assert all_.norm() < 0.2 * one.norm() and (hard({"h": x}) - hard.smooth({"h": x})).abs().item() < 0.1


# --------------------------------------------------------------------------------------------------------- subsets


def test_a_subset_has_as_many_images_of_each_class_and_follows_from_the_seed():
    labels = torch.tensor([0] * 30 + [1] * 3 + [2] * 20 + [3] * 20)
    data = image_set(torch.zeros(73, 3, 2, 2, dtype=torch.uint8), labels)
    some = [Chosen.of("a", data, labels == 0, str, n=12, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(some[0].index, some[1].index) and not torch.equal(some[0].index, some[2].index)
    for of in some:
        assert of.index.tolist() == sorted(set(of.index.tolist()))
        assert labels[of.index].bincount().tolist() in ([12, 3, 4, 5], [12, 3, 5, 4])
        assert {name: int(which.sum()) for name, which in of.classes.items()}["1"] == 3
    everything = Chosen.of("a", data, labels == 0, str, n=None, seed=0)
    assert everything.index.tolist() == list(range(73))
    few = Chosen.of("a", data, labels == 0, str, n=100, seed=0)
    assert torch.equal(few.index, everything.index)
    other = Chosen.of("b", data, torch.zeros(73, dtype=torch.bool), n=5, seed=0)
    assert len(other.index) == 5 and list(other.classes) == ["b"] and other.classes["b"].all()


# ------------------------------------------------------------------------------------------------- from the command


def test_eps_0_is_the_clean_auroc_to_the_bit_and_a_subset_has_its_own_scores(stage1):
    trained = trained_of(
        stage1, "--ood_score", "CSI", "knn", "--attack", "pgd", "--epsilon", "0", "--attack_steps", "1"
    )
    for result in EVALS["ood_pre"].measure(trained):
        assert {result.metrics[f"attacked/{side}"] for side in SIDES} == {result.metrics["mean"]}
        own = result.per_image["digits"]
        assert np.array_equal(own["attacked"], own["score"])
        assert result.facts["attack"]["images"] == {"digits": {"normal": 61, "anomalous": 538}}


def test_files_and_lines_say_what_attacks_have_left(stage1, tmp_path, capsys):
    run = shutil.copytree(stage1, tmp_path / "run", ignore=shutil.ignore_patterns("result_*"))
    args = ["--load_path", str(run), "--device", "cpu", "--attack_images", "4", "--attack_steps", "4"]
    args += ["--attack", "pgd", "--ood_dataset", "interp", "--test_batch_size", "9"]
    args += ["--epsilon", "8/255", "--epsilons", "0", "2/255"]
    assert evaluate.main([*args, "--save_score"]) == 0
    told = capsys.readouterr().out
    assert "has no effect" not in told
    (path,) = run.glob("result_*.json")
    found = json.loads(path.read_text())
    attack = found["attack"]
    assert attack["images"] == {"digits": {"normal": 4, "anomalous": 4}, "interp": {"normal": 0, "anomalous": 4}}
    assert (attack["epsilon"], attack["steps"], attack["draws"]) == (8 / 255, 4, 1)
    assert [row["epsilon"] for row in attack["curve"]] == [0, 2 / 255, 8 / 255]
    assert found["attacked"] == {side: attack["curve"][2][side]["mean"] for side in SIDES}
    assert "interp" in attack["curve"][2]["both"]["auroc"] and found["settings"]["attack"] == ["pgd"]
    assert (
        "8 normal and 8" not in told
        and "4 normal and 8 anomalous images, L-inf, pgd, 4 steps, draws a gradient: 1" in told
    )
    for row in attack["curve"]:
        numbers = " ".join(f"{100 * row[side]['mean']:9.1f}" for side in SIDES)
        assert f"  {radius_text(row['epsilon']):<10} {numbers}" in told
    assert f"gradients: {attack['health_line']}" in told
    rows = list(csv.DictReader((run / found["scores"]["digits"]).open()))
    hit = [row for row in rows if row["attacked"] != "nan"]
    assert len(rows) == 599 and len(hit) == 8
    for row in hit:
        low, high = float(row["attacked"]), float(row["score"])
        assert float(row["attacked 0"]) == pytest.approx(high, abs=1e-5)
        assert low <= high + 1e-5 if row["label"] == "3" else low >= high - 1e-5
    # A result without an attack is another one.
    assert evaluate.main(["--load_path", str(run), "--device", "cpu"]) == 0
    assert len(list(run.glob("result_*.json"))) == 2


def test_without_an_attack_its_flags_have_no_effect(stage1, tmp_path, capsys):
    args = ["--load_path", str(stage1), "--out", str(tmp_path), "--device", "cpu"]
    more = ["--attack_images", "4", "--attack_steps", "4", "--attack_draws", "2", "--epsilon", "0.1", "--epsilons", "0"]
    assert evaluate.main([*args, *more]) == 0
    told = capsys.readouterr().out
    assert told.count("has no effect") == 5 and "attacked" not in json.loads(next(tmp_path.glob("*.json")).read_text())


@pytest.mark.parametrize(
    "more, told",
    [
        (["--attack", "fgsm"], ["--attack", "'fgsm'", "pgd"]),
        (["--attack", "pgd", "--epsilon", "-0.1"], ["--epsilon must", "-0.1"]),
        (["--attack", "pgd", "--epsilons", "0", "2"], ["--epsilons 2", "at most 1"]),
        (["--attack", "pgd", "--attack_steps", "0"], ["--attack_steps must be > 0"]),
        (
            ["--attack", "pgd_smooth", "--ood_score", "ocsvm"],
            ["--attack pgd_smooth: for score ocsvm", "give pgd, pgd_known, apgd, apgd_known"],
        ),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(more, told, stage1, tmp_path, capsys):
    run = shutil.copytree(stage1, tmp_path / "run", ignore=shutil.ignore_patterns("result_*"))
    before = sorted(run.iterdir())
    refused(capsys, evaluate.main(["--load_path", str(run), "--device", "cpu", *more]), *told)
    assert sorted(run.iterdir()) == before


@pytest.mark.parametrize("random, known", [(False, "pgd_straight"), (True, "pgd_known_straight")])
def test_operators_that_hide_gradients_are_a_note_unless_an_attack_passes_them(random, known, capsys):
    plan().check({}, random, sparse=True)
    assert f"note: MeanSparse hides gradients; --attack pgd {known} climbs past it" in capsys.readouterr().out
    plan("pgd", known).check({}, random, sparse=True)
    plan().check({}, random, sparse=False)
    assert not capsys.readouterr().out
