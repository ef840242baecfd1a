"""Sweeps over classes and seeds: their commands, their table, and what becomes of them when something fails."""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from common.errors import UserError
from evals.metrics import mean_aurocs, resampled
from scripts import jobs
from scripts.jobs import Job, Record, work
from scripts.recipes import METHODS, RECIPES, steps_of
from scripts.sweep import _same_images, main
from scripts.tables import Entry, behind, summarise
from tests.conftest import ROOT
from tests.scripts.test_sweeps import options
from tests.scripts.test_sweeps import sweep as published_sweep
from tests.sweeps import arguments, killed_and_failed, sweep


def dry_run(capsys, *args):
    """The commands of a sweep: lists of arguments."""
    assert main([*map(str, args), "--dry_run"]) == 0
    return [shlex.split(line)[1:] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    "family, wrapper", [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100"), ("imagenet", "Imagenet")]
)
def test_recipes_are_the_published_commands(family, wrapper, tmp_path, capsys):
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\nprintf '\\n'\n")
    stub.chmod(0o755)
    env = {"LOG_ROOT": str(tmp_path / "seed_5"), "DATA_PATH": str(tmp_path), "START": "2", "END": "2"}
    published = []
    for stage in ("Stage1", "Stage2", "Eval"):
        (line,) = published_sweep(f"{wrapper}_{stage}", stub, "--seed", "5", **env).stdout.splitlines()
        published.append(line.split("\0")[:-1])
    place = ["--data_path", tmp_path, "--out", tmp_path]
    ours = dry_run(capsys, family, "--classes", 2, "--seeds", 5, "--methods", "ADMM-SRNet", *place)
    assert [words[0] for words in ours] == [words[0] for words in published]
    for mine, theirs in zip(map(options, ours), map(options, published), strict=True):
        theirs["--epochs"] = theirs.pop("--epoch", ["1000"])
        mine.setdefault("--epochs", ["1000"])
        if "--load_path" in mine:
            theirs["--load_path"] = [theirs["--load_path"][0].removesuffix("/last.cocsr_model")]
        assert mine == theirs


def test_jobs_share_what_columns_have_in_common_and_flags_reach_every_command(tmp_path, capsys):
    words = ["digits", "--seeds", 0, 1, "--classes", "2,4-5", "--methods", *METHODS, "--out", tmp_path]
    commands = dry_run(capsys, *words, "--epochs", 3, "--more", 2)
    assert len(commands) == 6 * 16
    assert [c[0] for c in commands[:16]].count("train.py") == 6  # CSI is trained once for four columns
    assert ["CSI", "knn", "ocsvm"] in [options(c).get("--ood_score") for c in commands]
    places = [(options(c)["--one_class_idx"], options(c)["--seed"]) for c in commands[::16]]
    assert places == [([c], [s]) for s in "01" for c in "245"]
    assert not list(tmp_path.iterdir())
    assert main(["digits", "--out", str(tmp_path), "--dry_run", "--", "--suffix", "x", "--model", "resnet18"]) == 0
    assert all(line.endswith("--suffix x --model resnet18") for line in capsys.readouterr().out.splitlines())
    assert main(["digits", "--dry_run", "--", "--no_such_flag"]) == 2
    assert "--no_such_flag" in capsys.readouterr().err


def test_flags_are_parsed_however_they_are_written(tmp_path):
    words = argparse.Namespace(data_path="x", epochs=1, more=1, flags=["--dataset=folder", "--suffix=--dataset"])
    steps = steps_of(RECIPES["digits"], ["CSI"], 4, 7, tmp_path, words)
    for step in steps:
        flags = step.flags.as_dict()
        assert (flags["dataset"], flags["one_class_idx"], flags["seed"]) == ("folder", 4, 7)
    assert steps[1].folder.name == "folder_resnet8_unsup_simclr_CSI_shift_rot_bmix_one_class_4_--dataset"


def test_a_home_folder_is_found_however_it_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    for words in dry_run(capsys, "digits", "--classes=0", "--out=~/sweep", "--data_path=~/data"):
        given = options(words)
        assert given["--data_path"] == [str(tmp_path / "data")]
        places = [given[name][0] for name in ("--log_root", "--load_path", "--resume_path") if name in given]
        assert places and all(place.startswith(str(tmp_path / "sweep" / "seed_0")) for place in places)
    (tmp_path / "file").write_text("")
    assert main(["digits", "--out", str(tmp_path / "file" / "sweep")]) == 2
    assert "--out: cannot make" in capsys.readouterr().err


def evaluation(tmp_path, *flags):
    """The evaluation of class 3 by seed 5, and a function that writes a result beside its checkpoint."""
    words = argparse.Namespace(data_path="x", epochs=1, more=1, flags=list(flags))
    _, step = steps_of(RECIPES["digits"], ["CSI"], 3, 5, tmp_path, words)
    step.folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, mean: float, **more) -> None:
        usual = {"score": "CSI", "dataset": "digits", "one_class_idx": 3, "seed": 5, "checkpoint": "a/last.model"}
        (step.folder / f"result_{name}.json").write_text(json.dumps({**usual, "mean": mean, **more}))

    return step, write


