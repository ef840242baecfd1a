import json

from scripts.results import main, read_results, tabulate


def write(folder, score, idx, mean, dataset="cifar10", mode="ood_pre", auroc=None):
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "mode": mode,
        "auroc": auroc or {},
        "score": score,
        "dataset": dataset,
        "one_class_idx": idx,
        "mean": mean,
    }
    result |= {"seed": 0, "epochs": 3, "device": "cpu", "flags": {"model": "resnet8"}}
    (folder / f"result_{mode}_{score}.json").write_text(json.dumps(result))


def test_rows_are_classes_then_their_mean_then_published_numbers(tmp_path, capsys):
    write(tmp_path / "a", "CSI", 0, 0.9)
    write(tmp_path / "b", "CSI", 2, 0.8)
    write(tmp_path / "c", "CSI", 2, 0.7)  # another seed
    write(tmp_path / "b", "simclr", 2, 0.6)
    header, rows = tabulate(read_results([tmp_path]))
    assert header == ["data set", "normal", "CSI (ood_pre)", "simclr (ood_pre)"]
    assert [row[1:] for row in rows] == [
        ["class 0", "90.0", ""],
        ["class 2", "75.0 (2 runs)", "60.0"],
        ["mean of 2", "82.5", "60.0 (1 of 2)"],
        ["published mean", "94.3", "87.9"],
    ]
    assert main([str(tmp_path), "--format", "csv", "--out", str(tmp_path / "t.csv")]) == 0
    assert (tmp_path / "t.csv").read_text() == capsys.readouterr().out
    assert main([str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "| cifar10  | class 0" in told and "CSI (ood_pre): model resnet8; epochs 3; seed 0; device cpu" in told


def test_all_classes_are_told_apart_from_one_set_after_the_other(tmp_path):
    write(tmp_path / "a", "CSI", None, 0.8, auroc={"svhn": 0.9, "interp": 0.7})
    write(tmp_path / "a", "CSI_sr", None, 0.6, auroc={"svhn": 0.6}, mode="ood_pre_multi_sr")
    header, rows = tabulate(read_results([tmp_path]))
    assert [row[1:] for row in rows] == [
        ["all, not svhn", "90.0", "60.0"],
        ["all, not interp", "70.0", ""],
        ["all classes", "80.0", "60.0"],
        ["published mean", "94.3", ""],  # published CSI_sr is stage 2's
    ]


def test_nothing_to_show_and_damaged_files_are_told(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2 and "no result_*.json" in capsys.readouterr().err
    (tmp_path / "result_x.json").write_text("{")
    assert main([str(tmp_path)]) == 2 and "result_x.json is not a result" in capsys.readouterr().err
