"""Detection: every test image is scored, and scores of normal images are compared with those of others."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from datasets import DataSource, ImageSet, PictureSet
from datasets.noise import CORRUPTIONS, NONE, SEVERITIES, TestNoiseSpec
from datasets.one_class import TEST
from datasets.outliers import INTERP, MULTI_CLASS, OutlierSpec, TestBatchSpec, find_outliers, outlier_flags
from evals.attacked import Attacked, Attacker, Chosen, Plan, attack_detector
from evals.coding import Outputs
from evals.extract import Extraction, Extractor, reference_pool
from evals.metrics import auroc, detection_metrics
from evals.result import Result
from evals.scores import SCORES, Scorer, SumScore, chosen_scores
from evals.specs import ALL, CorruptionsSpec, ReferenceSpec, SumSpec
from evals.trained import Trained, identity, settings_of
from evals.weighing import Weighing, turned_set, weigh
from models.mean_sparse import alpha_of
from models.sparse.dictionary import CODE_FACTS


def detect(
    trained: Trained, *, extractor: Extractor, scores: Sequence[str], partner: str = "neighbour"
) -> Iterator[Result]:
    """One result for each score of --ood_score, and for their sum, if it is asked for: AUROC and others against every
    class and every set of --ood_dataset.

    scores: that can be made of the extractor's outputs, the default first. partner: what test images mix with under a
    mixing shift, their `neighbour` or a `reference` training image.
    Flags are read and test images loaded before the first result is asked for. All ranks get all results.
    Raises: UserError for a score that is not offered, data sets that are not found (all of them at once), nothing to
    compare, and non-finite scores.
    """
    flags = trained.flags
    with trained.world.raise_together():
        names = chosen_scores(flags, scores)
        options: dict[str, Any] = {name: flags.of(SCORES[name].options) for name in names}
        needs = frozenset[str]().union(*(SCORES[name].scorer.needs for name in names), CODE_FACTS)
        extraction = Extraction.of(extractor, trained, needs)
        references = flags.of(ReferenceSpec).refmix_batch_size if partner == "reference" else 0
        loaded = _loaded_sets(trained)
        corrupted = _corruptions(trained)
        tests = _test_sets(trained, loaded)
        train = trained.train_images() if any(SCORES[name].fitted for name in names) else None
        plan = Plan.of(flags, extraction.random)
        held_out = _held_out(trained, names) if flags.of(SumSpec).score_sum else None
        if plan:
            plan.check({name: SCORES[name].scorer for name in names}, extraction.random, alpha_of(trained.net) > 0)
    flags_of = {name: {f.name for f in fields(options[name])} for name in names}
    total = "+".join(names)
    if held_out is not None:
        flags_of[total] = {"score_sum"}.union(*flags_of.values())

    def results() -> Iterator[Result]:
        nonlocal train, held_out
        fitted, known, data, pool = extraction, Outputs(), {}, None
        if train is not None:
            fitted, known = extraction.fit(train)
            data = {"training": identity(train)}
            pool = reference_pool(train, references, flags.seed) if references else None
        train = None
        data |= {title: identity(images) for title, images in tests.items()}
        scorers = {name: SCORES[name].fit(known, options[name]) for name in names}
        del known
        of_sum: dict[str, Any] = {}
        if held_out is not None:
            weighing = _weighing(trained, fitted, scorers, held_out, pool)
            of_sum = {"data": {**data, "held out": identity(held_out)}, "weighing": weighing.facts}
            scorers[total] = SumScore(dict(scorers), weighing.terms)
        held_out = None
        found = {
            title: _score(fitted, scorers, images, f"{title} test images", pool) for title, images in tests.items()
        }
        codes = _of_codes(found)
        under = {}
        for kind, severity in corrupted:
            noise = TestNoiseSpec(kind, severity=severity, seed=flags.seed)
            sets = _test_sets(trained, loaded, noise)
            of = {
                title: _score(fitted, scorers, images, f"{kind} {severity}, {title} test images", pool)
                for title, images in sets.items()
            }
            under[kind, severity] = {
                name: _mean(trained, sets, {t: columns[name] for t, columns in of.items()}) for name in scorers
            }
        for name in scorers:
            foreign = frozenset(chain.from_iterable(flags_of.values())) - flags_of[name]
            facts = {"data": data, "settings": settings_of(flags, foreign)} | (of_sum if name == total else {})
            scores = {title: columns[name] for title, columns in found.items()}
            result = _result(trained, name, tests, scores, codes, facts)
            if corrupted:
                result = _with_corruptions(result, {at: auroc_of[name] for at, auroc_of in under.items()})
            if plan:
                attacker = Attacker(fitted, scorers[name], pool, plan.runs, flags.seed)
                result = _with_attack(result, attack_detector(plan, attacker, _chosen(trained, tests, plan)))
            yield result

    return results()


def _held_out(trained: Trained, names: Sequence[str]) -> ImageSet:
    """The images by which terms of a sum are weighed. Raises: UserError for one score, and as `unseen_images`."""
    if len(set(names)) < 2:
        raise UserError(f"--score_sum: there is one score, {names[0]}; give several (--ood_score)")
    found = trained.unseen_images("the scores of a sum are weighed")
    return (found.loaded() if isinstance(found, PictureSet) else found).to(trained.device)


def _weighing(
    trained: Trained,
    extraction: Extraction,
    scorers: dict[str, Scorer],
    held_out: ImageSet,
    references: Tensor | None,
) -> Weighing:
    """What each score counts in their sum. Raises: UserError for non-finite scores."""
    normal = _score(extraction, scorers, held_out, "held-out images", references)
    turned = _score(extraction, scorers, turned_set(held_out), "held-out images, turned", references)
    _check_finite(trained, (found[name] for found in (normal, turned) for name in scorers))
    probabilities = [name for name in scorers if SCORES[name].probability]
    return weigh({name: normal[name] for name in scorers}, turned, probabilities)


def _chosen(trained: Trained, tests: dict[str, ImageSet], plan: Plan) -> list[Chosen]:
    """The images that are attacked, by set, that with normal ones first."""
    own, *others = tests
    normal = trained.split.normal(tests[own].labels.cpu())
    choose = partial(Chosen.of, n=plan.images, seed=plan.seed)
    return [
        choose(own, tests[own], normal, name_of),
        *(choose(title, tests[title], torch.zeros(len(tests[title]), dtype=torch.bool)) for title in others),
    ]


def _with_attack(result: Result, attacked: Attacked) -> Result:
    """The result with what attacks have found."""
    return result._replace(
        metrics=result.metrics | attacked.metrics,
        per_image={title: {**columns, **attacked.columns[title]} for title, columns in result.per_image.items()},
        facts={**result.facts, "attack": attacked.facts},
    )


def _score(
    extraction: Extraction, scorers: dict[str, Scorer], images: ImageSet, label: str, references: Tensor | None
) -> dict[str, np.ndarray]:
    """Each score of all images (N,), and `CODE_FACTS` of their codes where they have any.

    Batch by batch: of an image nothing stays but its scores, which all ranks get.
    """
    own: list[dict[str, np.ndarray]] = []
    for outputs in extraction.blocks(images, label, references):
        own.append({name: scorer(outputs).numpy() for name, scorer in scorers.items()})
        own[-1] |= {name: outputs[name].mean((1, 2)).numpy() for name in CODE_FACTS if name in outputs}
    parts = list(chain.from_iterable(extraction.world.all_gather_object(own)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _of_codes(found: dict[str, dict[str, np.ndarray]]) -> dict[str, float]:
    """`CODE_FACTS` over all images, where there are codes: the mean of the gap, the medians of the others."""
    told = {
        name: np.concatenate([columns[name] for columns in found.values()])
        for name in CODE_FACTS
        if all(name in columns for columns in found.values())
    }
    return {name: float(values.mean() if name == "gap" else np.median(values)) for name, values in told.items()}


def _result(
    trained: Trained,
    name: str,
    tests: dict[str, ImageSet],
    scores: dict[str, np.ndarray],
    codes: dict[str, float],
    facts: dict[str, Any],
) -> Result:
    """The result of one score, whose values are `scores`, by set."""
    _check_finite(trained, scores.values())
    own, *others = tests
    labels = tests[own].labels.cpu()
    normal = trained.split.normal(labels).numpy()
    classes = _by_class(labels.numpy(), scores[own], normal)
    metrics = detection_metrics(scores[own][normal], classes, {title: scores[title] for title in others})
    n_out = sum(map(len, classes.values())) or sum(len(scores[title]) for title in others)
    class_names = {own: trained.split.class_names}
    per_image = {title: _columns(tests[title], values, class_names.get(title, [])) for title, values in scores.items()}
    return Result(name, metrics | codes, per_image, {**facts, "n_in": int(normal.sum()), "n_out": n_out})


def _check_finite(trained: Trained, scores: Iterable[np.ndarray]) -> None:
    """Raises: UserError for non-finite scores."""
    if not all(np.isfinite(values).all() for values in scores):
        flag = "--load_path: " if trained.path else ""
        raise UserError(f"{flag}{trained.title} gives non-finite scores; its weights are corrupt")


def _mean(trained: Trained, tests: dict[str, ImageSet], scores: dict[str, np.ndarray]) -> float:
    """The mean AUROC over classes, or over other sets where there is one class."""
    own, *others = tests
    labels = tests[own].labels.cpu()
    normal = trained.split.normal(labels).numpy()
    classes = _by_class(labels.numpy(), scores[own], normal) or {title: scores[title] for title in others}
    return float(np.mean([auroc(scores[own][normal], values) for values in classes.values()]))


def _corruptions(trained: Trained) -> list[tuple[str, int]]:
    """Kinds and severities of --corruptions. Raises: UserError beside --test_noise."""
    flags = trained.flags
    asked = flags.of(CorruptionsSpec).corruptions or ()
    if asked and TestNoiseSpec.of(flags).test_noise != NONE:
        raise UserError("--corruptions: they are of clean images; leave out --test_noise")
    kinds = tuple(CORRUPTIONS) if ALL in asked else tuple(dict.fromkeys(asked))
    return [(kind, severity) for kind in kinds for severity in SEVERITIES]


def _with_corruptions(result: Result, aurocs: dict[tuple[str, int], float]) -> Result:
    """The result with mean AUROCs under corruptions, by kind and severity."""
    kinds = dict.fromkeys(kind for kind, _ in aurocs)
    table = {kind: [aurocs[kind, severity] for severity in SEVERITIES] for kind in kinds}
    means = {f"corrupted/{kind}": float(np.mean(row)) for kind, row in table.items()}
    means["corrupted/mean"] = float(np.mean(list(aurocs.values())))
    return result._replace(metrics=result.metrics | means, facts={**result.facts, "corruptions": table})


def _by_class(labels: np.ndarray, values: np.ndarray, normal: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of the anomalous test images by class, under their published names."""
    return {name_of(label): values[labels == label] for label in np.unique(labels[~normal]).tolist()}


