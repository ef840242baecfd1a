"""--stem_lambda: lambda of the stem of an SDNet in any evaluation, and the file of the lines that predict it.

`eval.py --mode noise_lambda` writes the file, `lambda_line.json`, beside the weights that it is of.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import readable, write_json
from evals.specs import AUTO, PlaceSpec, StemSpec
from evals.trained import Trained
from evals.writing import read_json
from models.csc import stem_of
from models.lambda_line import MEASURES, LambdaLine, follow

_REMEDY = "eval.py --mode noise_lambda writes it"
_NUMBERS = ("a", "b", "low", "high", "reference")


def with_stem_lambda(trained: Trained) -> Trained:
    """The network with lambda of --stem_lambda, which its results record; as it is without the flag, or without a stem.

    Raises: UserError where lambda is to be predicted, and there is no line, or one of other weights.
    """
    stem = stem_of(trained.net)
    if stem is None:
        return trained
    lam = trained.flags.of(StemSpec, only=["stem_lambda"]).stem_lambda
    if lam is None:
        return trained
    if lam != AUTO:
        stem.set_lambda(float(lam))
        return trained
    spec = trained.flags.of(StemSpec)
    line = read_line(trained, spec.lambda_line, spec.lambda_measure)
    follow(trained.net, line)
    return replace(trained, settings={**trained.settings, "line": asdict(line)})


def line_file(weights: Path, folder: Path) -> Path:
    """Where the lines of weights are; two checkpoints of one folder keep theirs apart."""
    tag = "" if weights.stem == "last" else f"_{weights.stem}"
    return folder / f"lambda_line{tag}.json"


def write_lines(trained: Trained, lines: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write lines, by kind of noise and measure of the residual; others that are there stay, and a line of output names
    those that are replaced by other numbers.

    lines: kind -> what JSON knows: under each measure the numbers of its line, and what it comes from.
    In --out, else beside the weights. Those of other weights that are there are dropped.
    """
    assert trained.path is not None
    out = trained.flags.of(PlaceSpec).out
    path = line_file(trained.path, Path(out) if out else trained.path.parent)
    digest = _digest(trained.path)
    before = read_json(path)
    kept = before.get("lines") if isinstance(before, dict) and before.get("weights_sha256") == digest else None
    found = dict(kept) if isinstance(kept, dict) else {}
    for kind, new in lines.items():
        old = found[kind] if isinstance(found.get(kind), dict) else {}
        if replaced := [name for name in MEASURES if name in old and name in new and old[name] != new[name]]:
            print(f"note: {path} had other lines of {kind} noise ({', '.join(replaced)}), which are replaced")
        found[kind] = {**old, **new}
    write_json(path, {"weights": trained.path.name, "weights_sha256": digest, "lines": found})
    return path


def read_line(trained: Trained, kind: str, measure: str) -> LambdaLine:
    """The line of a kind of noise by a measure of the residual, from --out or from beside the weights.

    Raises: UserError where there is none, or where the file is corrupt or of other weights.
    """
    if trained.path is None:
        raise UserError(f"--stem_lambda {AUTO}: a network in memory has no lines; give a number")
    out = trained.flags.of(PlaceSpec).out
    folders = [*([Path(out)] if out else []), trained.path.parent]
    places = [line_file(trained.path, folder) for folder in folders]
    with readable(places[-1], "stem_lambda"):
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise UserError(f"--stem_lambda {AUTO}: there is no {places[-1]}; {_REMEDY}")
        path.open("rb").close()
    written = read_json(path)
    try:
        lines, digest = dict(written["lines"]), written["weights_sha256"]
        if digest != _digest(trained.path):
            raise UserError(f"--stem_lambda {AUTO}: {path} is of other weights than {trained.path}; {_REMEDY} anew")
        if kind not in lines:
            raise UserError(f"--lambda_line {kind}: {path} has lines of {', '.join(lines)}; {_REMEDY}")
        if measure not in lines[kind]:
            raise UserError(f"--lambda_measure {measure}: {path} has no such line of {kind}; {_REMEDY}")
        numbers = {name: float(lines[kind][measure][name]) for name in _NUMBERS}
        return LambdaLine(**numbers, measure=measure)
    except (TypeError, KeyError, ValueError):
        raise UserError(f"--stem_lambda {AUTO}: {path} is corrupt; {_REMEDY} anew") from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
