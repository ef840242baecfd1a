"""Stage 2: one sparse dictionary per shift on the frozen features of stage 1.

Letters: N images, B of a batch, K shifts, F feature size, M atoms.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from common.device import Amp
from common.dist import SINGLE, Shard, World
from common.errors import UserError
from common.files import load_state_dict, load_tensors, read_facts
from common.flags import Flags, Spec, WeightsSpec, flag
from common.run import Run, start_epoch
from common.seed import generator
from datasets import ImageSet, PictureSet, Split
from datasets.augment import AlignedSpec
from datasets.views import DrawSpec, PassSpec, draw_views, train_views
from models import ModelSpec
from models.checkpoint import find_weights, load_net
from models.feature_net import CocsrNet, FeatureTransform
from models.sparse.admm import RidgeSystem
from models.sparse.dictionary import FAR, DictionaryBank, SparseSpec
from models.sparse.kmeans import kmeans
from models.sparse.prox import lambda_max, lasso_objective
from training.losses.dictionary import atom_norm, code_terms, margin_terms
from training.micro_batch import checkpointed, forward_in_micro_batches, micro_batch_size
from training.modes.setup import (
    any_shifts,
    few_views,
    own_device,
    precision,
    sheet,
    training_images,
    view_renderer,
)
from training.optim import LengthSpec
from training.recipe import Batch, Check, Recipe, Shown, Step
from training.specs import CompileSpec

START = "start.cocsr_model"
_MOVED = 1e-3


@dataclass(frozen=True)
class DictionaryTrainingSpec(Spec, group="stage 2: dictionaries"):
    """How dictionaries start and learn."""

    sr_lr: float = flag(1e-3, "learning rate of the dictionaries (Adam)", above=0)
    sr_decay_lr: float = flag(1e-6, "weight decay of the dictionaries", at_least=0)
    ini_sr_dict_train: bool = flag(False, "start from k-means of the training features")
    freeze_sr_dict: bool = flag(False, "keep the starting dictionaries (what published runs amounted to)")
    loss_dict_detach_feature: bool = flag(False, "no gradient into the features: always so")


_CHECKS = (
    Check(
        "sr/sparsity",
        "every code is zero, so nothing is learned. Try a lower --sr_lambda, or --normalize_sr_dict_feature",
        above=0.9999,
    ),
    Check(
        "sr/dead_atoms",
        "hardly an atom is in use. Try a lower --sr_lambda, a smaller --sr_dict_size, or --ini_sr_dict_train",
        above=0.99,
    ),
    Check(
        "sr/gap",
        "codes are far from those of the lasso. Try --sr_rho_auto, or more --sr_admm_stage",
        above=FAR,
    ),
)


@dataclass(frozen=True)
class DictionaryLossSpec(Spec, group="stage 2: dictionaries"):
    """Weights and constraint of the dictionary loss; field names are flag names."""

    loss_lambda_sr: float = flag(1.0, "weight of |s - D a|^2")
    loss_lambda_sr_l1: float = flag(0.01, "weight of |a|_1")
    loss_lambda_dict_constr: float = flag(0.1, "weight of the atoms' norm constraint")
    loss_dict_constr_mode: int = flag(0, "0: norm = c, 1: norm <= c", choices=lambda: (0, 1))
    loss_dict_constr_value: float = flag(1.0, "c of the norm constraint", above=0)
    loss_dict_detach_sr_coef: bool = flag(False, "no gradient through the codes")
    loss_sr_deep_supervision: str | None = flag(None, "further ADMM steps, counted from 0, to take the loss at: 9,19")
    loss_dict_margin: float = flag(
        0.0, "weight of the cross-entropy that a view's own dictionary codes it better than the others", at_least=0
    )
    loss_dict_margin_temperature: float = flag(0.1, "of that cross-entropy, of logarithms of objectives", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_sr_deep_supervision is not None and not re.fullmatch(r"\d+(,\d+)*", self.loss_sr_deep_supervision):
            raise UserError(
                f"--loss_sr_deep_supervision: a list of steps such as 9,19, got {self.loss_sr_deep_supervision!r}"
            )

    @property
    def steps(self) -> tuple[int, ...]:
        """The earlier steps, counted from 0, at which the loss is taken too."""
        return tuple(sorted({int(step) for step in (self.loss_sr_deep_supervision or "").split(",") if step}))


def idle_notes(
    flags: Flags, sparse: SparseSpec, learning: DictionaryTrainingSpec, loss: DictionaryLossSpec
) -> list[str]:
    """A line for each flag that was given and that another one leaves without effect."""
    idle = {
        "sr_lambda": sparse.sr_lambda_rel is not None and "beside --sr_lambda_rel",
        "loss_dict_margin_temperature": not loss.loss_dict_margin and "without --loss_dict_margin",
    }
    if learning.freeze_sr_dict:
        frozen = ("sr_lr", "sr_decay_lr", "loss_dict_margin", "loss_dict_margin_temperature")
        idle |= dict.fromkeys(frozen, "under --freeze_sr_dict")
    return [f"note: --{name} has no effect {where}" for name, where in idle.items() if where and flags.given(name)]


def build(flags: Flags, split: Split, world: World = SINGLE) -> Recipe:
    """The recipe of `cocsr_dict`."""
    sparse, learning, loss_spec = flags.of(SparseSpec), flags.of(DictionaryTrainingSpec), flags.of(DictionaryLossSpec)
    spec, shift_spec, device = flags.of(AlignedSpec), any_shifts(flags), own_device(flags, world)
    resume_path = flags.of(WeightsSpec, only=["resume_path"]).resume_path
    if not resume_path:
        raise UserError("--resume_path: stage 2 starts from a stage-1 run; give its folder or its last.model")
    file = find_weights(resume_path, ("last.model",), flag="resume_path")
    state = load_state_dict(file, flag="resume_path")
    net = load_net(
        "feature",
        state,
        model=flags.of(ModelSpec, only=["model"]).model,
        n_shifts=shift_spec.count,
        path=file,
        flag="resume_path",
        strict=not flags.of(WeightsSpec, only=["no_strict"]).no_strict,
        **flags.asked(ModelSpec, "simclr_dim", "projector_layers"),
    )
    split.check_trained(read_facts(file).get("data", {}), file, flag="resume_path")
    first_epoch, epochs = start_epoch(file), flags.of(LengthSpec).epochs
    if epochs <= first_epoch:
        raise UserError(
            f"--epochs {epochs}: stage 1 ended at epoch {first_epoch} and stage 2 counts on from there;"
            f" for n epochs of stage 2 give {first_epoch} + n"
        )
    if any(step >= sparse.sr_admm_stage for step in loss_spec.steps):
        raise UserError(f"--loss_sr_deep_supervision: steps are counted from 0 to {sparse.sr_admm_stage - 1}")
    transform, seed = flags.of(FeatureTransform), flags.seed
    bank = DictionaryBank(
        shift_spec.count,
        transform.size(net),
        sparse.sr_dict_size,
        sparse.coding,
        generator(seed, "dictionary"),
    )
    if loss_spec.loss_dict_margin and shift_spec.count < 2:
        raise UserError("--loss_dict_margin: with one shift there is no other dictionary; leave it out")
    model = CocsrNet(net, bank, transform).to(device).train()
    data, aligned = training_images(split, shift_spec, spec, device)
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    for line in idle_notes(flags, sparse, learning, loss_spec):
        print(line)
    if learning.freeze_sr_dict:
        bank.requires_grad_(False)
    else:
        optimizers = (
            torch.optim.Adam(bank.parameters(), learning.sr_lr, weight_decay=learning.sr_decay_lr, fused=True),
        )
    shifts, amp = shift_spec.functions(aligned), precision(flags, world)
    norm = loss_spec.loss_dict_constr_value
    # A pass over the set as evaluation makes it: of whole pictures, cropped here.
    draws = (
        DrawSpec(shift_spec.functions(spec), spec, seed, "k-means draw", flags.of(PassSpec).ood_batch_size)
        if learning.ini_sr_dict_train or sparse.sr_lambda_rel is not None or sparse.sr_rho_auto
        else None
    )
    render, micro_batch = view_renderer(flags), micro_batch_size(flags)
    if flags.of(CompileSpec).compile:
        model.feature_net.compile()

    def begin(run: Run) -> None:
        if draws is not None:
            s_KNF = training_features(model, data, draws, world, at_least=2 * sparse.sr_dict_size, amp=amp)
            if learning.ini_sr_dict_train:
                run.say(f"k-means: {sparse.sr_dict_size} centres for each of {len(shifts)} shifts")
            if learning.ini_sr_dict_train and world.is_main:
                # A generator on the CPU gives the same draws on every device.
                centres = kmeans(s_KNF, sparse.sr_dict_size, generator=generator(seed, "k-means"))
                bank.set_atoms(centres.mT, norm)
            world.broadcast(bank.parameters())
            largest = lambda_max(bank.dictionary.detach(), s_KNF.mT).cpu()
            if sparse.sr_lambda_rel is not None:
                bank.set_lambda(sparse.sr_lambda_rel * largest.median().item())
            share = bank.coding.lam / largest.median().item()
            run.say(
                f"lambda {bank.coding.lam:.4g}, {share:.2g} of the median lambda_max of features in their dictionaries"
            )
            if sparse.sr_rho_auto:
                run.say(bank.choose_rho(s_KNF.mT))
            world.broadcast(bank.buffers())
            bank.follow_buffers()
        run.keep(START, model.state_dict(), first_epoch)

    def losses(batch: Batch) -> Step:
        gen = generator(seed, "augment", batch.epoch, batch.step, device=device)
        views = train_views(batch.images, shifts, aligned, gen, render, batch.shard)
        with amp():
            s = forward_in_micro_batches(model, views, batch.shard.size, micro_batch).s
        return dictionary_step(bank, s.unflatten(0, (len(shifts), -1)).mT, loss_spec, micro_batch, batch.shard)

    def finish(run: Run) -> None:
        try:
            start = load_tensors(run.folder / START, flag="resume_path")
        except UserError as error:
            run.say(f"note: whether the frozen network stayed as it was is not known ({error})")
            return
        end = {k: v.cpu() for k, v in model.state_dict().items()}
        check_frozen(start, end)
        run.say(moved(start["sr_nets.dictionary"], end["sr_nets.dictionary"], trained=bool(optimizers)))

    def show(epoch: int) -> Shown:
        views = few_views(data, shifts, aligned, seed, epoch)
        with torch.no_grad(), amp():
            s = model(views.flatten(0, 1)).s
            codes = bank.code(s.unflatten(0, (len(shifts), -1)).mT).codes
        return Shown({"views/shifts": sheet(views)}, {"sr/codes": codes[codes != 0]} if codes.any() else {})

    return Recipe(
        model,
        data,
        losses,
        optimizers,
        lambda epoch: learning.sr_lr,
        begin=begin,
        show=show,
        checks=_CHECKS,
        finish=finish,
        first_epoch=first_epoch,
    )


def dictionary_step(
    bank: DictionaryBank,
    s_KFB: Tensor,
    spec: DictionaryLossSpec,
    micro_batch: int | None = None,
    shard: Shard | None = None,
) -> Step:
    """The losses of one batch of features, each coded in its own shift's dictionary only. s (K, F, B).

    Sums over the batch, as published: the learning rate goes with the batch size. The gradient flows through the
    unrolled steps, unless the codes are detached. Deep supervision adds the fit and l1 terms of earlier steps.
    micro_batch: samples of each shift that are coded at a time. shard: whose images s is of, where other ranks have
    the others of the batch.
    Watched: lambda as a share of the mean lambda_max, mean optimality gap relative to lambda, mean norm of the atoms,
    share of zero codes, share of atoms that no sample of the batch uses.
    """
    shard = shard or Shard(s_KFB.shape[2])
    batch, idle = shard.batch, shard.num_real == 0
    # A process without an image of its own codes one for nothing, since all have to take part in the sums.
    s_KFB = s_KFB[:, :, : max(shard.num_real, 1)]
    if micro_batch is None or micro_batch >= s_KFB.shape[2]:
        fit, l1, margin, gap, used = sample_terms(bank, s_KFB, spec)
    else:
        system = bank.system()
        parts = [checkpointed(sample_terms, bank, s, spec, system) for s in s_KFB.split(micro_batch, 2)]
        fit, l1, margin, gap, used = (torch.stack(x).sum(0) for x in zip(*parts, strict=True))
    largest = lambda_max(bank.dictionary.detach(), s_KFB.detach()).sum()
    if shard.world.size > 1:
        sums = torch.cat([torch.stack([fit, l1, margin, gap, largest]), used.flatten()])
        sums = shard.all_reduce(sums * 0 if idle else sums)
        fit, l1, margin, *rest = sums[:5]
        (gap, largest), used = (x.detach() for x in rest), sums[5:].detach().view_as(used)
    constraint = shard.count_once(atom_norm(bank.dictionary, spec.loss_dict_constr_mode, spec.loss_dict_constr_value))
    losses = {
        "sr": spec.loss_lambda_sr * fit,
        "sr_l1": spec.loss_lambda_sr_l1 * l1,
        "sr_dict": spec.loss_lambda_dict_constr * constraint,
    }
    if spec.loss_dict_margin:
        losses["sr_margin"] = spec.loss_dict_margin * margin
    watch = {
        "sr/gap": gap / (len(s_KFB) * batch) / bank.coding.lam,
        "sr/lambda_share": bank.coding.lam * len(s_KFB) * batch / largest,
        "sr/atom_norm": bank.dictionary.detach().norm(dim=1).mean(),
        "sr/sparsity": 1 - used.mean() / batch,
        "sr/dead_atoms": (used == 0).float().mean(),
    }
    return Step(losses, watch)


def sample_terms(
    bank: DictionaryBank, s_KFB: Tensor, spec: DictionaryLossSpec, system: RidgeSystem | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums over samples: the fit, l1 and margin terms of the loss, the optimality gaps, and how many use each atom,
    (K, M)."""
    codes, gap, also = bank.code(s_KFB, also=spec.steps, system=system)
    used = [c.detach() if spec.loss_dict_detach_sr_coef else c for c in (codes, *also)]
    terms = [code_terms(bank.dictionary, c, s_KFB) for c in used]
    fit, l1 = (torch.stack(x).sum() for x in zip(*terms, strict=True))
    margin = fit.new_zeros(())
    if spec.loss_dict_margin:
        s_FV = s_KFB.transpose(0, 1).flatten(1)
        every = bank.code(s_FV, system=system).codes
        every = every.detach() if spec.loss_dict_detach_sr_coef else every
        costs = lasso_objective(bank.dictionary, s_FV, every, bank.coding.lam)
        margin = margin_terms(costs.unflatten(1, (len(s_KFB), -1)), spec.loss_dict_margin_temperature)
    return fit, l1, margin, gap.sum(), (codes.detach() != 0).float().sum(2)


