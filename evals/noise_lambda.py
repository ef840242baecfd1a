"""Noise x lambda of the stem of an SDNet: lines that predict lambda from the residual, fitted to training images with
known noise, and what they are worth on test images.

Letters: N images of a set, b of a batch, K views of an image, v = b K views of a batch, C classes (or shifts that are
told apart), S lambdas of the grid, L levels of noise, of which level 0 is none.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common.device import Amp, autocast
from common.dist import World
from common.errors import UserError
from common.flags import DeviceSpec
from common.progress import progress
from common.seed import generator
from datasets import DATASETS, ImageSet, PictureSet, ShiftSpec
from datasets.augment import AlignedSpec
from datasets.noise import LEVELS, cifar10c, noisy
from datasets.sets import derived, image_set
from datasets.views import DrawSpec, PassSpec, batches_of, draw_set, set_views, shift_labels
from evals.classify import Predict, linear_logits
from evals.extract import CONTRASTIVE, LABELLED, ROT_TRANS, Extractor
from evals.result import Result
from evals.specs import SAME, NoiseLambdaSpec
from evals.trained import Trained, evaluation_mode, identity, load_other, settings_of
from models.checkpoint import kind_of
from models.csc import stem_of
from models.lambda_line import MEASURES, LambdaLine, fit_line, fixed, measured

# What lambda is predicted for.
PER = ("set", "batch", "image")
# Columns of the table: how lambda is chosen, where it is predicted by which measure of the residual and for what.
# `oracle` alone sees labels of test images.
PREDICTED = tuple(f"{measure}_{per}" for measure in MEASURES for per in PER)
COLUMNS = ("control", "fixed", *PREDICTED, "oracle")
CLEAN = 0
_CALIBRATION = "calibration images"
# Test images of each class of CIFAR-10.
_OF_CLASS = 1000
# Pictures that are decoded at a time.
_DECODED = 256


@dataclass(frozen=True)
class Task:
    """What a network is asked for every view, and what the answer should be.

    extractor: which network, under which views. logits: (network, views (v, 3, H, W)) -> (v, C).
    labels: (those of the images (b,), K) -> (v,), of views that stand image by image.
    calibration: training images that lines are fitted to; no test label is used.
    named: whether the answer is the class.
    """

    extractor: Extractor
    logits: Predict
    labels: Callable[[Tensor, int], Tensor]
    calibration: Callable[[Trained], ImageSet | PictureSet]
    named: bool = False


def _held_out(trained: Trained) -> ImageSet | PictureSet:
    """Training images that training did not see: of those it saw, noise hides nothing that it has learnt by heart."""
    split = trained.split
    if split.one_class_idx is not None:
        raise UserError(f"--one_class_idx: --mode {trained.flags.mode} names all classes; leave it out")
    return trained.unseen_images("lambda is calibrated")


def _shifts(labels: Tensor, shifts: int) -> Tensor:
    return shift_labels(shifts, 1, len(labels), labels.device)


CLASSES = Task(LABELLED, linear_logits, lambda labels, shifts: labels, _held_out, named=True)
SHIFTS = Task(CONTRASTIVE, lambda net, views: net(views).shift, _shifts, Trained.train_images)
ROTATIONS = Task(
    replace(ROT_TRANS, shifts=lambda flags, needs: ShiftSpec("rotation").functions()),
    lambda net, views: net(views).rotation,
    _shifts,
    Trained.train_images,
)


class Seen(NamedTuple):
    """What a set of images gave.

    accuracy (S,): at each lambda of the grid. residual: the mean at the reference, by measure. predicted: by name of a
    line and then of `PER`, the accuracy. lambdas: likewise, the mean of what was predicted. control: its accuracy.
    """

    accuracy: np.ndarray
    residual: dict[str, float]
    predicted: dict[str, dict[str, float]]
    lambdas: dict[str, dict[str, float]]
    control: float | None

    def facts(self) -> dict[str, Any]:
        """As JSON knows it."""
        return self._asdict() | {"accuracy": self.accuracy.tolist()}


@dataclass(frozen=True)
class Bench:
    """The network under every lambda, on the views of its task.

    grid: S lambdas in rising order. reference: the index of that of training. tick: called once a pass of a batch.
    """

    net: nn.Module
    control: nn.Module | None
    task: Task
    views: DrawSpec
    amp: Amp
    world: World
    grid: tuple[float, ...]
    reference: int
    tick: Callable[[], object] = lambda: None

    def passes(self, lines: int) -> int:
        """How often a batch goes through a network under so many lines."""
        return len(self.grid) + len(PER) * lines + (self.control is not None)

    def batches(self, images: ImageSet) -> int:
        """How many batches of a set this rank has."""
        return len(self.world.shard_list(batches_of(images, self.views)))

    @torch.inference_mode()
    def see(self, images: ImageSet, lines: Mapping[str, LambdaLine], control: bool = False) -> Seen:
        """All lambdas of the grid, and those that lines predict. control: whether the other network sees them, too."""
        lam0, net = self.grid[self.reference], self.net
        n = len(images) * len(self.views.shifts)
        right: dict[Any, Tensor | int] = {}
        residuals: list[Tensor] = []  # of each batch, (measures, v)
        row = {measure: n for n, measure in enumerate(MEASURES)}

        def count(key: Any, ask: nn.Module, setting: AbstractContextManager[Any] | None, batch: "_Batch") -> None:
            right[key] = right.get(key, 0) + self._right(ask, setting, batch)

        for batch in self._batches(images):
            with measured(net, lam0) as last:
                count(self.reference, net, fixed(net, lam0), batch)
                residual = torch.stack([measure(last()) for measure in MEASURES.values()])
            residuals.append(residual)
            for index, lam in enumerate(self.grid):
                if index != self.reference:
                    count(index, net, fixed(net, lam), batch)
            for name, line in lines.items():
                own = residual[row[line.measure]]
                count((name, "image"), net, fixed(net, line.predict(own)), batch)
                count((name, "batch"), net, fixed(net, line.predict(own.mean())), batch)
            if control and self.control is not None:
                count("control", self.control, None, batch)
        # In float64 and in the order of the batches, whatever the ranks.
        parts = self.world.all_gather_object([part.double().cpu() for part in residuals])
        of_batch = list(chain.from_iterable(parts))
        of_image = torch.cat(of_batch, 1)
        # Of each image, what is predicted from its own residual, from the mean of its batch and from that of all.
        means = [part.mean(1, keepdim=True).expand_as(part) for part in of_batch]
        known = {"set": of_image.mean(1, keepdim=True), "batch": torch.cat(means, 1), "image": of_image}
        lambdas = {
            name: {per: float(line.predict(known[per][row[line.measure]]).mean()) for per in PER}
            for name, line in lines.items()
        }
        for batch in self._batches(images) if lines else ():
            for name in lines:
                count((name, "set"), net, fixed(net, lambdas[name]["set"]), batch)
        totals = self._totals(right)
        share = {key: total / n for key, total in totals.items()}
        return Seen(
            np.array([share[index] for index in range(len(self.grid))]),
            {measure: float(known["set"][n]) for measure, n in row.items()},
            {name: {per: share[name, per] for per in PER} for name in lines},
            lambdas,
            share.get("control"),
        )

    def _batches(self, images: ImageSet) -> Iterator["_Batch"]:
        draw, shifts = draw_set(images, self.views, 0), len(self.views.shifts)
        labels = images.labels.to(images.device)
        # Test images often come sorted by class; a batch of a single one tells more of the class than of the noise.
        order = torch.randperm(len(images), generator=generator(self.views.seed, "order of noise x lambda"))
        order = order.to(images.device)
        for index in map(order.__getitem__, self.world.shard_list(batches_of(images, self.views))):
            yield _Batch(set_views(images, self.views, draw, index), self.task.labels(labels[index], shifts))

    def _right(self, net: nn.Module, setting: AbstractContextManager[Any] | None, batch: "_Batch") -> Tensor:
        """How many views are told right; it stays on the device."""
        if setting is None:
            with self.amp():
                logits = self.task.logits(net, batch.views)
        else:
            with setting, self.amp():
                logits = self.task.logits(net, batch.views)
        self.tick()
        return (logits.argmax(1) == batch.labels).sum()

    def _totals(self, right: Mapping[Any, Tensor | int]) -> dict[Any, int]:
        """The counts of all ranks, read off the device once."""
        own = torch.stack([torch.as_tensor(count) for count in right.values()]).tolist() if right else []
        parts = self.world.all_gather_object(dict(zip(right, own, strict=True)))
        return {key: sum(part.get(key, 0) for part in parts) for part in parts for key in part}


class _Batch(NamedTuple):
    """Views (v, 3, H, W) in [0, 1] and their labels (v,)."""

    views: Tensor
    labels: Tensor


def best_lambda(accuracy: np.ndarray, grid: Sequence[float], reference: float) -> int:
    """The index of the lambda with the highest accuracy; of equals that closest to the reference, then the smaller.

    On some thousand images many are equal. Then nothing speaks for leaving the lambda that the network was trained at,
    and to take the smallest would leave it where the grid begins below it.
    """
    equal = np.flatnonzero(accuracy == accuracy.max()).tolist()
    return min(equal, key=lambda index: (round(abs(grid[index] - reference), 9), grid[index]))


class Calibration(NamedTuple):
    """One kind of noise on calibration images.

    levels, seen, best (the index of the best lambda): L each, the first without noise. lines: by measure.
    """

    levels: list[float | None]
    seen: list[Seen]
    best: list[int]
    lines: dict[str, LambdaLine]

    def facts(self, grid: Sequence[float]) -> dict[str, Any]:
        """As JSON knows it."""
        return {
            "levels": self.levels,
            "residual": {measure: [seen.residual[measure] for seen in self.seen] for measure in MEASURES},
            "best": [grid[index] for index in self.best],
            "accuracy": [seen.accuracy.tolist() for seen in self.seen],
        }


def calibrate(
    bench: Bench, levels: Mapping[str, Mapping[int, float]], measures: Sequence[str], images: ImageSet, seed: int
) -> dict[str, Calibration]:
    """For each kind of noise: the best lambda and the residual of each level, the clean one among them; their lines."""
    reference = bench.grid[bench.reference]
    clean, found = bench.see(images, {}), {}
    for kind, of_kind in levels.items():
        noise = partial(noisy, images, kind, seed=seed, name=_CALIBRATION)
        seen = [clean, *(bench.see(noise(level), {}) for level in of_kind.values())]
        best = [best_lambda(one.accuracy, bench.grid, reference) for one in seen]
        lambdas = [bench.grid[index] for index in best]
        lines = {
            measure: fit_line(
                [one.residual[measure] for one in seen], lambdas, bench.grid[0], bench.grid[-1], reference, measure
            )
            for measure in measures
        }
        found[kind] = Calibration([None, *of_kind.values()], seen, best, lines)
    return found


def noise_lambda(trained: Trained, *, task: Task) -> Iterator[Result]:
    """One result: accuracy under noise x lambda, the lines that predict lambda, and what their predictions are worth.

    Metrics: `<column>/<noise>`, of `COLUMNS`, the mean accuracy over levels of noise; `<column>/clean_<noise>` that
    without noise, where a prediction depends on the line. per_image: `table` has a row for each noise and level.
    Flags are read and images loaded before the result is asked for. All ranks get it.
    Raises: UserError for a network without sparse coding in its stem, lambdas without that of training, no images to
    calibrate on, and a level, a folder or a control that does not fit.
    """
    flags, split, world = trained.flags, trained.split, trained.world
    with world.raise_together():
        spec = flags.of(NoiseLambdaSpec)
        stem = stem_of(trained.net)
        if stem is None:
            raise UserError(f"--load_path: {trained.title} has no layer of sparse coding; --model sdnet8 has one")
        grid, reference = _grid(trained, spec, float(stem.lam))
        levels = _levels(spec)
        shifts = task.extractor.shifts(flags, ())
        if not task.named and len(shifts) < 2:
            raise UserError("--shift_trans_type: one shift cannot be told from others; lambda is calibrated by several")
        draws = DrawSpec(
            shifts,
            None if task.extractor.plain else flags.of(AlignedSpec),
            flags.seed,
            batch_size=max(1, flags.of(PassSpec).ood_batch_size // max(1, len(shifts) // 8)),
        )
        images = _some(task.calibration(trained), spec.calibration_images, flags.seed).to(trained.device)
        test = split.test()
        test = test.where(split.normal(test.labels)).to(trained.device)
        tests = partial(_noisy_tests, trained, spec, test)
        if spec.cifar10c is not None:
            _check_cifar10c(trained, spec, test)
        control = _control(trained, spec, len(shifts))
        for one, title in ((trained.net, trained.title), (control, spec.control_path)):
            there = split.n_classes if one is None or not task.named else one.get_submodule("linear").out_features
            if there != split.n_classes:
                raise UserError(f"--dataset: it has {split.n_classes} classes, but {title} knows {there}")
        amp = autocast(flags.of(DeviceSpec, only=["amp"]).amp, trained.device)
    net = task.extractor.network(trained.net)
    bench = Bench(net, control, task, draws, amp, world, grid, reference)
    asked = {kind: levels[kind] for kind in spec.noises}
    of = {kind: kind if spec.line_of == SAME else spec.line_of for kind in asked}

    def results() -> Iterator[Result]:
        sets = {"calibration": 1 + sum(map(len, levels.values())), "test": 1 + sum(map(len, asked.values()))}
        text, total = _work(bench, sets, len(set(of.values())), len(spec.measures), images, test)
        print(text, flush=True)
        ticks = progress(range(total), total=total, label="noise x lambda")
        running = replace(bench, tick=partial(next, ticks, None))
        with evaluation_mode(net):
            found = calibrate(running, levels, spec.measures, images, flags.seed)
            lines = {kind: _named(kind, calibration.lines) for kind, calibration in found.items()}
            every = {name: line for kind in dict.fromkeys(of.values()) for name, line in lines[kind].items()}
            clean = running.see(test, every, control=True)
            data = {_CALIBRATION: identity(images), split.dataset: identity(test)}
            seen: dict[str, dict[int, Seen]] = {}
            for kind in asked:
                seen[kind] = {CLEAN: clean}
                for number, level in asked[kind].items():
                    images_there = tests(kind, number, level)
                    if spec.cifar10c is not None:
                        data[f"CIFAR-10-C {kind} {number}"] = identity(images_there)
                    seen[kind][number] = running.see(images_there, lines[of[kind]], control=True)
        next(ticks, None)
        facts = {
            "data": data,
            # A prediction per batch depends on its size.
            "settings": {**settings_of(flags), "ood_batch_size": flags.of(PassSpec).ood_batch_size},
            "n": len(test),
            "n_calibration": len(images),
            "views": len(shifts),
            "lambda": grid[reference],
            "lambdas": list(grid),
            "levels": {kind: [None, *of_kind.values()] for kind, of_kind in asked.items()},
            "line_of": of,
            "lines": {
                kind: {measure: asdict(line) for measure, line in calibration.lines.items()}
                for kind, calibration in found.items()
            },
            "calibration": {kind: calibration.facts(grid) for kind, calibration in found.items()},
            "test": {
                kind: {str(number): one.facts() for number, one in of_kind.items()} for kind, of_kind in seen.items()
            },
        }
        rows = [
            _row(bench, kind, number, level, one, lines[of[kind]])
            for kind in asked
            for (number, one), level in zip(seen[kind].items(), [None, *asked[kind].values()], strict=True)
        ]
        yield Result("noise_lambda", _metrics(rows), {"table": _columns(rows)}, facts)

    return results()


def _named(kind: str, lines: Mapping[str, LambdaLine]) -> dict[str, LambdaLine]:
    """The lines of one kind of noise, with names that are of this kind alone."""
    return {f"{kind} {measure}": line for measure, line in lines.items()}


def _row(
    bench: Bench, kind: str, number: int, level: float | None, seen: Seen, lines: Mapping[str, LambdaLine]
) -> dict[str, Any]:
    """A row of the table: accuracies by column, the residual, and which lambda was chosen."""
    oracle = best_lambda(seen.accuracy, bench.grid, bench.grid[bench.reference])
    columns = [(f"{line.measure}_{per}", name, per) for name, line in lines.items() for per in PER]
    return {
        "noise": kind,
        "number": number,
        "level": np.nan if level is None else level,
        **{f"residual_{measure}": value for measure, value in seen.residual.items()},
        **dict.fromkeys(COLUMNS, np.nan),
        "control": np.nan if seen.control is None else seen.control,
        "fixed": float(seen.accuracy[bench.reference]),
        **{column: seen.predicted[name][per] for column, name, per in columns},
        "oracle": float(seen.accuracy[oracle]),
        **{f"lambda_{column}": seen.lambdas[name][per] for column, name, per in columns},
        "lambda_oracle": bench.grid[oracle],
    }


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.array([row[name] for row in rows], dtype=object if name == "noise" else None) for name in rows[0]}


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over levels, by column and noise, and the accuracy without noise."""
    found: dict[str, float] = {}
    for column in COLUMNS:
        if np.isnan(rows[0][column]):
            continue
        for kind in dict.fromkeys(row["noise"] for row in rows):
            of_kind = [row[column] for row in rows if row["noise"] == kind]
            found[f"{column}/{kind}"] = float(np.mean(of_kind[1:]))
            found[f"{column}/clean_{kind}"] = of_kind[0]
    return found


