from scripts import curve


def test_rows_of_later_epochs_make_way_for_a_run_that_was_begun_anew(tmp_path, monkeypatch, capsys):
    rows = [{"epoch": 3.0, "minutes": 1.0, "CSI": 80.0}, {"epoch": 9.0, "minutes": 2.0, "CSI": 95.0}]
    curve.write_rows(tmp_path / "curve.csv", rows)
    assert curve.read_rows(tmp_path / "curve.csv") == rows
    monkeypatch.setattr(curve, "run_folder", lambda flags: tmp_path)
    monkeypatch.setattr(curve, "train_for", lambda flags, seconds: True)
    monkeypatch.setattr(curve, "evaluate", lambda flags, folder: {"epoch": 5, "CSI": 85.0})
    assert not curve.main(["--every", "2", "--", "--mode", "simclr_CSI"])
    found = curve.read_rows(tmp_path / "curve.csv")
    assert [(row["epoch"], row["CSI"]) for row in found] == [(3, 80), (5, 85)]
