import json

import pytest

from scripts.results import main, read_results, tabulate
from tests.conftest import ROOT


def write(folder, score, idx, mean, dataset="cifar10", mode="ood_pre", auroc=None, name="", **more):
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "mode": mode,
        "auroc": auroc or {},
        "score": score,
        "dataset": dataset,
        "one_class_idx": idx,
        "mean": mean,
    }
    result |= {"seed": 0, "epochs": 3, "device": "cpu", "flags": {"model": "resnet8", **more.pop("flags", {})}}
    (folder / f"result_{mode}_{score}{name}.json").write_text(json.dumps(result | more))


def images(fingerprint, training="", **others):
    """The entry "data" of a result on the data set folder."""
    sets = {"folder": fingerprint, "training": training, **others}
    return {"data": {name: {"images": 90, "fingerprint": value * 16} for name, value in sets.items()}}


def table(folder):
    """(header without the first two, rows without blanks)."""
    header, rows = tabulate(read_results([folder]))
    return header[2:], rows


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


def test_all_classes_are_compared_with_one_set_after_the_other(tmp_path):
    write(tmp_path / "a", "CSI", None, 0.8, auroc={"svhn": 0.9, "interp": 0.7})
    write(tmp_path / "a", "CSI_sr", None, 0.6, auroc={"svhn": 0.6}, mode="ood_pre_multi_sr")
    header, rows = tabulate(read_results([tmp_path]))
    assert [row[1:] for row in rows] == [
        ["all, not svhn", "90.0", "60.0"],
        ["all, not interp", "70.0", ""],
        ["all classes", "80.0", "60.0"],
        ["published mean", "94.3", ""],  # published CSI_sr is stage 2's
    ]


