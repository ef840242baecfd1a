"""The detection modes: score every test image, report AUROC, write results beside the checkpoint."""

import csv
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch

from common.device import device_name, peak_memory
from common.dist import SINGLE, World
from common.errors import UserError
from common.files import write_json, write_text
from common.flags import Flags, pick
from common.run import describe_program
from datasets import DataSource, ImageSet
from datasets.outliers import INTERP, MULTI_CLASS, find_outliers, outlier_flags
from evals.detection import detect, quantile_line
from evals.evidence import Evidence, Finished
from evals.scores import SCORES, Score
from evals.subject import Subject, identity, load_subject
from evals.writing import place_for, read_json, set_name, settings_of

# Of the outputs, the optimality gap of codes.
_GAP = "gap"


def run_detection(
    flags: Flags, world: World = SINGLE, *, evidence: Evidence, trained_by: Sequence[str], reference: bool = False
) -> None:
    """Evaluate one checkpoint by `evidence`. reference: mix test images with reference training images.

    trained_by: modes of training whose weights make sense. world: of several processes each looks at some of the
    images, and the first reports.
    Raises: UserError as `load_subject`; for a score that the mode has not the means for; for missing data sets, all of
    them at once; for nothing to tell apart.
    """
    begun = time.monotonic()
    names = flags.ood_score or [evidence.scores[0]]
    with world.raise_together():
        for name in names:
            if name not in evidence.scores:
                raise UserError(f"--ood_score {name}: --mode {flags.mode} offers {', '.join(evidence.scores)}")
            trained_by = [mode for mode in trained_by if mode in (SCORES[name].trained_by or trained_by)]
        options = {name: {flag: getattr(flags, flag) for flag in SCORES[name].flags} for name in names}
        print_score, save_score = flags.print_score, flags.save_score
        subject = load_subject(flags, evidence, trained_by=trained_by, reference=reference, names=names, world=world)
        tests = _tests(flags, subject)
    test = tests[flags.dataset]
    normal = subject.split.normal(test.labels)
    train, references, data = subject.training()
    data |= {title: identity(images) for title, images in tests.items()}
    finished = evidence.finish(flags, subject.net, train, world)
    for line in flags.unread_notes():
        print(line)
    train = finished.finish(train)
    scores = {name: SCORES[name].fit(train, finished.dictionary, **options[name]) for name in names}
    del train
    found_of = {title: _scored(subject, data, title, references, finished, scores) for title, data in tests.items()}
    if not world.is_main:
        return
    if finished.lam is not None:
        gap = float(np.concatenate([found[_GAP] for found in found_of.values()]).mean())
        print(f"codes: mean optimality gap {gap / finished.lam:.3g} lambda (more ADMM steps lower it)")
    is_normal = normal.cpu().numpy()
    for name in names:
        values = {title: found[name] for title, found in found_of.items()}
        if not all(np.isfinite(scores).all() for scores in values.values()):
            raise UserError(
                f"--load_path: {subject.checkpoint} gives scores that are no numbers; its weights are spoilt"
            )
        own = values.pop(flags.dataset)
        classes = _by_class(test, own, is_normal)
        found = detect(own[is_normal], classes, values)
        more = frozenset(chain.from_iterable(SCORES[n].flags for n in names)) - set(SCORES[name].flags)
        facts = result_facts(flags, subject, begun, data, more)
        result = {"score": name, **facts, **found.as_result()}
        path = place_for(subject.folder, f"result_{flags.mode}_{name}{subject.tag}", ".json", facts, read_json)
        stem = path.stem.replace("result_", "scores_", 1)
        tables = {title: f"{stem}_{set_name(title)}.csv" for title in tests} if save_score else {}
        for title, table in tables.items():
            names_of = subject.split.class_names if title == flags.dataset else []
            write_text(subject.folder / table, _table(tests[title], {flags.dataset: own, **values}[title], names_of))
        write_json(path, {**result, "scores": tables})
        _show(subject, result)
        if print_score:
            for title, of_images in {"normal test": own[is_normal], **classes, **values}.items():
                print(f"quantiles of {name}, {title}: {quantile_line(of_images)}")
        print(f"wrote {path}", flush=True)


def _tests(flags: Flags, subject: Subject) -> dict[str, ImageSet]:
    """The test images of the data set and of those it is told apart from, by name."""
    test = subject.split.test()
    normal = subject.split.normal(test.labels)
    others = other_sets(flags, subject, lambda: test.where(normal))
    if normal.all() and not others:
        raise UserError(
            "--ood_dataset: every test image is of a normal class, there is nothing to tell apart; give --one_class_idx"
            " if the data set has several classes, or other data sets"
        )
    if not normal.any():
        raise UserError(f"--data_path: no test image of the normal class, {subject.split.normal_title}")
    return {name: data.to(subject.device) for name, data in {flags.dataset: test, **others}.items()}