def _work(
    bench: Bench, sets: Mapping[str, int], kinds: int, measures: int, images: ImageSet, test: ImageSet
) -> tuple[str, int]:
    """What is to do, as a line, and how many passes of batches that is for this rank.

    sets: of calibration and of test images. kinds: of noise whose lines clean test images are seen under.
    """
    calibration = sets["calibration"] * len(bench.grid)
    tests = bench.passes(kinds * measures) + (sets["test"] - 1) * bench.passes(measures)
    total = len(bench.views.shifts) * (calibration * len(images) + tests * len(test))
    text = (
        f"noise x lambda: {sets['calibration']} sets of {len(images)} calibration images and {sets['test']} of"
        f" {len(test)} test images under {len(bench.grid)} lambdas and those predicted: {total:,} images through the"
        " network"
    )
    return text, calibration * bench.batches(images) + tests * bench.batches(test)


def _grid(trained: Trained, spec: NoiseLambdaSpec, lam: float) -> tuple[tuple[float, ...], int]:
    """The lambdas in rising order, and which of them is that of training."""
    values = sorted(set(spec.lambdas))
    # A layer keeps it as a float32.
    same = [value for value in values if np.float32(value) == np.float32(lam)]
    if not same and trained.flags.given("lambdas"):
        raise UserError(f"--lambdas: {trained.title} was trained with lambda {lam:g}; it must be among them")
    reference = same[0] if same else lam
    grid = tuple(sorted({*values, reference}))
    return grid, grid.index(reference)


