"""Jobs of a sweep one by one: what is tried again, what time is counted, which published means stand below a table."""

from pathlib import Path

import pytest

from common.errors import UserError
from scripts import jobs as module
from scripts import sweep
from scripts.jobs import Job, Record, work
from scripts.recipes import Step
from scripts.results import PUBLISHED


def job(place: Path, *codes: int) -> Job:
    """Commands, each in need of those before, that end with these exit codes."""
    steps: list[Step] = []
    kinds = ["csi", "of csi", "cocsr"]
    for kind, code in zip(kinds, codes, strict=False):
        steps.append(Step(kind, ("-c", f"print('at work {kind}'); raise SystemExit({code})"), place, tuple(steps)))
    return Job(0, 0, tuple(steps), place)


def carried_out(one: Job, retries: int) -> list[str]:
    """The kinds of the commands that were started, in order."""
    kinds = {step.arguments: step.kind for step in one.steps}
    started = []
    for process in work(one, {}, retries):
        process.wait(60)
        started.append(kinds[tuple(process.args[1:])])
    return started


@pytest.mark.parametrize(
    "codes, retries, started",
    [
        ((0, 0), 2, ["csi", "of csi"]),
        ((1, 0), 2, ["csi", "csi", "csi"]),  # what died is tried again, and nothing follows it
        ((0, 143), 1, ["csi", "of csi", "of csi"]),
        ((2, 0), 2, ["csi"]),  # wrong input stays wrong
    ],
)
def test_what_died_is_tried_again_and_what_was_refused_is_not(codes, retries, started, tmp_path):
    one = job(tmp_path, *codes)
    assert carried_out(one, retries) == started
    failed = next((code for code in codes if code), None)
    assert (Record(one).failure is None) == (failed is None)
    assert failed is None or f"exit code {failed}: at work" in (Record(one).failure or "")


def test_what_is_done_is_left_alone_when_a_job_is_started_again(tmp_path):
    assert carried_out(job(tmp_path, 0, 1), 0) == ["csi", "of csi"]
    assert carried_out(job(tmp_path, 0, 1), 0) == ["of csi"]


def test_time_of_all_attempts_counts_and_a_column_has_that_of_the_commands_it_needs(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "time", lambda: now[0])
    one = job(tmp_path, 0, 0, 0)
    record = Record(one)
    for step, seconds, code in ((0, 10.0, 1), (0, 5.0, 0), (1, 2.0, 0), (2, 40.0, 0)):
        record.begin(one.steps[step])
        now[0] += seconds
        record.end(one.steps[step], code)
    record = Record(one)  # as it is on disk
    assert [record.seconds[step.key] for step in one.steps] == [15.0, 2.0, 40.0]
    assert sweep._seconds(one, record, "CSI") == 17.0  # training and its evaluation
    assert sweep._seconds(one, record, "ADMM-SRNet") == 0.0  # its evaluation is no part of this job


@pytest.mark.parametrize("classes, published", [("0-9", True), ("0-8", False), ("3", False)])
def test_published_means_stand_below_tables_of_all_classes_only(classes, published, tmp_path, monkeypatch, capsys):
    seen: dict = {}
    monkeypatch.setattr(sweep, "run_here", lambda *args: None)
    monkeypatch.setattr(sweep, "write_tables", lambda *args, **settings: seen.update(settings) or "")
    assert sweep.main(["cifar10", "--classes", classes, "--out", str(tmp_path)]) == 1  # nothing was done
    assert seen["published"] == (PUBLISHED["cifar10"] if published else None)
    assert "not finished" in capsys.readouterr().err


def test_a_record_that_cannot_be_read_is_reported(tmp_path):
    one = job(tmp_path, 0)
    one.file.write_text("{")
    with pytest.raises(UserError, match="--out: .*class_0_seed_0.json cannot be read"):
        Record(one)
