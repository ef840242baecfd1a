"""README and docs/: sizes, links, and commands that parse and name the run folders that earlier ones make."""

import json
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

import pytest

import eval as evaluate
import train
import train_cocsr
import tsne
from tests.conftest import ROOT

MAIN = {"train.py": train.main, "train_cocsr.py": train_cocsr.main, "eval.py": evaluate.main, "tsne.py": tsne.main}
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))


def anchors(page: Path) -> set[str]:
    """The anchors that a code host gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page to files or headings that are not there."""
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    broken = []
    for link in links:
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / unquote(path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def commands(page: Path) -> list[list[str]]:
    """The complete commands of the four scripts in a page's code blocks, without the interpreter or launcher."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [part for block in blocks for part in re.split(r"\n|&&", block.replace("\\\n", " "))]
    found = [re.search(r"\b((?:train|train_cocsr|eval|tsne)\.py .*)", line) for line in lines]
    return [shlex.split(match[1]) for match in found if match and "..." not in match[1]]


def test_the_readme_is_at_most_8_kb_and_pictures_below_200():
    assert len((ROOT / "README.md").read_bytes()) <= 8 * 1024
    pictures = sorted((ROOT / "docs/pictures").iterdir())
    text = "".join(page.read_text() for page in PAGES)
    for picture in pictures:
        assert picture.stat().st_size < 200_000
        assert f"pictures/{picture.name})" in text, f"{picture.name} is on no page"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("# One, two\n[a](#one-two) [b](#three) [c](a.md#one-two) [d](b.md) [e](https://example.org/none)")
    assert broken_links(page) == ["#three", "b.md"]


@pytest.mark.parametrize(
    "name, count", [("README.md", 2), ("docs/usage.md", 7), ("docs/scaling.md", 1), ("docs/rdae.md", 3)]
)
def test_commands_parse_and_name_the_folders_that_earlier_ones_make(name, count, capsys):
    made: set[Path] = set()
    found = commands(ROOT / name)
    assert len(found) == count
    for script, *flags in found:
        code = MAIN[script]([*flags, "--dry_run"])
        out, err = capsys.readouterr()
        assert code == 0, err
        plan = json.loads(out.splitlines()[-1])
        if plan.get("load_path"):
            assert Path(plan["load_path"]) in made
        if plan.get("run_dir"):
            made.add(Path(plan["run_dir"]))
