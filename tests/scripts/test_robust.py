"""Tables of attacks: rows, columns, means over seeds, and what is refused."""

import json

import pytest

from common.errors import UserError
from scripts.robust import main, read, table, tables


def result(root, name, *, seed=0, weights="last", worst=0.3, masked=(), eps=8 / 255, images="f", **flags):
    folder = root / f"{name}_s{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    flags = {"mode": "adv_pgd", "model": "resnet8", "seed": seed, "ra": False, "anc": False} | flags
    (folder / "args.json").write_text(json.dumps({"flags": flags}))
    found = {
        "dataset": "folder", "n": 500, "norm": "linf", "epsilon": eps, "precision": "bf16", "weights": weights,
        "epochs": 15, "data": {"folder": {"images": 500, "fingerprint": images}}, "accuracy": 0.8,
        "attacked": {"pgd40": 0.5, "autoattack": 0.4}, "worst": {"standard": 0.38, "adaptive": worst + 0.01},
        "worst_case": worst, "signs": [{"name": sign, "number": 1.0, "shows": True} for sign in masked],
    }  # fmt: skip
    tag = "" if weights == "last" else f"_{weights}"
    path = folder / f"result_attack{tag}.json"
    path.write_text(json.dumps(found))
    return path


def test_rows_are_in_order_and_their_cells_are_means_over_seeds(tmp_path):
    result(tmp_path, "b", mode="adv_trades", ra=True, anc=True, worst=0.2, masked=["more steps leave more"])
    result(tmp_path, "b", mode="adv_trades", ra=True, anc=True, worst=0.3, seed=1)
    result(tmp_path, "a", mode="supervised", worst=0.0)
    result(tmp_path, "a", mode="supervised", worst=0.1, weights="best")
    header, rows = table(read([tmp_path]))
    assert header == ["training", "weights", "epochs", "natural", "pgd40", "autoattack", "worst, final logits",
                      "worst, adaptive", "worst case", "masked gradients"]  # fmt: skip
    assert [row[:2] for row in rows] == [["plain", "best"], ["plain", "last"], ["TRADES-ANCRA", "last"]]
    assert rows[2][2:] == ["15", "80.0 ± 0.0", "50.0 ± 0.0", "40.0 ± 0.0", "38.0 ± 0.0", "26.0 ± 7.1", "25.0 ± 7.1",
                           "more steps leave more"]  # fmt: skip


def test_results_at_other_radii_are_another_table(tmp_path, capsys):
    result(tmp_path, "a")
    result(tmp_path, "b", eps=4 / 255, ra=True)
    assert main([str(tmp_path), "--out", str(tmp_path / "t.md")]) == 0
    text = capsys.readouterr().out
    assert text.count("**folder, resnet8, 500 images, linf") == 2 and "linf 4/255" in text and "| PGD + RA " in text
    assert (tmp_path / "t.md").read_text() == text


def test_each_seed_draws_its_images_and_networks_of_a_seed_are_compared_on_the_same(tmp_path):
    for seed in (0, 1):
        result(tmp_path, "a", seed=seed, images=f"of {seed}", worst=0.2 + 0.2 * seed)
    text = tables([tmp_path], ["natural", "worst case"])
    assert text.count("**folder") == 1 and "seeds 0, 1" in text and "30.0 ± 14.1" in text and "pgd40" not in text
    result(tmp_path, "b", mode="adv_mart", images="others")
    assert tables([tmp_path]).count("**folder") == 3
    with pytest.raises(UserError, match="--columns cw: there are natural, pgd40"):
        tables([tmp_path], ["cw"])


def refused(capsys, *args):
    assert main([*map(str, args)]) == 2
    return capsys.readouterr().err


def test_what_is_no_result_is_refused(tmp_path, capsys):
    assert "nothing to show" in refused(capsys, tmp_path)
    path = result(tmp_path, "a")
    result(tmp_path, "b")
    assert "are of one network and seed" in refused(capsys, tmp_path)
    path.write_text("{")
    assert "is not a result of eval.py --mode attack" in refused(capsys, tmp_path)


@pytest.mark.parametrize("parts, title", [((1, 0), "MART + RA"), ((0, 1), "MART + ANC"), ((0, 0), "MART")])
def test_parts_are_named(parts, title, tmp_path):
    result(tmp_path, "a", mode="adv_mart", ra=bool(parts[0]), anc=bool(parts[1]))
    assert read([tmp_path])[0].method[-1] == title