def name_of(label: int) -> str:
    """The published name of a class."""
    return f"one_class_{label}"


def _columns(images: ImageSet, scores: np.ndarray, class_names: Sequence[str]) -> dict[str, np.ndarray]:
    """index, label, score, for folders path, and the name of the class where there are any."""
    labels = images.labels.cpu().numpy()
    columns = {"index": images.indices.cpu().numpy(), "label": labels, "score": scores}
    if images.paths:
        columns["path"] = np.array(images.paths, dtype=object)
    if class_names:
        columns["class"] = np.array([class_names[label] for label in labels.tolist()], dtype=object)
    return columns


# By title: images, and the name of the set that draws of noise depend on.
_Loaded = dict[str, tuple[ImageSet, str]]


def _test_sets(
    trained: Trained, loaded: _Loaded | None = None, noise: TestNoiseSpec | None = None
) -> dict[str, ImageSet]:
    """The test images of the data set, and after them those they are compared with, by name, under noise.

    noise: by default that of --test_noise.
    """
    noise = noise or TestNoiseSpec.of(trained.flags)
    sets = loaded or _loaded_sets(trained)
    return {title: noise.applied(images, name).to(trained.device) for title, (images, name) in sets.items()}


def _loaded_sets(trained: Trained) -> _Loaded:
    """The sets of `_test_sets`: mixtures are made of clean images, then all get the noise of the split."""
    split = trained.split
    clean = split.clean_test()
    normal = split.normal(clean.labels)
    others = _other_sets(trained, clean.size[0], lambda: clean.where(normal))
    if normal.all() and not others:
        raise UserError(
            "--ood_dataset: every test image is of a normal class, there is nothing to detect; give --one_class_idx"
            " if the data set has several classes, or other data sets"
        )
    if not normal.any():
        raise UserError(f"--data_path: no test image of the normal class, {split.normal_title}")

    # By the fingerprint, so that the noise does not depend on the place of a folder.
    names = {title: images.fingerprint or title for title, images in others.items()}
    named = {split.dataset: (clean, TEST), **{title: (images, names[title]) for title, images in others.items()}}
    return {title: (split.corrupted(images, name), name) for title, (images, name) in named.items()}


