"""The subcommands of `detect.py`: their flags, what they do, their exit codes."""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import write_json
from common.flags import Parser, Spec, argument, flag, flags_of, path_flag
from datasets.listing import printable
from detector import fitting, judging, scoring
from detector.calibration import Drift, benjamini_hochberg
from detector.card import card, promise, promise_lines
from detector.detector import Detector, Row
from detector.pictures import normal_pictures, pictures_of
from detector.report import Report


@dataclass(frozen=True)
class OutSpec(Spec, group="fit"):
    out: str = path_flag("parts.detector", "the file to write; a report with the same name and .html comes beside it")
    calibrate_on: str | None = path_flag(
        None, "set the threshold by known defects: a folder with a folder good and folders of defects; no promise"
    )


@dataclass(frozen=True)
class WorkSpec(Spec, group="work"):
    num_worker: int = flag(2, "pictures that are worked on side by side", at_least=1)


@dataclass(frozen=True)
class ScoreSpec(Spec, group="score"):
    """What is written of the scores."""

    csv: str | None = path_flag(None, "a CSV file of all pictures")
    json: bool = flag(False, "one line of JSON for each picture")
    heatmaps: str | None = path_flag(None, "a folder for a heatmap of each picture")
    report: str | None = path_flag(None, "a report in one HTML file")
    fdr: float | None = flag(
        None, "name the pictures of which at most this share is expected to be normal", type=float, above=0, at_most=1
    )


@dataclass(frozen=True)
class TestSpec(Spec, group="test"):
    json: str | None = path_flag(None, "a JSON file of all numbers")
    report: str | None = path_flag(None, "a report in one HTML file")


@dataclass(frozen=True)
class ExportSpec(Spec, group="export"):
    onnx: str | None = path_flag(None, "the file to write")
    check: str | None = path_flag(None, "pictures (a folder) on which the graph has to give the same scores")


def _fit(args: Any) -> int:
    spec, place = _spec(args, fitting.FitSpec), Path(args.place)
    files = _spec(args, OutSpec)
    out = Path(files.out)
    if out.is_dir():
        raise UserError(f"--out: {printable(out)} is a folder; give a file, {printable(out / 'parts.detector')} say")
    if not place.exists():
        raise UserError(f"DIR: no folder and no file {printable(place)}")
    if files.calibrate_on:
        judging.test_pictures(Path(files.calibrate_on), "--calibrate_on")  # Before the work, and not after.
    paths = normal_pictures(place)
    detector, held = fitting.fit(paths, spec, source=scoring.path_text(place.resolve()))
    if files.calibrate_on:
        detector = judging.calibrated(detector, Path(files.calibrate_on), spec.num_worker)
    print("\n".join(promise_lines(detector)))
    detector.save(out)
    print(f"wrote {printable(out)} ({out.stat().st_size / 1e6:.1f} MB)")
    page = Report(detector, f"{out.name}: held-out normal pictures")
    for row in detector.rows(held, spec.num_worker, drawn=True):
        page.add(row)
    _write(page, out.with_name(f"{out.stem}.html"), held_out=True)
    return 0


def _score(args: Any) -> int:
    spec, workers = _spec(args, ScoreSpec), _spec(args, WorkSpec).num_worker
    detector = Detector.load(args.detector)
    counts, bets, seen, page = scoring.Counts(), _Bets(Drift(detector.calibration)), _Seen(), None
    writers: list[scoring.Writer] = [scoring.Lines(spec.json), counts, bets]
    writers += [seen] if spec.fdr is not None else []
    writers += [scoring.Heatmaps(Path(spec.heatmaps))] if spec.heatmaps else []
    if spec.report:
        page = Report(detector, f"{Path(args.detector).name}: {' '.join(map(printable, args.paths))}"[:300])
        writers.append(page)
    with ExitStack() as stack:
        if spec.csv:
            writers.append(scoring.Csv(stack.enter_context(scoring.whole_text(Path(spec.csv)))))
        for row in detector.rows(pictures_of(args.paths), workers, drawn=bool(spec.heatmaps or page)):
            for writer in writers:
                writer.add(row)
    # Lines of JSON are for programs, what follows for people.
    with redirect_stdout(sys.stderr) if spec.json else nullcontext():
        print(f"{counts} (threshold {detector.threshold.value:.4f}: {promise(detector)})")
        if spec.fdr is not None:
            _tell_selected(seen, spec.fdr)
        if bets.drift.warns:
            print(
                "warning: these pictures are not like those that it was calibrated by (martingale"
                f" {bets.drift.highest:.2g}; above 100 has a chance of 1 %): many anomalies, or another part, camera or"
                " light, for which nothing is promised"
            )
        if page:
            _write(page, Path(spec.report))
    return counts.exit_code


