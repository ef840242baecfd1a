from common import progress as module
from common.progress import progress


def test_lines_of_long_work_come_now_and_then_and_tell_what_is_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: False, raising=False)
    for _ in progress(range(10), total=10, label="reading", every_s=25.0):
        now[0] += 10.0
    assert capsys.readouterr().out.splitlines() == [
        "reading: 3/10, about 70 s left",
        "reading: 6/10, about 40 s left",
        "reading: 9/10, about 10 s left",
    ]
