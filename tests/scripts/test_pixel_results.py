"""What results of the pixel baseline say of where they come from, and which of them keep their files."""

import json

from scripts.pixel_baseline import main
from scripts.results import read_results, tabulate
from tests.datasets.test_folder import fill


def results(folder) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*/result_*.json")}


def test_a_result_says_what_it_depends_on(tmp_path, capsys):
    digits = ["--dataset", "digits", "--one_class_idx", "3", "--log_root", str(tmp_path)]
    assert main([*digits, "--image_size", "8"]) == 0
    found = results(tmp_path)["result_pixels_nearest.json"]
    assert (found["weights"], found["class_name"], found["settings"]) == (None, "3", {"image_size": 8})
    assert {name: data["images"] for name, data in found["data"].items()} == {"digits": 599, "training": 122}
    # Another size is another result; the same again takes the place of the first.
    assert main([*digits, "--image_size", "10"]) == main([*digits, "--image_size", "8"]) == 0
    sizes = {name: found["settings"]["image_size"] for name, found in results(tmp_path).items() if "nearest" in name}
    assert len(sizes) == 2 and sizes["result_pixels_nearest.json"] == 8
    header, rows = tabulate(read_results([tmp_path]))
    assert header[2:] == [f"{score} (pixels, image_size {size})" for score in ("nearest", "ocsvm") for size in (10, 8)]
    assert len(rows) == 1 and "" not in rows[0]
    capsys.readouterr()


def test_the_normal_class_may_be_named(tmp_path, capsys):
    fill(tmp_path / "data", {"train/cat": 3, "train/ship": 3, "test/cat": 2, "test/ship": 2})
    args = ["--dataset", "folder", "--data_path", str(tmp_path / "data"), "--log_root", str(tmp_path)]
    assert main([*args, "--one_class_idx", "ship"]) == 0
    found = results(tmp_path)["result_pixels_ocsvm.json"]
    assert (found["one_class_idx"], found["class_name"], list(found["auroc"])) == (1, "ship", ["one_class_0"])
    assert (tmp_path / "folder_pixels_one_class_1").is_dir()
    capsys.readouterr()


def test_what_cannot_work_is_reported(tmp_path, capsys):
    assert main(["--dataset", "digits"]) == 2
    assert "--one_class_idx" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["--dataset", "digits", "--one_class_idx", "3", "--log_root", str(tmp_path / "file")]) == 2
    errors = capsys.readouterr().err
    assert "--log_root: cannot make" in errors and errors.count("\n") == 1