def test_an_evaluation_is_found_by_what_it_records(tmp_path):
    step, write = evaluation(tmp_path, "--dataset=folder", "--ood_samples", "2")
    own = {"dataset": "folder", "settings": {"ood_samples": 2, "image_size": 16, "temperature": 0.5}}
    others = [
        {"seed": 4},
        {"one_class_idx": 2},
        {"dataset": "digits"},
        {"settings": {"ood_samples": 10}},
        {"score": "CSI_sr"},
        {"weights": "previous"},
        {"checkpoint": "a/previous.model"},
    ]
    for i, other in enumerate(others):
        write(f"ood_pre_refmix_CSI{'' if i == 0 else f'_{i:08x}'}", 0.1, **own | other)
    with pytest.raises(FileNotFoundError, match="result_ood_pre_refmix_CSI"):
        step.result("CSI")
    write("ood_pre_refmix_CSI_1a2b3c4d", 0.9, **own, scores={"folder": "scores_x.csv"})
    result, scores = step.result("CSI")
    assert result["mean"] == 0.9 and scores == step.folder / "scores_x.csv"


def test_what_weights_decide_may_differ_from_a_default(tmp_path):
    """--held_out of the weights, which the command does not give; what it gives has to agree."""
    step, write = evaluation(tmp_path, "--sr_rho", "2")
    write("ood_pre_refmix_CSI", 0.7, settings={"held_out": "auto", "sr_rho": 3.0})
    with pytest.raises(FileNotFoundError):
        step.result("CSI")
    write("ood_pre_refmix_CSI", 0.8, settings={"held_out": "auto", "sr_rho": 2.0})
    assert step.result("CSI")[0]["mean"] == 0.8


def test_the_result_of_an_older_version_is_found_by_its_name(tmp_path):
    step, write = evaluation(tmp_path)
    write("ood_pre_refmix_CSI", 0.8)
    result, scores = step.result("CSI")
    assert result["mean"] == 0.8 and scores == step.folder / "scores_ood_pre_refmix_CSI_digits.csv"


def test_bootstrap_is_that_of_weighted_aurocs():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 60)
    scores = rng.normal(size=60).round(1) + (labels == 2)  # with ties
    counts = resampled(labels, 7)
    for label in range(4):
        assert (counts[:, labels == label].sum(1) == (labels == label).sum()).all()
    counts[0] = 1
    found = mean_aurocs(scores, labels, 2, counts)
    for sample, value in zip(counts, found, strict=True):
        each = [
            roc_auc_score(labels[pair] == 2, scores[pair], sample_weight=sample[pair])
            for pair in ((labels == 2) | (labels == other) for other in (0, 1, 3))
        ]
        assert value == pytest.approx(np.mean(each), abs=1e-9)


