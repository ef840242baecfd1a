"""The scan of alpha on a small network that was trained for it; its rules on tables that are known."""

import json
import shutil

import pytest
import torch

import eval as evaluate
import evals.alpha_scan as module
import train
import tsne
from common.files import read_facts, save_tensors
from evals.alpha_scan import RULES, choose
from models.checkpoint import load_net, read_state
from models.mean_sparse import alpha_of
from tests.conftest import TINY

SCAN = [
    "--mode",
    "alpha_scan",
    "--epsilon",
    "0.1",
    "--attack_steps",
    "3",
    "--alphas",
    "0.1",
    "0.3",
    "--scan_images",
    "40",
]
# alpha: without an attack, plain, straight-through.
TABLE = {0.0: (0.9, 0.5, 0.5), 0.1: (0.8995, 0.6, 0.55), 0.2: (0.895, 0.7, 0.6), 0.3: (0.8, 0.9, 0.2)}


def table(rows=TABLE):
    return {alpha: dict(zip(("clean", "apgd_ce", "straight"), row, strict=True)) for alpha, row in rows.items()}


@pytest.mark.parametrize(
    "rule, drop, alpha",
    [
        ("straight_through", 0.001, 0.1),
        ("straight_through", 0.005, 0.2),
        ("straight_through", 0, 0),
        ("released", 0, 0.3),
    ],
)
def test_the_rule_chooses(rule, drop, alpha):
    assert choose(table(), RULES[rule], drop) == alpha