def training_features(
    model: CocsrNet,
    data: ImageSet | PictureSet,
    draws: DrawSpec,
    world: World = SINGLE,
    *,
    at_least: int,
    amp: Amp = nullcontext,
) -> Tensor:
    """SR features of augmented training images by shift, (K, passes * N, F), in as many passes as give `at_least`.

    Several processes take some batches of each pass, and get the features of all. amp: the network's precision.
    """

    def features(views: Tensor) -> Tensor:
        with amp():
            return model(views).s

    passes = -(-at_least // len(data))
    rows = [s for t in range(passes) for s in _one_pass(features, data, draws, t, world)]
    return torch.cat(rows).transpose(0, 1)


def _one_pass(
    features: Callable[[Tensor], Tensor], data: ImageSet | PictureSet, draws: DrawSpec, t: int, world: World
) -> Iterator[Tensor]:
    own = (features(views).unflatten(0, (len(index), -1)) for index, views in draw_views(data, draws, t, world=world))
    if world.size == 1:
        yield from own
        return
    for part in world.all_gather_object([s.cpu() for s in own]):
        yield from (s.to(data.device) for s in part)


def check_frozen(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Compare two state dicts of stage 2.

    Raises: RuntimeError where a tensor of the frozen network, `feature_net.*`, changed by a single bit.
    """
    frozen = [k for k in before if k.startswith("feature_net.")]
    changed = [k for k in frozen if not torch.equal(before[k], after[k])]
    if changed:
        raise RuntimeError(f"the frozen network changed in stage 2: {', '.join(changed)}")


def moved(start: Tensor, end: Tensor, *, trained: bool) -> str:
    """A line on how far the dictionary is from its start, relative to the start's norm, and why if it hardly moved."""
    change = float((end - start).norm() / start.norm())
    line = f"frozen network unchanged, bit for bit; dictionary changed by {change:.2e} (relative)"
    if not trained:
        return f"{line}: --freeze_sr_dict keeps the starting atoms"
    if change < _MOVED:
        return f"{line}: hardly trained; more --epochs or a larger --sr_lr moves it"
    return line