def test_nothing_to_show_and_damaged_files_are_reported(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2 and "no result_*.json" in capsys.readouterr().err
    (tmp_path / "result_x.json").write_text("{")
    assert main([str(tmp_path)]) == 2 and "result_x.json is not a result" in capsys.readouterr().err


def test_what_was_found_in_training_data_has_no_place_in_the_table(tmp_path, capsys):
    found = {"mode": "rdae_outliers", "dataset": "digits", "one_class_idx": 4, "trained_on": True, "f1": 0.5}
    (tmp_path / "result_rdae_outliers.json").write_text(json.dumps(found))
    assert main([str(tmp_path)]) == 2 and "no AUROC in the result_*.json" in capsys.readouterr().err
    write(tmp_path, "CSI", 4, 0.9, "digits")
    assert table(tmp_path) == (["CSI (ood_pre)"], [["digits", "class 4", "90.0"]])


def test_autoencoders_of_several_modes_are_columns_of_their_own(tmp_path):
    """Their runs are not named after a backbone, and --model says nothing of them."""
    for mode, mean in (("rdae_l21_rows_q0.1", 0.9), ("dae", 0.7)):
        run = f"digits_dense_{mode}_one_class_4"
        more = {"checkpoint": f"{run}/last.model", "settings": {"autoencoder": "dense"}}
        write(tmp_path / run, "reconstruction", 4, mean, "digits", "ood_reconstruction", **more)
    header, rows = table(tmp_path)
    assert header == [f"reconstruction (ood_reconstruction, dense_{mode})" for mode in ("dae", "rdae_l21_rows_q0.1")]
    assert rows == [["digits", "class 4", "70.0", "90.0"]]


@pytest.mark.parametrize(
    "one, other, names",
    [
        ({"weights": "last"}, {"weights": "previous"}, ("last", "previous")),
        ({"checkpoint": "x/last.model"}, {"checkpoint": "x/start.model"}, ("last", "start")),  # of an older version
        ({"epochs": 3}, {"epochs": 12}, ("epochs 3", "epochs 12")),
        ({"flags": {"model": "resnet8"}}, {"flags": {"model": "resnet18"}}, ("resnet8", "resnet18")),
        ({"settings": {"ood_samples": 4}}, {"settings": {"ood_samples": 10}}, ("ood_samples 4", "ood_samples 10")),
        ({"settings": {"resize_fix": True}}, {"settings": {"resize_fix": False}}, ("resize_fix", "no resize_fix")),
        # Weights of two modes, or of two runs of one.
        (
            {"checkpoint": "cifar10_resnet8_unsup_simclr_one_class_0/last.model"},
            {"checkpoint": "cifar10_resnet8_unsup_simclr_CSI_shift_rotation_one_class_0_b/last.model"},
            ("unsup_simclr", "unsup_simclr_CSI_shift_rotation_b"),
        ),
    ],
)
def test_what_differs_is_not_averaged_but_a_column_each_that_says_so(one, other, names, tmp_path):
    usual = {"weights": "last"} if "checkpoint" not in one else {}
    write(tmp_path / "a", "CSI", 0, 0.9, **usual | one)
    write(tmp_path / "a", "CSI", 0, 0.7, name="_1a2b3c4d", **usual | other)
    write(tmp_path / "a", "knn", 0, 0.5)
    header, rows = table(tmp_path)
    assert sorted(header) == sorted([f"CSI (ood_pre, {name})" for name in names] + ["knn (ood_pre)"])
    assert rows[0][1:] == ["class 0", *({names[0]: "90.0", names[1]: "70.0"}.get(h[14:-1], "50.0") for h in header)]


def test_seeds_are_averaged_and_older_files_stand_beside_new_ones(tmp_path):
    flags = {"ood_samples": 4, "resize_fix": True, "data_path": "pictures"}
    new = {"weights": "last", "settings": {"ood_samples": 4, "resize_fix": True}, "class_name": "ship", **images("a")}
    write(tmp_path / "a", "CSI", 8, 0.9, "folder", flags=flags, **new)
    write(tmp_path / "b", "CSI", 8, 0.8, "folder", flags=flags, **new | {"seed": 1})
    write(tmp_path / "c", "CSI", 8, 0.7, "folder", flags=flags, seed=2)  # as an older version wrote it
    assert table(tmp_path) == (["CSI (ood_pre)"], [["folder", "class 8 (ship)", "80.0 (3 runs)"]])
    # What is known to differ is told, and then what is not known is not guessed.
    write(tmp_path / "d", "CSI", 8, 0.5, "folder", flags=flags, **new | {"weights": "previous"})
    header, rows = table(tmp_path)
    assert header == ["CSI (ood_pre, last)", "CSI (ood_pre, previous)", "CSI (ood_pre, unknown)"]
    assert rows == [["folder", "class 8 (ship)", "85.0 (2 runs)", "50.0", "70.0"]]


def test_two_data_sets_of_one_name_are_rows_of_their_own(tmp_path):
    for images_of, path, mean in (("a", "x/cats/data/", 0.9), ("b", "x/dogs/data", 0.5)):
        for idx, name in ((0, "cat"), (1, "1")):
            more = {"class_name": name, "flags": {"data_path": path}, **images(images_of)}
            write(tmp_path / f"{images_of}{idx}", "CSI", idx, mean + 0.01 * idx, "folder", **more)
    header, rows = table(tmp_path)
    assert header == ["CSI (ood_pre)"] and rows == [
        ["folder (cats/data)", "class 0 (cat)", "90.0"],
        ["folder (cats/data)", "class 1", "91.0"],
        ["folder (cats/data)", "mean of 2", "90.5"],
        ["folder (dogs/data)", "class 0 (cat)", "50.0"],
        ["folder (dogs/data)", "class 1", "51.0"],
        ["folder (dogs/data)", "mean of 2", "50.5"],
    ]
    # Pictures that were replaced: where they lie does not tell them apart.
    write(tmp_path / "c", "CSI", 0, 0.2, "folder", flags={"data_path": "x/dogs/data"}, **images("c"))
    assert {row[0] for row in table(tmp_path)[1]} == {"folder (aaaaaa)", "folder (bbbbbb)", "folder (cccccc)"}


def test_folders_of_an_older_version_are_distinguished_by_their_paths(tmp_path):
    for place, mean in (("data/one", 0.9), ("data/two", 0.7)):
        write(tmp_path / place[-3:], "CSI", 0, mean, "folder", flags={"data_path": place})
    assert table(tmp_path)[1] == [["folder (one)", "class 0", "90.0"], ["folder (two)", "class 0", "70.0"]]


def test_a_class_of_another_name_or_other_training_images_is_a_row_of_its_own(tmp_path):
    for i, (name, training) in enumerate((("cat", "d"), ("ship", "d"), ("cat", "e"))):
        write(tmp_path / str(i), "CSI", 0, 0.9 - i / 10, "folder", class_name=name, **images("a", training))
    write(tmp_path / "last", "CSI", 1, 0.3, "folder", class_name="dog", **images("a", "f"))
    assert [row[1:] for row in table(tmp_path)[1]] == [
        ["class 0 (cat), training dddddd", "90.0"],
        ["class 0 (cat), training eeeeee", "70.0"],
        ["class 0 (ship), training dddddd", "80.0"],
        ["class 1 (dog)", "30.0"],  # and no mean of classes that do not belong together
    ]


def test_sets_that_all_classes_are_compared_with_are_identified_by_their_images(tmp_path):
    for i, fingerprint in enumerate("bc"):
        more = images("a", svhn=fingerprint)
        write(tmp_path / fingerprint, "CSI", None, 0.9 - i / 10, "folder", auroc={"svhn": 0.9 - i / 10}, **more)
    write(tmp_path / "d", "CSI", None, 0.6, "folder", auroc={"svhn": 0.8, "interp": 0.4}, **images("a", svhn="b"))
    header, rows = table(tmp_path)
    sets = ("interp svhn (bbbbbb)", "svhn (bbbbbb)", "svhn (cccccc)")
    assert header == [f"CSI (ood_pre, against {names})" for names in sets]
    assert [row[1:] for row in rows] == [
        ["all, not svhn (bbbbbb)", "80.0", "90.0", ""],
        ["all, not svhn (cccccc)", "", "", "80.0"],
        ["all, not interp", "40.0", "", ""],
        ["all classes", "60.0", "90.0", "80.0"],
    ]


def test_a_table_that_cannot_be_written_is_reported(tmp_path, capsys):
    write(tmp_path, "CSI", 0, 0.9)
    assert main([str(tmp_path), "--out", str(tmp_path / "nowhere" / "t.md")]) == 2
    told = capsys.readouterr()
    assert "--out" in told.err and told.err.count("\n") == 1 and not told.out


def test_the_quickstarts_table_is_as_the_readme_has_it(tmp_path, capsys):
    found = {"CSI": (0.972, 0.878, 0.930), "CSI_sr": (0.9884, 0.9734, 0.9556)}
    modes = {"CSI": "ood_pre_refmix", "CSI_sr": "ood_pre_cocsr_refmix"}
    for score, means in found.items():
        for idx, mean in enumerate(means):
            run = f"digits_resnet8_unsup_cocsr_dict_shift_rot_bmix_cocsr_ld0.001_lr0.001_invf_one_class_{idx}"
            more = {"checkpoint": f"logs/quickstart/{run}/last.cocsr_model", "weights": "last", "class_name": str(idx)}
            more["settings"] = {"ood_samples": 4, "resize_fix": True, "image_size": 16, "ood_score": [score]}
            test, training = ({"images": 599, "fingerprint": value * 16} for value in ("a", str(idx)))
            more["data"] = {"digits": test, "training": training}
            write(tmp_path / run, score, idx, mean, "digits", modes[score], **more)
    assert main([str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert told.partition("Mean AUROC")[0] in (ROOT / "README.md").read_text()
    assert told.endswith("CSI_sr (ood_pre_cocsr_refmix): model resnet8; epochs 3; seed 0; device cpu\n")


def test_published_means_do_not_stand_below_groups_that_are_not_published(tmp_path):
    for kind, mean in (("published", 0.9), ("standard", 0.8)):
        write(tmp_path / kind, "CSI", 0, mean, dataset="cifar100", settings={"superclasses": kind})
    header, rows = table(tmp_path)
    assert header == ["CSI (ood_pre, superclasses published)", "CSI (ood_pre, superclasses standard)"]
    assert rows[-1][1:] == ["published mean", "89.6", ""]