def _levels(spec: NoiseLambdaSpec) -> dict[str, dict[int, float]]:
    """The levels by their numbers, from 1, of each kind of noise that is asked for or whose line is."""
    kinds = dict.fromkeys([*spec.noises, *([] if spec.line_of == SAME else [spec.line_of])])
    found = {}
    for kind in kinds:
        all_levels = dict(enumerate(LEVELS[spec.noise_protocol][kind], 1))
        numbers = sorted(set(spec.noise_levels or all_levels))
        if numbers[-1] > len(all_levels):
            raise UserError(
                f"--noise_levels {numbers[-1]}: {kind} noise of {spec.noise_protocol} has levels 1 to {len(all_levels)}"
            )
        found[kind] = {number: all_levels[number] for number in numbers}
    return found


def _some(images: ImageSet | PictureSet, count: int, seed: int) -> ImageSet:
    """So many of the images, or all there are, chosen by the seed, in their order and in memory."""
    if not len(images):
        raise UserError("--calibration_images: there is no image to calibrate lambda on")
    drawn = torch.randperm(len(images), generator=generator(seed, _CALIBRATION))[:count].sort().values
    if isinstance(images, ImageSet):
        return images.where(torch.isin(torch.arange(len(images)), drawn))
    pixels = torch.cat([(images.batch(part) * 255).round().byte().cpu() for part in drawn.split(_DECODED)])
    chosen = derived(images.fingerprint, drawn.numpy().tobytes())
    return replace(image_set(pixels, images.labels[drawn]), indices=drawn, fingerprint=chosen)