def _tell_selected(seen: "_Seen", rate: float) -> None:
    found = benjamini_hochberg(np.array(seen.p), rate)
    print(f"--fdr {rate:g}: {int(found.sum())} pictures; at most {100 * rate:g} % of them are expected to be normal")
    for path, chosen in zip(seen.paths, found, strict=True):
        if chosen:
            print(f"  {printable(path)}")


def _test(args: Any) -> int:
    spec, workers = _spec(args, TestSpec), _spec(args, WorkSpec).num_worker
    detector = Detector.load(args.detector)
    page = Report(detector, f"{Path(args.detector).name}: {printable(args.place)}") if spec.report else None
    found = judging.judge(detector, Path(args.place), workers, page)
    print("\n".join(judging.told(found, detector)))
    if spec.json:
        write_json(Path(spec.json), found.metrics)
        print(f"wrote {printable(Path(spec.json))}")
    if page:
        _write(page, Path(spec.report))
    return 2 if found.bad else 0


def _show(args: Any) -> int:
    print(card(Detector.load(args.detector)))
    return 0


def _export(args: Any) -> int:
    from detector.onnx import export

    spec = _spec(args, ExportSpec)
    if not spec.onnx:
        raise UserError("--onnx: which file is to be written?")
    export(Detector.load(args.detector), Path(spec.onnx), Path(spec.check) if spec.check else None)
    return 0


def _write(page: Report, path: Path, *, held_out: bool = False) -> None:
    page.write(path, held_out=held_out)
    print(f"wrote {printable(path)}")


class _Seen:
    """p-values of all readable pictures."""

    def __init__(self) -> None:
        self.paths: list[Path] = []
        self.p: list[float] = []

    def add(self, row: Row) -> None:
        if row.why is None:
            self.paths.append(row.path)
            self.p.append(row.p_value)


class _Bets:
    """Bets on the scores of all readable pictures."""

    def __init__(self, drift: Drift):
        self.drift = drift

    def add(self, row: Row) -> None:
        if row.why is None:
            self.drift.add(row.score)


@dataclass(frozen=True)
class _Command:
    run: Callable[[Any], int]
    help: str
    specs: tuple[type[Spec], ...]
    places: tuple[tuple[str, str, str | None], ...]  # name, help, nargs


_FILE = ("detector", "a file of `detect.py fit`", None)
_METAVARS = {"detector": "FILE", "place": "DIR", "paths": "PATH"}
COMMANDS: dict[str, _Command] = {
    "fit": _Command(
        _fit,
        "learn what good pictures look like: one file",
        (OutSpec, fitting.FitSpec),
        (("place", "good pictures: a folder, or a text file of paths", None),),
    ),
    "score": _Command(
        _score,
        "score new pictures; exit code 0: all normal, 1: some anomalous, 2: errors",
        (ScoreSpec, WorkSpec),
        (_FILE, ("paths", "pictures and folders", "+")),
    ),
    "test": _Command(
        _test,
        "judge a detector by pictures whose defects are known",
        (TestSpec, WorkSpec),
        (_FILE, ("place", "a folder with a folder good and folders of defects", None)),
    ),
    "show": _Command(_show, "what is in a file: the card", (), (_FILE,)),
    "export": _Command(_export, "one ONNX graph with all steps", (ExportSpec,), (_FILE,)),
}


def parser() -> Parser:
    top = Parser(prog="detect.py", description="Fit, use and judge a detector of your own pictures.",
                 allow_abbrev=False)  # fmt: skip
    sub = top.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS), parser_class=Parser)
    for name, command in COMMANDS.items():
        own = sub.add_parser(name, help=command.help, description=command.help, allow_abbrev=False,
                             formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
        for place, hint, nargs in command.places:
            more: dict[str, Any] = {"nargs": nargs} if nargs else {}
            own.add_argument(place, help=hint, metavar=_METAVARS[place], **more)
        for spec in command.specs:
            group = own.add_argument_group(spec.group)
            for flag_name, info in flags_of(spec).items():
                group.add_argument(f"--{flag_name}", *info.aliases, **argument(info))
    return top


def run(argv: Sequence[str] | None) -> int:
    args = parser().parse_args(argv)
    return COMMANDS[args.command].run(args)


def _spec(args: Any, spec: Any) -> Any:
    values = {name: getattr(args, name) for name in flags_of(spec)}
    return spec(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