def test_of_equals_the_smallest_alpha_is_chosen_and_nothing_may_be_left():
    rows = table({0.0: (0.5, 0.0, 0.0), 0.1: (0.5, 0.0, 0.0), 0.2: (0.5, 0.0, 0.0)})
    assert choose(rows, RULES["straight_through"], 0) == choose(rows, RULES["released"], 0) == 0


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A classifier with operators, alpha 0.2."""
    logs = tmp_path_factory.mktemp("logs")
    for args in (
        [*TINY[:-2], "--mode", "supervised", "--epochs", "6", "--suffix", "base"],
        ["--mode", "meansparse", "--load_path", str(logs / "digits_resnet8_supervised_base"), "--ms_alpha", "0.2"],
    ):
        assert train.main([*args, "--log_root", str(logs), "--device", "cpu"]) == 0
    (logs / "digits_resnet8_meansparse_activations").rename(logs / "sparse")
    return logs / "sparse"


@pytest.fixture
def run(sparse, tmp_path, capsys):
    def evaluated(*flags, script=evaluate, source=sparse):
        folder = tmp_path / "run"
        if not folder.exists():
            shutil.copytree(source, folder)
        capsys.readouterr()
        code = script.main(["--load_path", str(folder), "--device", "cpu", *flags])
        return folder, code, *capsys.readouterr()

    return evaluated


def test_a_scan_measures_chooses_and_writes_weights_with_alpha(run):
    folder, code, out, err = run(*SCAN)
    assert code == 0, err
    found = json.loads((folder / "result_alpha_scan.json").read_text())
    rows = {row["alpha"]: row for row in found["table"]}
    assert list(rows) == [0, 0.1, 0.3] and found["n"] == 40 and found["operators"] == 7
    assert rows[0]["apgd_ce"] == rows[0]["straight"] <= rows[0]["clean"] and rows[0]["clean"] > 0.5
    assert found["alpha"] == choose(rows, RULES["straight_through"], 0.001)
    file = folder / found["sparse"]
    net = load_net("classifier", read_state(file, flag="load_path"), model="resnet8", path=file, flag="load_path")
    assert alpha_of(net) == pytest.approx(found["alpha"])
    assert read_facts(file)["flags"] == read_facts(folder / "last.model")["flags"] | {"ms_alpha": found["alpha"]}
    assert (folder / found["picture"]).stat().st_size > 10_000 and not (folder / "alpha_scan.partial.json").exists()
    assert f"chosen: {found['alpha']:g}, by straight" in out
    # Images and numbers are those of the attack mode.
    assert evaluate.main(["--load_path", str(file), "--device", "cpu"]) == 0


def test_an_interrupted_scan_goes_on_and_ends_the_same(run, monkeypatch, tmp_path):
    folder, code, *_ = run(*SCAN)
    whole = json.loads((folder / "result_alpha_scan.json").read_text())
    real, seen = module._measure, []

    def stopping(trained, victim, images, alpha):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(alpha)
        return real(trained, victim, images, alpha)

    monkeypatch.setattr(module, "_measure", stopping)
    out = ["--out", str(tmp_path / "out")]
    assert run(*SCAN, *out)[1] == 130
    kept = tmp_path / "out/alpha_scan.partial.json"
    # A true accuracy of 0 counts as measured.
    state = json.loads(kept.read_text())
    assert [row["alpha"] for row in state["table"]] == [0, 0.1] == seen
    state["table"][1]["straight"] = 0.0
    kept.write_text(json.dumps(state))
    monkeypatch.setattr(module, "_measure", lambda *args: seen.append(args[-1]) or real(*args))
    assert run(*SCAN, *out)[1] == 0 and seen == [0, 0.1, 0.3]
    again = json.loads((tmp_path / "out/result_alpha_scan.json").read_text())
    assert again["table"][2] == whole["table"][2] and again["table"][1]["straight"] == 0
    # Another scan does not go on with it.
    kept.write_text(json.dumps(state))
    assert run(*SCAN[:-1], "30", *out)[1] == 0 and seen == [0, 0.1, 0.3, 0, 0.1, 0.3]


def test_the_attack_has_columns_of_the_base_and_of_both_gradients(run, tmp_path):
    attacks = "clean apgd_ce apgd_t straight straight_t from_base base base_apgd_ce base_apgd_t".split()
    flags = ["--mode", "attack", "--attacks", *attacks, "--attack_images", "40", "--attack_steps", "4"]
    folder, code, out, err = run(*flags, "--epsilon", "0.1", "--ms_alpha", "0.5")
    assert code == 0, err
    found = json.loads((folder / "result_attack.json").read_text())
    groups = {name: row["group"] for name, row in found["attacks"].items()}
    assert {name for name, group in groups.items() if group == "base"} == {"base", "base_apgd_ce", "base_apgd_t"}
    own = [left for name, left in found["attacked"].items() if groups[name] != "base"]
    assert found["worst_case"] <= min(own) and "the headline is the worst case" in out
    assert found["settings"]["ms_alpha"] == 0.5
    base = found["attacked"]
    assert base["base_apgd_ce"] <= base["base"] != found["accuracy"] or base["base_apgd_ce"] != base["apgd_ce"]
    _, code, out, _ = run(
        *flags[:3], "clean", "apgd_ce", *flags[-4:], "--epsilon", "0.1", "--ms_alpha", "0", "--out", str(tmp_path / "o")
    )
    again = json.loads((tmp_path / "o/result_attack.json").read_text())
    assert again["accuracy"] == base["base"] and again["attacked"]["apgd_ce"] == base["base_apgd_ce"]


def test_by_default_a_sparse_network_is_attacked_both_ways_and_others_are_not(run):
    folder, code, out, err = run(
        "--mode", "attack", "--attack_images", "6", "--attack_steps", "1", "--square_queries", "2"
    )
    found = json.loads((folder / "result_attack.json").read_text())
    assert {"straight", "straight_t", "from_base", "base", "base_apgd_t"} < found["attacked"].keys()
    _, code, _, err = run("--mode", "attack", "--attacks", "straight", "--ms_alpha", "0")
    assert code == 2 and "--attacks straight: it is for networks with MeanSparse; give --ms_alpha above 0" in err


def test_pictures_of_what_is_replaced(run):
    folder, code, out, err = run("--mode", "meansparse_inside", "--ms_alpha", "0.2", script=tsne)
    assert code == 0, err
    found = json.loads((folder / "result_meansparse_inside.json").read_text())
    assert len(found["blocked"]) == 7 and all(0.02 < share < 0.6 for share in found["blocked"].values())
    assert len(list(folder.glob("meansparse_inside_*.png"))) == 2 and len(found["channels"]) == 3
    again, *_ = run("--mode", "meansparse_inside", "--ms_alpha", "0.4", script=tsne), None
    files = sorted(folder.glob("result_meansparse_inside*.json"))
    shares = [json.loads(file.read_text())["blocked"] for file in files]
    assert len(shares) == 2 and again[1] == 0
    low, high = sorted(shares, key=lambda own: own["act1.0"])
    assert all(low[name] < high[name] for name in low)
    _, code, _, err = run("--mode", "meansparse_inside", "--ms_alpha", "0", script=tsne)
    assert code == 2 and "no operators of MeanSparse that act" in err


def test_what_cannot_be_scanned_is_one_line_and_nothing_is_written(run, sparse, tmp_path):
    base = sparse.parent / "digits_resnet8_supervised_base"
    before = sorted(sparse.iterdir())

    def refused(*flags, source=sparse):
        folder, code, _, err = run(*SCAN, *flags, source=source)
        shutil.rmtree(folder)
        assert code == 2 and len(err.splitlines()) == 1
        return err

    assert "no operators of MeanSparse; train.py --mode meansparse --load_path" in refused(source=base)
    assert "--held_out: alpha is chosen on training images" in refused("--held_out", "0")
    assert "lambda must be a finite number" in refused("--alphas", "-0.1")
    assert "--max_clean_drop must be >= 0" in refused("--max_clean_drop", "-1")
    assert "--epsilon 0: nothing can be attacked" in refused("--epsilon", "0")
    bare = tmp_path / "bare"
    shutil.copytree(sparse, bare)
    state = torch.load(bare / "last.model", weights_only=True)
    emptied = [key for key in state if key.endswith((".0.threshold", ".0.running_var"))]
    facts = read_facts(bare / "last.model")
    save_tensors(bare / "last.model", state | {key: torch.zeros_like(state[key]) for key in emptied}, facts=facts)
    assert "has no statistics of its channels; collect them first" in refused(source=bare)
    folder, code, _, err = run("--ms_alpha", "0.2", source=bare)
    assert code == 2 and "--ms_alpha: " in err and "has no statistics" in err
    assert sorted(sparse.iterdir()) == before
