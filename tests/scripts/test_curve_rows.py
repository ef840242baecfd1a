from scripts import curve


def test_rows_of_later_epochs_make_way_and_those_of_a_run_that_was_replaced_go(tmp_path):
    rows = [{"epoch": 3.0, "minutes": 1.0, "CSI": 80.0}, {"epoch": 9.0, "minutes": 2.0, "CSI": 95.0}]
    curve.write_rows(tmp_path / "curve.csv", rows)
    assert curve.read_rows(tmp_path / "curve.csv") == rows
    drawing = curve.Curve(tmp_path, [], 5, 100)
    drawing.add({"epoch": 5, "minutes": 1.5, "CSI": 85.0})
    found = curve.read_rows(tmp_path / "curve.csv")
    assert [(row["epoch"], row["CSI"]) for row in found] == [(3, 80), (5, 85)]
    (tmp_path / "curve.csv").unlink()  # by --overwrite
    drawing.add({"epoch": 1, "minutes": 0.5, "CSI": 70.0})
    assert [row["epoch"] for row in drawing.rows] == [1]