def _noisy_tests(
    trained: Trained, spec: NoiseLambdaSpec, test: ImageSet, kind: str, number: int, level: float
) -> ImageSet:
    """The test images under one level of noise: our own, or those of CIFAR-10-C."""
    if spec.cifar10c is None:
        return noisy(test, kind, level, trained.flags.seed)
    found = cifar10c(spec.cifar10c, kind, number)
    return found.where(trained.split.normal(found.labels)).to(trained.device)


def _check_cifar10c(trained: Trained, spec: NoiseLambdaSpec, test: ImageSet) -> None:
    """Raises: UserError, now and not after the calibration, where the arrays are not the test images of this data."""
    if spec.noise_protocol != "cifar10c":
        raise UserError(
            f"--noise_protocol {spec.noise_protocol}: --cifar10c has the levels of cifar10c; leave one of the two out"
        )
    classes = trained.split.class_names[: trained.split.n_classes]
    if classes != DATASETS["cifar10"].classes(trained.split.source) or test.size != (32, 32):
        raise UserError("--cifar10c: it has the classes of CIFAR-10 and 32 pixels, the data has others; leave it out")
    if test.labels.bincount(minlength=len(classes)).tolist() != [_OF_CLASS] * len(classes):
        raise UserError(f"--cifar10c: it has {_OF_CLASS} test images of each class, the data has others; leave it out")
    for kind, of_kind in _levels(spec).items():
        if kind in spec.noises:
            cifar10c(spec.cifar10c or "", kind, next(iter(of_kind)))


def _control(trained: Trained, spec: NoiseLambdaSpec, shifts: int) -> nn.Module | None:
    """The network of --control_path, as it was trained."""
    if spec.control_path is None:
        return None
    own = trained.net
    kind = kind_of(getattr(own, "feature_net", own).state_dict())
    sizes: dict[str, Any] = {"n_shifts": shifts} if kind == "feature" and shifts > 1 else {}
    net, _ = load_other(trained, spec.control_path, flag="control_path", kind=lambda state: kind, **sizes)
    return net
