"""The detection modes: score every test image, report AUROC, write results beside the checkpoint."""

import csv
import io
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from common.device import device_name
from common.errors import UserError
from common.files import write_json, write_text
from common.flags import Flags, pick
from common.run import describe_program
from datasets import ImageSet, split_one_class
from datasets.catalog import DataSource
from evals.detection import detect, quantile_line
from evals.features import Outputs
from evals.scores import SCORES, ScoreSpec, fit_csi, fit_csi_sr
from evals.subject import Subject, load_subject
from models.feature_net import CocsrNet


def run_detection(flags: Flags, *, sparse: bool, reference: bool) -> None:
    """Evaluate one checkpoint. sparse: a stage-2 one; reference: mix test images with reference training images.

    Raises: UserError as `load_subject`; for a score that the mode has not the means for; for nothing to tell apart.
    """
    names = flags.ood_score or ["CSI_sr" if sparse else "CSI"]
    for name in names:
        fitting = [n for n, row in SCORES.items() if row.sparse == sparse]
        if name not in fitting:
            raise UserError(f"--ood_score {name}: --mode {flags.mode} offers {', '.join(fitting)}")
    begun = time.monotonic()
    others = [name for name in flags.ood_dataset or () if name != flags.dataset]
    parts = {"similarity": not flags.disable_sim_score, "shift": not flags.disable_shi_score}
    print_score, save_score = flags.print_score, flags.save_score
    subject = load_subject(flags, sparse=sparse, reference=reference)
    tests = {flags.dataset: subject.split.test().to(subject.device)}
    test = tests[flags.dataset]
    normal = subject.split.normal(test.labels).cpu().numpy()
    if normal.all() and not others:
        raise UserError(
            "--ood_dataset: every test image is of a normal class, there is nothing to tell apart; give --one_class_idx"
            " if the data set has several classes, or other data sets"
        )
    if not normal.any():
        raise UserError(f"--data_path: no test image of the normal class {flags.one_class_idx}")
    tests |= {name: _other_set(name, flags, subject) for name in others}
    train, outputs = subject.outputs_of_sets(tests)
    if sparse:
        gap = float(torch.cat([means["gap"].flatten() for means in outputs.values()]).mean())
        print(f"codes: mean optimality gap {gap / subject.sr_lambda:.3g} lambda (a larger --sr_admm_stage lowers it)")
    for name in names:
        score = _fit(subject, SCORES[name], train, parts)
        values = {title: score(means) for title, means in outputs.items()}
        if not all(np.isfinite(scores).all() for scores in values.values()):
            raise UserError(
                f"--load_path: {subject.checkpoint} gives scores that are no numbers; its weights are spoilt"
            )
        own = values.pop(flags.dataset)
        anomalous = _by_class(test, own, normal) | values
        found = detect(own[normal], anomalous)
        result = {
            "mode": flags.mode,
            "score": name,
            "dataset": flags.dataset,
            "one_class_idx": flags.one_class_idx,
            "seed": flags.seed,
            "checkpoint": str(subject.checkpoint),
            **found.as_result(),
            "seconds": round(time.monotonic() - begun, 2),
            "device": device_name(subject.device),
            "epochs": subject.epochs,
            "flags": flags.as_dict(),
            **describe_program(),
        }
        _show(subject, result)
        if print_score:
            for title, scores in {"normal test": own[normal], **anomalous}.items():
                print(f"quantiles of {name}, {title}: {quantile_line(scores)}")
        kind = f"{flags.mode}_{name}{subject.tag}"
        write_json(subject.folder / f"result_{kind}.json", result)
        if save_score:
            for title, scores in {flags.dataset: own, **values}.items():
                path = subject.folder / f"scores_{kind}_{title}.csv"
                write_text(path, _table(tests[title], scores))
    print(f"results are in {subject.folder}")


def _other_set(name: str, flags: Flags, subject: Subject) -> ImageSet:
    """The test images of another data set, in the size of the normal ones."""
    size = subject.split.source.image_size or 32
    source = replace(pick(DataSource, flags), image_size=size)
    return split_one_class(name, source, None, size).test().to(subject.device)


def _fit(subject: Subject, row: ScoreSpec, train: Outputs, parts: dict[str, bool]) -> Callable[[Outputs], np.ndarray]:
    parts = {**parts, "first_shift_only": row.first_shift_only}
    if not row.sparse:
        csi = fit_csi(train["z"], train["shift"], **parts)
        return lambda x: csi(x["z"], x["shift"]).numpy()
    assert isinstance(subject.net, CocsrNet)
    dictionary = subject.net.sr_nets.dictionary.detach().cpu()
    csi_sr = fit_csi_sr(dictionary, train["s"], train["codes"], train["shift"], **parts)
    return lambda x: csi_sr(x["s"], x["codes"], x["shift"]).numpy()


def _by_class(test: ImageSet, values: np.ndarray, normal: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of the anomalous test images by class, under their published names."""
    labels = test.labels.cpu().numpy()
    return {f"one_class_{label}": values[labels == label] for label in np.unique(labels[~normal]).tolist()}


def _show(subject: Subject, result: dict) -> None:
    names = subject.split.class_names
    idx = result["one_class_idx"]
    of = f"class {idx} ({names[idx]})" if idx is not None else "all classes"
    print(f"AUROC of {result['score']}, {result['dataset']}, {of} normal, {result['n_in']} against {result['n_out']}:")
    for name, value in result["auroc"].items():
        label = name.removeprefix("one_class_")
        title = f"{name} ({names[int(label)]})" if label.isdigit() else name
        print(f"  {title:<32} {100 * value:5.1f}")
    print(f"  {'one_class_mean':<32} {100 * result['mean']:5.1f}")
    print(f"  {'One_class_real_mean (pooled)':<32} {100 * result['pooled']:5.1f}", flush=True)


def _table(images: ImageSet, scores: np.ndarray) -> str:
    """CSV with one row an image: index, label, score and, for folders, path."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(["index", "label", "score"] + (["path"] if images.paths else []))
    columns = [images.indices.tolist(), images.labels.tolist(), map(repr, scores.tolist())]
    rows.writerows(zip(*columns, *([images.paths] if images.paths else []), strict=True))
    return out.getvalue()
