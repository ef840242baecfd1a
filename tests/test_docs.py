"""README and docs/: sizes, links, and commands that parse and name the run folders that earlier ones make."""

import json
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
import torch.nn.functional as F

import eval as evaluate
import train
import train_cocsr
import tsne
from common.files import save_tensors
from detector.commands import parser
from models.checkpoint import build_net
from models.csc import follow_weights, input_sizes
from models.lambda_line import fixed, measured
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


@pytest.mark.parametrize("name, count", [("README.md", 3), ("docs/detector.md", 17)])
def test_commands_of_the_detector_parse(name, count):
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").split("\n")]
    found = [shlex.split(match[1], comments=True) for line in lines if (match := re.search(r"\bdetect\.py (.*)", line))]
    assert len(found) == count
    for argv in found:
        end = next((i for i, word in enumerate(argv) if word in (">", "||")), len(argv))
        parser().parse_args(argv[:end])


@pytest.mark.parametrize(
    "name, count",
    [
        ("docs/usage.md", 15),
        ("docs/scaling.md", 1),
        ("docs/rdae.md", 3),
        ("docs/sdnet.md", 8),
        ("docs/robustness.md", 7),
        ("docs/robust_detection.md", 7),
    ],
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
            # A run folder, or a file in it.
            assert made & {Path(plan["load_path"]), Path(plan["load_path"]).parent}
        if plan.get("run_dir"):
            made.add(Path(plan["run_dir"]))


def examples(page: Path) -> list[str]:
    """The Python of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_example_of_the_layer_of_sdnets_gives_what_it_says():
    torch.manual_seed(0)
    (text,) = (text for text in examples(ROOT / "docs/sdnet.md") if "CSC2d(" in text)
    found: dict = {}
    exec(text, found)
    layer, x, z = found["layer"], found["x"], found["z"]
    assert z.shape == (8, 64, 32, 32) and (z >= 0).all() and (z > 0).float().mean() < 0.5
    expected = F.conv_transpose2d(z, layer.weight, padding=1)
    torch.testing.assert_close(found["explained"], expected)
    # Of lambda 0.1: below that of the code 0, and its definition.
    value = (x - expected).square().flatten(1).sum(1) / 2 + 0.1 * z.flatten(1).sum(1)
    torch.testing.assert_close(found["value"], value)
    assert (value < x.square().flatten(1).sum(1) / 2).all()
    assert (found["sparser"] > 0).sum() < (z > 0).sum()
    assert layer.step * 0.98 < 0.9 / explicit_norm(layer) < layer.step * 1.02


@torch.no_grad()
def explicit_norm(layer) -> float:
    """The largest eigenvalue of A* A on images of 32 pixels, by many steps of the power iteration."""
    v = torch.randn(1, 64, 32, 32)
    for _ in range(300):
        v = layer.analyse(layer.synthesise(v / v.norm(), (32, 32)))
    return float(v.norm())


def test_the_example_of_robust_inference_gives_each_image_its_lambda(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = build_net("classifier", "sdnet8", n_classes=3, seed=0).eval()
    follow_weights(input_sizes(net.backbone, 3, (16, 16)), fresh=True)
    path = Path("logs/folder_sdnet18_supervised/last.model")
    path.parent.mkdir(parents=True)
    save_tensors(path, net.state_dict())
    numbers = {"a": 0.5, "b": 0.05, "low": 0.1, "high": 1.4, "reference": 0.1, "measure": "highpass"}
    path.with_name("lambda_line.json").write_text(json.dumps({"lines": {"gaussian": {"highpass": numbers}}}))
    images = torch.rand(6, 3, 16, 16) * torch.linspace(0.1, 1, 6).view(-1, 1, 1, 1)
    (text,) = (text for text in examples(ROOT / "docs/sdnet.md") if "adaptive(" in text)
    found = {"images": images}
    exec(text.replace('"sdnet18"', '"sdnet8"'), found)
    with torch.no_grad():
        with measured(net, 0.1) as last:
            net(images)
        r = last()
        second = r[..., 2:, :] - 2 * r[..., 1:-1, :] + r[..., :-2, :]
        second = second[..., 2:] - 2 * second[..., 1:-1] + second[..., :-2]
        lam = (0.5 * second.abs().flatten(1).mean(1) + 0.05).clamp(0.1, 1.4)
        with fixed(net, lam):
            expected = net(images)
        with found["adaptive"](found["net"], found["LambdaLine"](**numbers)):
            torch.testing.assert_close(found["net"](images), expected)
    assert len(lam.unique()) > 3 and torch.equal(found["classes"], expected.argmax(1))
