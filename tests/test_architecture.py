"""docs/architecture.md is true: packages import what it says, and the names that it gives exist."""

import ast
import re

import pytest

from tests.conftest import ROOT

# What each package may import of the project.
LAYERS = {
    "common": {"common"},
    "datasets": {"common", "datasets"},
    "models": {"common", "models"},
    "evals": {"common", "datasets", "models", "evals"},
    "training": {"common", "datasets", "models", "evals", "training"},
    "detector": {"common", "datasets", "models", "evals", "training", "program", "detector"},
}
OURS = {*LAYERS, "program", "detect", "train", "train_cocsr", "tsne", "scripts", "benchmarks", "tests"}
TEXT = (ROOT / "docs/architecture.md").read_text()


def imported(source: str) -> set[str]:
    """Packages of the project that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names} & OURS


@pytest.mark.parametrize("package", LAYERS)
def test_a_package_imports_only_what_lies_below_it(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        assert imported(path.read_text()) <= LAYERS[package], path


def test_what_imports_are_found():
    assert imported("from evals.scores import x\ndef f():\n    import training.loop") == {"evals", "training"}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([\w/]+\.py)`", TEXT))))
def test_a_file_that_the_page_names_is_there(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:\w+\.)+\w+)`", TEXT))))
def test_a_name_that_the_page_gives_is_there(name):
    """`training.launch.read_job`, `Flags.inherited`: the last part is defined, or assigned, somewhere."""
    last = name.split(".")[-1]
    if last == "py" or name in ("eval.py", "safetensors.torch"):
        return
    sources = [p.read_text() for package in LAYERS for p in (ROOT / package).rglob("*.py")]
    assert any(re.search(rf"\b(?:def|class) {last}\b|^\s+{last}: ", source, re.M) for source in sources), name
