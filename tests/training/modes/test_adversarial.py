"""Adversarial training: attacks, terms and order of passes against loops and known answers."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import eval as evaluate
import train
from common.dist import Shard
from common.files import read_facts
from common.flags import build_parser, parse
from common.seed import generator
from datasets import Loading
from datasets.one_class import read_split
from models.checkpoint import build_net
from models.feature_net import Heads
from models.resnet import BasicBlock, ResNet
from models.reverse_attention import RaClassifier
from program import SPECS
from tests.fake_gpu import FakeGpu
from training import STAGE1
from training.losses.adversarial import anc, kl
from training.modes.adversarial import METHODS, AdversarialSpec, Attacker, over_heads
from training.recipe import Batch

EPS = 8 / 255
DIGITS = (
    "--mode adv_trades --dataset digits --image_size 8 --model resnet8 --batch_size 50 --num_steps 2 --epsilon 0.1"
    " --step_size 0.05 --first_images 400 --held_out 100 --amp off --num_worker 0".split()
)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=6, side=8, seed=0):
    return torch.rand(n, 3, side, side, generator=gen(seed))


def net_of(kind="ra_classifier", classes=3):
    return build_net(kind, "resnet8", n_classes=classes, seed=0)


def attacker(net, name="adv_pgd", eps=EPS, **settings):
    return Attacker(METHODS[name].attack, net.heads, eps, AdversarialSpec(**settings))


class Linear(nn.Module):
    """Two classes by (w x, -w x), w = (1, -1, 0) of the first three numbers of an image."""

    def heads(self, images, labels=None):
        score = images.flatten(1)[:, 0] - images.flatten(1)[:, 1]
        return Heads(torch.stack([score, -score], 1), ())


def test_heads_are_weighted_by_hand():
    heads = Heads(torch.tensor([1.0]), (torch.tensor([2.0]), torch.tensor([6.0])))
    assert float(over_heads(lambda x: x.sum(), 0.5, heads)) == 1 + 0.5 * 4
    assert float(over_heads(lambda x: x.sum(), 0.5, Heads(torch.tensor([1.0]), ()))) == 1
    twice = over_heads(lambda x, y: (x * y).sum(), 2.0, heads, heads)
    assert float(twice) == 1 + 2 * (4 + 36) / 2


@pytest.mark.parametrize("steps, moved", [(1, 0.007), (4, 0.028), (5, EPS), (9, EPS)])
def test_the_attack_of_a_linear_network_is_known(steps, moved):
    images, labels = torch.full((2, 3, 1, 1), 0.5), torch.zeros(2, dtype=torch.long)
    own = attacker(Linear(), num_steps=steps)
    attacked = own(images, labels, torch.zeros_like(images)) - images
    expected = torch.tensor([-moved, moved, 0.0]).view(1, 3, 1, 1).expand_as(images)
    torch.testing.assert_close(attacked, expected, atol=1e-6, rtol=0)
    # Towards the class of the anchor: 0, then 1.
    found = own.negatives(images, labels.new_tensor([0, 1]), Shard(2), 1, gen())
    assert (found.images[0] - images[0]).flatten().tolist() == pytest.approx([moved, -moved, 0], abs=4e-3)
    assert (found.images[1] - images[1]).flatten().tolist() == pytest.approx([-moved, moved, 0], abs=4e-3)


def test_one_step_attacks_of_a_linear_network_are_known():
    images, labels = torch.full((50, 3, 1, 1), 0.5), torch.zeros(50, dtype=torch.long)
    sign = torch.tensor([-1.0, 1.0, 0.0]).view(1, 3, 1, 1)
    noise = torch.rand(images.shape, generator=gen())
    drawn = 2 * noise - 1
    for name, expected in {
        "adv_fgsm_rs": (drawn + 1.25 * sign).clamp(-1, 1),
        "adv_nfgsm": 2 * drawn + sign,
    }.items():
        found = attacker(Linear(), name)(images, labels, noise.clone())
        torch.testing.assert_close((found - images) / EPS, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_attacked_images_are_images_and_leave_the_network_alone(name):
    net = net_of().eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    images, labels = pictures(), torch.tensor([0, 1, 2, 0, 1, 2])
    own = attacker(net, name, eps=0.1)
    first, second = (own(images, labels, own.attack.noise(6, images, gen(1))) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, images)
    assert first.min() >= 0 and first.max() <= 1
    reach = 0.3 if name == "adv_nfgsm" else 0.1
    assert (first - images).abs().max() <= reach + 1e-6
    if name == "adv_nfgsm":
        assert (first - images).abs().max() > 0.2
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters()) and not net.training
    with torch.no_grad():
        losses = [F.cross_entropy(net(x), labels, reduction="none") for x in (images, first)]
    assert (losses[1] > losses[0]).float().mean() >= 0.5


def test_kl_moves_images_away_from_what_the_network_says_of_them():
    net, images, labels = net_of("classifier").eval(), pictures(), torch.tensor([0, 1, 2, 0, 1, 2])
    own = attacker(net, inner_attack="kl", eps=0.1, step_size=0.02)
    noise = own.attack.noise(6, images, gen(1))
    one, two = (own(images, given, noise) for given in (labels, labels.flip(0)))
    assert torch.equal(one, two)  # labels take no part
    with torch.no_grad():
        by_chance = images + 0.1 * noise.sign()
        assert float(kl(net(images), net(one))) > 10 * float(kl(net(images), net(by_chance.clamp(0, 1))))


@pytest.mark.parametrize("strategy", ["random", "random_adv"])
def test_negatives_are_of_other_classes_and_move_towards_their_anchor(strategy):
    net, images, labels = net_of().eval(), pictures(), torch.tensor([0, 1, 2, 0, 1, 2])
    own = attacker(net, strategy=strategy, sample_class_number=2, eps=0.1, step_size=0.02)
    found = own.negatives(images, labels, Shard(6), 1, gen(2))
    assert found.images.shape == (12, 3, 8, 8) and found.there.shape == (6, 2) and found.there.all()
    anchors = labels.repeat_interleave(2)
    assert (found.labels != anchors).all()
    distances = (found.images[:, None] - images[None]).abs().amax((2, 3, 4))
    rows = distances.argmin(1)
    assert torch.equal(labels[rows], found.labels)
    moved = distances.amin(1)
    if strategy == "random":
        assert not moved.any()
    else:
        assert (moved > 0.01).all() and (moved <= 0.1 + 1e-6).all()
        with torch.no_grad():
            near, before = (F.cross_entropy(net(x), anchors) for x in (found.images, images[rows]))
        assert near < before


def test_hard_negatives_are_random_ones_in_the_first_ten_epochs():
    net, images, labels = net_of().eval(), pictures(30), torch.arange(30) % 3
    random, early, late = (
        attacker(net, strategy=strategy).negatives(images, labels, Shard(30), epoch, gen(2)).images
        for strategy, epoch in (("random", 11), ("hard", 10), ("hard", 11))
    )
    assert torch.equal(random, early) and not torch.equal(random, late)


def naive_terms(mode, net, images, attacked, labels, spec, negatives=None):
    """The terms of the specification, in the order of its passes, image by image where it can be."""

    def heads(x, y):
        found = net.heads(x, y)
        return [found.final, *found.auxiliary]

    def over(parts):
        return parts[0] + (spec.cr_beta * sum(parts[1:]) / len(parts[1:]) if len(parts) > 1 else 0)

    def cross(logits):
        return sum(F.cross_entropy(row[None], y[None]) for row, y in zip(logits, labels, strict=True)) / len(labels)

    natural = heads(images, labels) if mode in ("adv_trades", "adv_mart") or negatives else None
    robust = heads(attacked, labels)
    p, q = ([part.softmax(1) for part in parts or ()] for parts in (natural, robust))
    n = len(labels)
    if mode == "adv_trades":
        divergence = [sum((a[i] * (a[i] / b[i]).log()).sum() for i in range(n)) / n for a, b in zip(p, q, strict=True)]
        terms = {"natural": over([cross(x) for x in natural]), "robust": spec.robust_weight * over(divergence)}
    elif mode == "adv_mart":
        boosted, weighted = [], []
        for x, a, b in zip(robust, p, q, strict=True):
            others = [max(b[i, k] for k in range(b.shape[1]) if k != labels[i]) for i in range(n)]
            boosted.append(cross(x) - sum((1 - other).log() for other in others) / n)
            each = [(1 - a[i, labels[i]]) * (a[i] * (a[i] / b[i]).log()).sum() for i in range(n)]
            weighted.append(sum(each) / n)
        terms = {"robust": over(boosted), "weighted": spec.robust_weight * over(weighted)}
    else:
        terms = {"robust": over([cross(x) for x in robust])}
    if negatives:
        others = heads(negatives.images, negatives.labels)
        m = len(negatives.labels) // n
        pairs = [anc(a.repeat_interleave(m, 0), b, alpha=spec.alpha) for a, b in zip(natural, others, strict=True)]
        terms["anc"] = spec.zeta * over(pairs)
    return terms


def recipe_of(*more):
    args = [*DIGITS, "--first_images", "40", "--held_out", "0", *more]
    mode = args[len(args) - 1 - args[::-1].index("--mode") + 1]
    flags = parse(args, build_parser("x", STAGE1, mode, SPECS))
    flags = flags.filled(STAGE1[mode].defaults)
    split = read_split(flags, training=True, model_size=32)
    return STAGE1[mode].build(flags, split)


@pytest.mark.parametrize("more", [[], ["--ra"], ["--anc"], ["--ra", "--anc", "--sample_class_number", "2"]])
@pytest.mark.parametrize("mode", METHODS)
def test_terms_and_gradients_of_a_step_are_those_of_the_specification(mode, more):
    recipe, again = (recipe_of("--mode", mode, *more) for _ in range(2))
    index = torch.arange(20)
    (images,) = recipe.data.batches([index], Loading(flip=False), seed=0, epoch=1)
    batch = Batch(images, recipe.data.labels[index], index, 1, 3, Shard(20))
    step = recipe.losses(batch)
    sum(step.losses.values()).backward()

    net, spec = again.model, AdversarialSpec(
        ra="--ra" in more, anc="--anc" in more, num_steps=2, step_size=0.05,
        robust_weight=5.0 if mode == "adv_mart" else 6.0, sample_class_number=2 if "2" in more else 1,
    )  # fmt: skip
    own, x = generator(0, "attack", 1, 3), images[0].float() / 255
    net.eval()
    attack = Attacker(METHODS[mode].attack, net.heads, 0.1, spec)
    negatives = attack.negatives(x, batch.labels, batch.shard, 1, own) if spec.anc else None
    attacked = attack(x, batch.labels, attack.attack.noise(20, x, own))
    net.train()
    expected = naive_terms(mode, net, x, attacked, batch.labels, spec, negatives)
    sum(expected.values()).backward()
    assert step.losses.keys() == expected.keys()
    for name, value in expected.items():
        assert float(step.losses[name].detach()) == pytest.approx(float(value.detach()), rel=1e-4), name
    for (name, p), q in zip(recipe.model.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=name)
    for (name, p), q in zip(recipe.model.named_buffers(), net.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)
    passes = 1 + (spec.anc or METHODS[mode].natural) + spec.anc
    assert int(recipe.model.backbone.bn1.num_batches_tracked) == passes


def golden_net(g):
    """The network of the known answers; its third stage keeps the resolution."""
    backbone = ResNet(BasicBlock, (1, 1, 1, 2), (4, 6, 6, 8))
    backbone.layer3[0] = BasicBlock(6, 6, 1)
    net = RaClassifier(backbone, n_classes=5)
    net.input_mean.zero_(), net.input_std.fill_(1)
    names = {key.removeprefix("net."): value for key, value in g.items() if key.startswith("net.")}
    state = {key.replace("fc.", "linear."): value.float() for key, value in names.items()}
    state |= {key: value for key, value in net.state_dict().items() if key not in state}
    net.load_state_dict(state)
    return net


def golden_attack(g, **settings):
    spec = {"num_steps": int(g["meta_steps"]), "step_size": float(g["meta_step_size"])}
    return Attacker(
        METHODS["adv_trades"].attack,
        golden_net(g).eval().requires_grad_(False).heads,
        float(g["meta_eps"]),
        AdversarialSpec(**(spec | settings)),
    )


@pytest.mark.parametrize("name, settings", [("x_adv_untargeted_1step", {"num_steps": 1}), ("x_adv_untargeted", {}),
                                            ("x_adv_trades_kl", {"inner_attack": "kl"})])  # fmt: skip
def test_known_attacked_images(golden, name, settings):
    g = golden("ancra_net")
    found = golden_attack(g, **settings)(g["x"].float(), g["y"], g["noise_untargeted"].float())
    differ = (found - g[name]).abs() > 1e-5
    assert not torch.equal(found, g["x"].float())
    if settings.get("inner_attack") != "kl":
        assert differ.float().mean() <= 0.01
        return
    # The gradient of KL is next to 0 where it starts: in float64, or with folded weights, its sign is another one for
    # every eighth pixel. What the images reach is no less.
    assert differ.float().mean() <= 0.15
    net = golden_net(g).eval()
    reached = [kl(net(g["x"].float()), net(images.float())) for images in (found, g[name])]
    assert reached[0] >= reached[1] > 0


def test_known_attacked_negatives(golden):
    g = golden("ancra_net")
    attack = golden_attack(g)
    targeted = attack._raise(
        lambda heads: -attack._cross_entropy(g["y"], heads), g["x"].float()[g["neg_index"]], g["noise_targeted"].float()
    )
    assert ((targeted - g["x_neg_adv"]).abs() > 1e-5).float().mean() <= 0.01


def test_known_loss_and_gradients_of_trades_with_both_parts(golden):
    g = golden("ancra_net")
    net, y, other = golden_net(g).train(), g["y"], g["y"][g["neg_index"]]
    images = (g["x"], y), (g["x_adv_untargeted"], y), (g["x_neg_adv"], other)
    heads = [net.heads(x.float(), labels) for x, labels in images]
    lam = float(g["meta_cr_beta"])
    terms = {
        "natural": over_heads(lambda logits: F.cross_entropy(logits, y), lam, heads[0]),
        "robust": over_heads(kl, lam, heads[0], heads[1]),
        "anc": over_heads(lambda a, b: anc(a, b, alpha=float(g["meta_alpha"])), lam, heads[0], heads[2]),
    }
    for name, value in terms.items():
        assert float(value.detach()) == pytest.approx(float(g[f"loss_{name}"]), rel=1e-4)
    total = terms["natural"] + float(g["meta_beta"]) * terms["robust"] + float(g["meta_zeta"]) * terms["anc"]
    assert float(total.detach()) == pytest.approx(float(g["loss_total"]), rel=1e-4)
    total.backward()
    for name, p in net.named_parameters():
        name = name.removeprefix("backbone.").replace("linear.", "fc.")
        known = g[f"grad.{name}"].float()
        torch.testing.assert_close(p.grad, known, rtol=1e-3, atol=1e-4 * float(known.abs().max()), msg=name)


def test_a_step_waits_for_no_device():
    with FakeGpu() as gpu:
        net = net_of().to(gpu.device).eval()
        images, labels = pictures().to(gpu.device), torch.tensor([0, 1, 2, 0, 1, 2], device=gpu.device)
        own = torch.Generator(gpu.device).manual_seed(0)
        attack = attacker(net, strategy="hard_adv", num_steps=2)
        gpu.waits.clear()
        attack.negatives(images, labels, Shard(6), 11, own)
        attack(images, labels, attack.attack.noise(6, images, own))
        assert not gpu.waits


def run(logs, *args):
    assert train.main([*DIGITS, "--log_root", str(logs), *args]) == 0
    folder = max(logs.iterdir(), key=lambda path: path.stat().st_mtime)
    return folder, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_makes_robust_and_keeps_the_epoch_that_is_most_so(tmp_path):
    more = "--first_images 1000 --held_out 200 --num_steps 3 --epochs 8 --lr_schedule cycle --lr_init 0.1".split()
    folder, rows = run(tmp_path, "--ra", "--anc", *more)
    assert folder.name == "digits_resnet8_adv_trades_ra_anc"
    assert all(0 <= row["held_out/robust"] <= row["held_out/accuracy"] + 0.05 <= 1.05 for row in rows)
    best = int(np.argmax([row["held_out/robust"] for row in rows])) + 1
    assert read_facts(folder / "best.model")["epoch"] == best
    assert "held_out/robust: last" in (folder / "log.txt").read_text()
    assert rows[-1]["held_out/accuracy"] > 0.25 and rows[-1]["held_out/robust"] > 0.2
    assert all(row["train/without_negative"] == 0 for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    assert evaluate.main(["--load_path", str(folder), "--mode", "test_acc", "--out", str(tmp_path / "o")]) == 0


def refused(capsys, *args):
    assert train.main([*DIGITS, *map(str, args)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    "args, text",
    [
        (["--epsilon", "-0.1"], "--epsilon must lie in [0, 1], got -0.1"),
        (["--alpha", "2"], "--alpha must lie in [0, 1], got 2"),
        (["--num_steps", "0"], "--num_steps must be > 0, got 0"),
        (["--one_class_idx", "1"], "--one_class_idx: --mode adv_trades learns to classify; leave it out"),
    ],
)
def test_flags_out_of_range_are_refused(args, text, tmp_path, capsys):
    assert text in refused(capsys, *args, "--log_root", tmp_path / "logs")
    assert not (tmp_path / "logs").exists()