def test_intervals_of_means_resample_all_seeds_and_classes_alike(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    entries = []
    for idx in (0, 1):
        for seed in (0, 1, 2):
            scores = rng.normal(size=300) + (labels == idx)
            path = tmp_path / f"{idx}_{seed}.csv"
            rows = [f"{i},{labels[i]},{float(scores[i])!r}" for i in rng.permutation(300)]
            path.write_text("index,label,score\n" + "\n".join(rows) + "\n")
            mean = float(mean_aurocs(scores, labels, idx, np.ones((1, 300)))[0])
            entries.append(Entry("CSI", "CSI", idx, seed, mean, path, "cpu"))
    summary = summarise(entries[:-1], 400)
    samples = list(summary.samples.values())
    cell = summary.cells[0, "CSI"]
    assert cell.mean == np.mean([e.mean for e in entries[:3]]) and cell.std == np.std(
        [e.mean for e in entries[:3]], ddof=1
    )
    assert [cell.low, cell.high] == np.percentile(np.mean(samples[:3], 0), (2.5, 97.5)).tolist()
    assert 0.02 < cell.high - cell.low < 0.12  # near 4 standard errors of an AUROC of 100 against 200 images
    # The third seed lacks a class, so the mean over classes is of the other two.
    mean, classes = summary.means["CSI"]
    assert (mean.seeds, classes) == (2, 2)
    assert mean.mean == pytest.approx(np.mean([entries[i].mean for i in (0, 1, 3, 4)]))
    assert [mean.low, mean.high] == pytest.approx(
        np.percentile(np.mean([samples[i] for i in (0, 1, 3, 4)], 0), (2.5, 97.5))
    )


def test_a_difference_is_of_the_runs_that_both_have_on_the_same_samples(tmp_path):
    labels = np.arange(300) % 3
    entries = []
    for method, idx, seed in (("a", 0, 0), ("a", 1, 0), ("a", 1, 1), ("b", 0, 0), ("b", 1, 1), ("b", 2, 0)):
        rng = np.random.default_rng([idx, seed])  # The same noise for both: their difference is sure.
        scores = rng.normal(size=300) + (1.2 if method == "b" else 1.0) * (labels == idx)
        path = tmp_path / f"{method}_{idx}_{seed}.csv"
        path.write_text("index,label,score\n" + "".join(f"{i},{labels[i]},{float(scores[i])!r}\n" for i in range(300)))
        mean = float(mean_aurocs(scores, labels, idx, np.ones((1, 300)))[0])
        entries.append(Entry(method, "CSI", idx, seed, mean, path, "cpu"))
    summary = summarise(entries, 400)
    found, runs = behind(summary, "a", "b")
    assert runs == 2
    (a0, _, a1, b0, b1, _), samples = entries, summary.samples
    assert found.mean == pytest.approx((b0.mean - a0.mean + b1.mean - a1.mean) / 2) and found.mean > 0.02
    paired = (samples[b0] - samples[a0] + samples[b1] - samples[a1]) / 2
    assert [found.low, found.high] == pytest.approx(np.percentile(paired, (2.5, 97.5)).tolist())
    assert found.high - found.low < 0.5 * (summary.cells[0, "a"].high - summary.cells[0, "a"].low)
    assert behind(summary, "a", "c") is None


def test_where_no_seed_has_all_classes_the_mean_is_of_what_there_is_and_says_so(tmp_path):
    labels = np.arange(90) % 3
    entries = []
    for idx, seed, shift in ((0, 0, 3.0), (1, 0, 0.1), (1, 1, 0.1), (2, 1, 1.0)):
        rng = np.random.default_rng([idx, seed])
        scores = rng.normal(size=90) + shift * (labels == idx)
        path = tmp_path / f"{idx}_{seed}.csv"
        path.write_text("index,label,score\n" + "".join(f"{i},{labels[i]},{float(scores[i])!r}\n" for i in range(90)))
        mean = float(mean_aurocs(scores, labels, idx, np.ones((1, 90)))[0])
        entries.append(Entry("CSI", "CSI", idx, seed, mean, path, "cpu"))
    cell, classes = summarise(entries, 50).means["CSI"]
    a, b, c, d = (entry.mean for entry in entries)
    assert cell.mean == pytest.approx(np.mean([a, (b + c) / 2, d])) and (cell.std, cell.seeds, classes) == (None, 0, 3)
    assert "(0 of 2 seeds)" in cell.text(2)


def test_results_that_other_flags_wrote_over_are_made_again(tmp_path, capsys):
    """Flags A, then B, then A again: the files are B's."""

    def job(*flags) -> Job:
        words = argparse.Namespace(data_path="x", epochs=1, more=1, flags=list(flags))
        return Job(0, 0, steps_of(RECIPES["digits"], ["CSI"], 0, 0, tmp_path, words), tmp_path / "jobs")

    a, b = job("--ood_samples", "1"), job("--ood_samples", "2")
    (tmp_path / "jobs").mkdir()
    for one in (a, b):
        record = Record(one)
        for step in one.steps:
            if not record.done(step):
                record.begin(step)
                record.end(step, 0)
        assert all(map(Record(one).done, one.steps))
    assert [Record(a).done(step) for step in a.steps] == [False, False]  # training was written over, too
    Record(b).begin(b.steps[1])  # and then the machine fails
    b.log.write_text("\nlast words\n")
    assert Record(b).seconds[b.steps[1].key] >= 0 and not Record(b).done(b.steps[1]) and Record(b).done(b.steps[0])


@pytest.mark.parametrize("code, failure", [(143, "143"), (130, "130"), (129, "129"), (138, "138"), (-9, "signal 9")])
def test_a_command_that_a_signal_has_stopped_goes_on_at_the_next_start(code, failure, tmp_path, monkeypatch):
    (tmp_path / "eval.py").write_text("print('evaluated')")
    monkeypatch.setattr(jobs, "ROOT", tmp_path)
    words = argparse.Namespace(data_path="x", epochs=1, more=1, flags=[])
    job = Job(0, 0, steps_of(RECIPES["digits"], ["CSI"], 0, 0, tmp_path, words), tmp_path / "jobs")
    for end, kinds in ((f"os.kill(os.getpid(), {-code})" if code < 0 else f"sys.exit({code})", ["csi"]), ("", None)):
        (tmp_path / "train.py").write_text(f"import os, sys; print('saved', flush=True); {end}")
        begun = []
        for process in work(job, {}, retries=0):
            begun += [step.kind for step in job.steps if list(step.arguments) == process.args[1:]]
            process.wait()
        assert begun == (kinds or ["csi", "of csi"])
        if kinds:
            assert failure in Record(job).failure and "saved" in Record(job).failure
    assert Record(job).failure is None and all(map(Record(job).done, job.steps))


@pytest.mark.parametrize(
    "args, told",
    [
        (["--classes", "9-0"], "--classes"),
        (["--epochs", "0"], "--epochs must be > 0"),
        (["--jobs", "-1"], "--jobs must be > 0"),
        (["--", "--overwrite"], "--overwrite"),
        (["--", "--seed=3"], "--seeds"),
        (["--", "--one_class_idx", "3"], "--classes"),
        (["--", "--epoch=3"], "--epochs and --more"),
        (["--", "--log_root=x"], "--out"),
    ],
)
def test_what_a_sweep_cannot_do_is_reported(args, told, tmp_path, capsys):
    assert main(["digits", "--out", str(tmp_path / "out"), *args]) == 2
    errors = capsys.readouterr().err
    assert told in errors and errors.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args, told",
    [
        (["minutes", "--epochs", "3"], "--epochs: minutes has epochs of its own for every command; give --times"),
        (["minutes", "--more", "3"], "--more: minutes has epochs"),
        (["digits", "--times", "2"], "--times: digits is not at equal training time"),
        (["minutes", "--times", "inf"], "--times must be a finite number > 0"),
    ],
)
def test_a_length_that_a_family_does_not_have_is_refused(args, told, tmp_path, capsys):
    assert main([*args, "--out", str(tmp_path / "out"), "--dry_run"]) == 2 and told in capsys.readouterr().err