def _other_sets(trained: Trained, side: int, normal: Callable[[], ImageSet]) -> dict[str, ImageSet]:
    """The sets of --ood_dataset, or those that all classes of the data set together are compared with, by name.

    They have no noise. side: pixels on a side of test images. normal: the normal ones, without noise.
    Raises: UserError that names all that are not found.
    """
    flags = trained.flags
    usual = MULTI_CLASS.get(trained.split.dataset, ()) if trained.split.one_class_idx is None else ()
    names = list(dict.fromkeys(flags.of(OutlierSpec, only=("ood_dataset",)).ood_dataset or usual))
    if trained.split.dataset in names:
        names.remove(trained.split.dataset)
        print(f"note: --ood_dataset {trained.split.dataset} is the normal data set itself; left out")
    if not names:
        return {}
    used = {flag for name in names for flag in outlier_flags(name)}
    source = flags.of(DataSource, only=used - {"data_path"})
    place = ""
    if "data_path" in used:
        own = flags.of(OutlierSpec, only=("ood_data_path",)).ood_data_path
        place = own or flags.of(DataSource, only=("data_path",)).data_path
    source = replace(source, data_path=place, image_size=side, normal=trained.split.source.normal)
    lag = flags.of(TestBatchSpec).test_batch_size if INTERP in names else 1
    return {name: load() for name, load in find_outliers(names, source, normal, lag=lag).items()}