def _scored(
    subject: Subject,
    images: ImageSet,
    title: str,
    references: torch.Tensor | None,
    finished: Finished,
    scores: dict[str, Score],
) -> dict[str, np.ndarray]:
    """Each score of all images (N,), and the mean optimality gaps of their codes where they have any.

    Batch by batch: of an image nothing stays but its scores, which all processes get.
    """
    own: list[dict[str, np.ndarray]] = []
    for block in subject.blocks(images, f"{title} test images", references):
        outputs = finished.finish(block)
        own.append({name: score(outputs).numpy() for name, score in scores.items()})
        if _GAP in outputs:
            own[-1][_GAP] = outputs[_GAP].mean((1, 2, 3)).numpy()
    parts = list(chain.from_iterable(subject.world.all_gather_object(own)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def result_facts(
    flags: Flags,
    subject: Subject,
    begun: float,
    data: Mapping[str, Mapping[str, Any]],
    without: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """What every result says of where it comes from.

    begun: `time.monotonic()` at the start. data: what identifies the images, by name of the set. without: flags that
    were read and that this result does not depend on.
    """
    return {
        "mode": flags.mode,
        "dataset": flags.dataset,
        "one_class_idx": subject.split.one_class_idx,
        "class_name": subject.split.class_name,
        "seed": flags.seed,
        "checkpoint": str(subject.checkpoint),
        "weights": subject.checkpoint.stem,
        "data": data,
        "settings": settings_of(flags, without),
        "seconds": round(time.monotonic() - begun, 2),
        "device": device_name(subject.device),
        **peak_memory(subject.device),
        "processes": subject.world.size,
        "epochs": subject.epochs,
        "flags": flags.as_dict(),
        **describe_program(),
    }


def other_sets(flags: Flags, subject: Subject, normal: Callable[[], ImageSet]) -> dict[str, ImageSet]:
    """The sets of --ood_dataset, or what all classes of the data set together are told apart from, by name.

    normal: the normal test images. Raises: UserError that names all that are missing.
    """
    usual = MULTI_CLASS.get(flags.dataset, ()) if flags.one_class_idx is None else ()
    names = list(dict.fromkeys(flags.ood_dataset or usual))
    if flags.dataset in names:
        names.remove(flags.dataset)
        print(f"note: --ood_dataset {flags.dataset} is the normal data set itself; left out")
    if not names:
        return {}
    used = {flag for name in names for flag in outlier_flags(name)}
    source = pick(DataSource, flags, only=used - {"data_path"})
    place = (flags.ood_data_path or flags.data_path) if "data_path" in used else ""
    main = subject.split.source
    source = replace(source, data_path=place, image_size=main.image_size, normal=main.normal)
    lag = flags.test_batch_size if INTERP in names else 1
    return {name: load() for name, load in find_outliers(names, source, normal, lag=lag).items()}


def _by_class(test: ImageSet, values: np.ndarray, normal: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of the anomalous test images by class, under their published names."""
    labels = test.labels.cpu().numpy()
    return {f"one_class_{label}": values[labels == label] for label in np.unique(labels[~normal]).tolist()}


def _show(subject: Subject, result: dict) -> None:
    names = subject.split.class_names
    of = subject.split.normal_title
    print(f"AUROC of {result['score']}, {result['dataset']}, {of} normal, {result['n_in']} against {result['n_out']}:")
    for name, value in result["auroc"].items():
        label = name.removeprefix("one_class_")
        title = f"{name} ({names[int(label)]})" if label.isdigit() else name
        print(f"  {title:<32} {100 * value:5.1f}")
    print(f"  {'one_class_mean':<32} {100 * result['mean']:5.1f}")
    print(f"  {'One_class_real_mean (pooled)':<32} {100 * result['pooled']:5.1f}", flush=True)


def _table(images: ImageSet, scores: np.ndarray, class_names: Sequence[str]) -> str:
    """CSV with one row an image: index, label, score, for folders path, and name of the class where there are any."""
    labels = images.labels.tolist()
    columns = {"index": images.indices.tolist(), "label": labels, "score": map(repr, scores.tolist())}
    if images.paths:
        columns["path"] = images.paths
    if class_names:
        columns["class"] = [class_names[label] for label in labels]
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(columns)
    rows.writerows(zip(*columns.values(), strict=True))
    return out.getvalue()