def test_a_sweep_outlives_a_killed_job_and_a_failing_class(tmp_path):
    assert "the table is right" in killed_and_failed(tmp_path / "out", "0-2", [4], failing=2)


def test_a_sweep_that_is_asked_to_stop_passes_it_on_and_goes_on_through_submitit(tmp_path):
    words = arguments(tmp_path, "5", [0], "--epochs", "30")
    command = [sys.executable, "-m", "scripts.sweep", *words]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "jobs" / "class_5_seed_0.log"
    while first.poll() is None and not (log.is_file() and "epoch 1/30" in log.read_text()):
        time.sleep(0.005)
    code, _, told = sweep(words)
    assert code == 2 and "another sweep is at work" in told
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate()
    assert first.returncode == 143 and "goes on from there" in errors
    assert "saved after" in log.read_text()
    words[words.index("--jobs") : words.index("--jobs") + 2] = ["--executor", "local", "--set", "timeout_min=5"]
    code, told, errors = sweep(words)
    assert code == 0 and "submitted as" in told and "| class 5 " in told, errors
    assert "continuing after epoch" in log.read_text()
    record = json.loads((tmp_path / "jobs" / "class_5_seed_0.json").read_text())
    assert all(step["done"] for step in record["steps"].values())


def test_evaluations_of_different_images_make_no_table_together(tmp_path):
    entries = [Entry("CSI", "CSI", 0, seed, 0.9, tmp_path, "cpu", images) for seed, images in enumerate("ab")]
    with pytest.raises(UserError, match="--data_path: .*class 0, seed 0; class 0, seed 1"):
        _same_images(entries)
    _same_images([*entries[:1] * 2, Entry("CSI", "CSI", 1, 0, 0.9, tmp_path, "cpu")])


def test_a_sweep_whose_jobs_saw_different_images_writes_no_table(tmp_path, monkeypatch, capsys):
    def entries(job, record, methods):
        return [Entry("CSI", "CSI", job.one_class_idx, 0, 0.9, tmp_path, "cpu", f"images {job.one_class_idx}")]

    monkeypatch.setattr(Record, "done", lambda self, step: True)
    monkeypatch.setattr("scripts.sweep._entries", entries)
    assert main(["digits", "--classes", "0-1", "--methods", "CSI", "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "the test images changed" in told and not list(tmp_path.glob("table.*"))
