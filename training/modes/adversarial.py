"""Adversarial training: PGD (Madry et al. 2018), TRADES, MART, FGSM-RS (Wong et al. 2020) and N-FGSM (de Jorge et al.
2022), each with or without the two parts of ANCRA (arXiv 2310.03358), reverse attention (--ra) and contrast with
adversarial negatives (--anc).

Attacks see the network in evaluation mode, losses in training mode. Letters: B images of a batch, p of them of this
rank, m negatives of each, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from common.attacks.specs import EpsilonSpec, StepsSpec
from common.dist import SINGLE, Shard, World
from common.flags import Flags, flag
from common.negatives import NONE, RANDOM, StrategySpec, pick_negatives
from common.seed import generator
from datasets import Split
from datasets.sets import floats
from models.feature_net import Heads
from models.mode import evaluation_mode, frozen
from training.attack import FGSM_RS, N_FGSM, PGD, Attack
from training.losses.adversarial import anc_of_pairs, boosted_cross_entropy, kl, kl_of_each, weighted_kl
from training.modes.setup import precision
from training.modes.supervised import HELD_OUT, set_up
from training.recipe import Batch, Check, EpochEnd, Recipe, Step
from training.specs import CompileSpec, StepSpec

ROBUST = "held_out/robust"
# In so many epochs every strategy is `random`.
_RANDOM_EPOCHS = 10
_OVERFITTED = Check(
    ROBUST,
    "the network has lost its robustness, or not found any (catastrophic overfitting of one-step attacks); try"
    " --mode adv_pgd, a smaller --lr_init or a smaller --epsilon",
    below=0.02,
)


@dataclass(frozen=True)
class AdversarialSpec(StepsSpec, StrategySpec, group="adversarial training"):
    """The attack of training, and the parts of ANCRA; most flags have their published names."""

    inner_attack: str = flag(
        "ce", "what the attack raises: cross-entropy, or KL as TRADES", choices=lambda: ("ce", "kl")
    )
    robust_weight: float = flag(6.0, "adv_trades, adv_mart: weight of the robust term (published: --beta)", at_least=0)
    ra: bool = flag(False, "reverse attention in the last blocks")
    cr_beta: float = flag(2.0, "--ra: weight of the auxiliary heads", at_least=0)
    anc: bool = flag(False, "contrast with negatives, images of other classes")
    zeta: float = flag(3.0, "--anc: weight of the contrast", at_least=0)
    alpha: float = flag(1.0, "--anc: share of its gradient that goes to negatives", at_least=0, at_most=1)
    sample_class_number: int = flag(1, "--anc: classes that negatives of an image are drawn from", above=0)
    sample_number: int = flag(1, "--anc: negatives of each of these classes", above=0)


# (heads of natural images or None, heads of attacked images, labels, spec) -> named terms.
Losses = Callable[[Any, Heads, Tensor, AdversarialSpec], dict[str, Tensor]]


def over_heads(loss: Callable[..., Tensor], weight: float, *heads: Heads) -> Tensor:
    """loss of the final logits + weight * mean of the losses of auxiliary logits, of one or more outputs in step."""
    total = loss(*(one.final for one in heads))
    parts = [loss(*group) for group in zip(*(one.auxiliary for one in heads), strict=True)]
    return total + weight * torch.stack(parts).mean(0) if parts else total


def _of_attacked(natural: Any, attacked: Heads, labels: Tensor, spec: AdversarialSpec) -> dict[str, Tensor]:
    return {"robust": over_heads(lambda logits: F.cross_entropy(logits, labels), spec.cr_beta, attacked)}


def _trades(natural: Any, attacked: Heads, labels: Tensor, spec: AdversarialSpec) -> dict[str, Tensor]:
    return {
        "natural": over_heads(lambda logits: F.cross_entropy(logits, labels), spec.cr_beta, natural),
        "robust": spec.robust_weight * over_heads(kl, spec.cr_beta, natural, attacked),
    }


def _mart(natural: Any, attacked: Heads, labels: Tensor, spec: AdversarialSpec) -> dict[str, Tensor]:
    return {
        "robust": over_heads(lambda logits: boosted_cross_entropy(logits, labels), spec.cr_beta, attacked),
        "weighted": spec.robust_weight
        * over_heads(lambda p, q: weighted_kl(p, q, labels), spec.cr_beta, natural, attacked),
    }


class Method(NamedTuple):
    """A row of adversarial training. natural: whether its losses read the natural images."""

    attack: Attack
    losses: Losses
    natural: bool = False


METHODS: dict[str, Method] = {
    "adv_pgd": Method(PGD, _of_attacked),
    "adv_trades": Method(PGD, _trades, natural=True),
    "adv_mart": Method(PGD, _mart, natural=True),
    "adv_fgsm_rs": Method(FGSM_RS, _of_attacked),
    "adv_nfgsm": Method(N_FGSM, _of_attacked),
}


def run_parts(flags: Flags) -> list[str]:
    """The mode, and which parts of ANCRA it has."""
    spec = flags.of(AdversarialSpec, only=["ra", "anc"])
    return [flags.mode, *(["ra"] if spec.ra else []), *(["anc"] if spec.anc else [])]


def build(flags: Flags, split: Split, world: World = SINGLE) -> Recipe:
    """The recipe of a row of `METHODS`. Held-out images select the epoch of the best accuracy under the attack.

    Raises: UserError where there is but one class.
    """
    method, spec, eps = METHODS[flags.mode], _read(flags), flags.of(EpsilonSpec).epsilon
    setup = set_up(flags, split, world, "ra_classifier" if spec.ra else "classifier")
    net, seed, amp, batch_size = setup.net, flags.seed, precision(flags, world), flags.of(StepSpec).batch_size
    plain_heads = torch.compile(net.heads) if flags.of(CompileSpec).compile else net.heads

    def heads(images: Tensor, labels: Tensor | None = None) -> Heads:
        with amp():
            return plain_heads(images, labels)

    attacker = Attacker(method.attack, heads, eps, spec)

    def losses(batch: Batch) -> Step:
        images, shard = floats(batch.local_images[0]), batch.shard
        own = shard.indices(images.device)[: shard.size]
        gen = generator(seed, "attack", batch.epoch, batch.step, device=images.device)
        with evaluation_mode(net), frozen(net):
            negatives = attacker.negatives(images, batch.labels, shard, batch.epoch, gen) if spec.anc else None
            noise = method.attack.noise(len(batch.labels), images, gen)
            attacked = attacker(images, batch.labels[own], noise[own])
        # In this order, in which batch normalisation counts them.
        natural = _gathered(heads(images, batch.labels[own]), shard) if spec.anc or method.natural else None
        terms = method.losses(natural, _gathered(heads(attacked, batch.labels[own]), shard), batch.labels, spec)
        if natural is None or negatives is None:
            return Step(terms, {})
        contrast, lacking = _contrast(natural, negatives, heads, shard, spec)
        return Step({**terms, "anc": spec.zeta * contrast}, {"train/without_negative": lacking})

    def end_epoch(epoch: int) -> EpochEnd:
        if setup.held_out is None:
            return EpochEnd()
        counts = torch.zeros(2, dtype=torch.long)
        every = setup.held_out.labels.to(setup.held_out.device)
        places = torch.arange(len(setup.held_out), device=setup.held_out.index_device)
        with evaluation_mode(net), frozen(net):
            for index in world.shard_list(list(places.split(batch_size))):
                images, labels = setup.held_out.batch(index), every[index.to(every.device)]
                gen = generator(seed, "attack on held-out images", int(index[0]), device=images.device)
                noise = PGD.noise(len(images), images, gen)
                attacked = PGD(partial(_final_loss, heads, labels), images, noise, eps, spec)
                with torch.no_grad():
                    right = [(heads(x).final.argmax(1) == labels).sum() for x in (images, attacked)]
                counts += torch.stack(right).cpu()
        natural, robust = torch.stack(world.all_gather_object(counts)).sum(0).tolist()
        n = len(setup.held_out)
        return EpochEnd({HELD_OUT: natural / n, ROBUST: robust / n}, select=ROBUST)

    return Recipe(
        net,
        setup.data,
        losses,
        (setup.optimizer,),
        setup.lr,
        setup.loading,
        after_step=setup.after_step,
        end_epoch=end_epoch,
        checks=(_OVERFITTED,),
    )


def _read(flags: Flags) -> AdversarialSpec:
    """Only the flags that have an effect, so that others are reported."""
    switches = flags.of(AdversarialSpec, only=["ra", "anc"])
    names = ["ra", "anc", "num_steps", "step_size"]
    names += ["inner_attack"] if METHODS[flags.mode].attack is PGD else []
    names += ["robust_weight"] if METHODS[flags.mode].natural else []
    names += ["cr_beta"] if switches.ra else []
    names += ["zeta", "alpha", "strategy", "sample_class_number", "sample_number"] if switches.anc else []
    return flags.of(AdversarialSpec, only=names)


def _final_loss(heads: Callable[[Tensor], Heads], labels: Tensor, images: Tensor) -> Tensor:
    return F.cross_entropy(heads(images).final, labels, reduction="none")


class Negatives(NamedTuple):
    """Of each of p images m others: images (p m, 3, H, W), labels (p m,), those of one after another; there (p, m):
    whether it is one."""

    images: Tensor
    labels: Tensor
    there: Tensor


@dataclass(frozen=True)
class Attacker:
    """The attack of training on a network that is in evaluation mode. heads: (images, labels or None) -> its logits."""

    attack: Attack
    heads: Callable[..., Heads]
    eps: float
    spec: AdversarialSpec

    def __call__(self, images: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        """The images, moved away from their class, or with --inner_attack kl from what the network says of them."""
        if self.spec.inner_attack != "kl":
            return self._raise(partial(self._cross_entropy, labels), images, noise)
        with torch.no_grad():
            natural = self.heads(images)
        return self._raise(partial(self._kl, natural), images, noise)

    def negatives(self, images: Tensor, labels: Tensor, shard: Shard, epoch: int, gen: Generator) -> Negatives:
        """Of each own image others of the batch; with `_adv` moved towards the class of the one they are negatives of.

        images (p, 3, H, W): those of this rank. labels (B,): of the batch.
        """
        of_class = self.spec.sample_number
        count = self.spec.sample_class_number * of_class
        with torch.no_grad():
            logits, batch = shard.all_gather(self.heads(images).final), shard.all_gather(images)
        chosen = pick_negatives(
            logits,
            labels,
            strategy=RANDOM if epoch <= _RANDOM_EPOCHS else self.spec.rule,
            count=count,
            per_class=of_class,
            generator=gen,
        )
        own = shard.indices(images.device)[: shard.size]
        rows = chosen[own].clamp_min(0).flatten()
        found = batch[rows]
        if self.spec.attacked:
            noise = self.attack.noise(count * len(labels), images, gen).unflatten(0, (-1, count))[own].flatten(0, 1)
            targets = labels[own].repeat_interleave(count)
            found = self._raise(lambda heads: -self._cross_entropy(targets, heads), found, noise)
        return Negatives(found, labels[rows], chosen[own] != NONE)

    def _raise(self, losses: Callable[[Heads], Tensor], images: Tensor, noise: Tensor) -> Tensor:
        return self.attack(lambda x: losses(self.heads(x)), images, noise, self.eps, self.spec)

    def _cross_entropy(self, labels: Tensor, heads: Heads) -> Tensor:
        return over_heads(lambda logits: F.cross_entropy(logits, labels, reduction="none"), self.spec.cr_beta, heads)

    def _kl(self, natural: Heads, heads: Heads) -> Tensor:
        return over_heads(kl_of_each, self.spec.cr_beta, natural, heads)


def _gathered(heads: Heads, shard: Shard) -> Heads:
    return Heads(shard.all_gather(heads.final), tuple(map(shard.all_gather, heads.auxiliary)))


def _contrast(
    natural: Heads, negatives: Negatives, heads: Callable[..., Heads], shard: Shard, spec: AdversarialSpec
) -> tuple[Tensor, Tensor]:
    """The contrast over all heads, a mean over pairs, and the share of pairs without a negative.

    natural: heads of all B images.
    """
    p, m = negatives.there.shape
    found = heads(negatives.images, negatives.labels)
    there = shard.all_gather(negatives.there).flatten()

    def of_all(logits: Tensor) -> Tensor:
        return shard.all_gather(logits.unflatten(0, (p, m))).flatten(0, 1)

    def loss(anchors: Tensor, others: Tensor) -> Tensor:
        pairs = anc_of_pairs(anchors.repeat_interleave(m, 0), others, alpha=spec.alpha)
        return (pairs * there).sum() / there.sum().clamp_min(1)

    others = Heads(of_all(found.final), tuple(map(of_all, found.auxiliary)))
    return over_heads(loss, spec.cr_beta, natural, others), 1 - there.float().mean()
