"""The report in a real browser: the slider recounts, the filter filters, names are names."""

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from detector import report
from detector.detector import Row
from detector.report import Report
from tests.detector.conftest import stripes


def rows(detector, count=30, seed=0):
    rng = np.random.default_rng(seed)
    low = detector.threshold.value
    for i in range(count):
        score = float(low + (1 if i % 3 else -1) * rng.uniform(0.01, 1))
        heat = rng.normal(0, 3, (64, 64)).astype(np.float32)
        yield Row(Path(f"set/<b>part</b> {i:02}.png"), score, 0.5, score < low, 0.01, heat=heat, small=stripes(i))


def written(detector, tmp_path, found, **more):
    page = Report(detector, "a </script> title")
    for row in found:
        page.add(row)
    page.write(tmp_path / "r.html", **more)
    return tmp_path / "r.html"


def data(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.S)[1])


def test_the_page_holds_all_and_needs_nothing_else(fitted, tmp_path):
    path = written(fitted, tmp_path, [*rows(fitted), Row(Path("bad.png"), why="<i>empty</i>")])
    found = data(path)
    assert len(found["rows"]) == len(found["scores"]) == 30 and found["errors"] == [
        {"name": "bad.png", "why": "<i>empty</i>"}
    ]
    scores = [row["score"] for row in found["rows"]]
    assert scores == sorted(scores) and found["threshold"] == fitted.threshold.value
    text = path.read_text()
    assert not re.search(r'(src|href)="?https?:|@import|url\(http', text) and "<b>part" not in text


def test_many_pictures_leave_the_least_normal_ones(fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_MOST", 10)
    every = list(rows(fitted, 40))
    found = data(written(fitted, tmp_path, every))
    assert [row["score"] for row in found["rows"]] == sorted(row.score for row in every)[:10]
    assert found["pictures"] == len(found["scores"]) == 40


def test_a_report_of_the_fit_has_held_out_pictures_alone(fitted, tmp_path):
    assert data(written(fitted, tmp_path, rows(fitted), held_out=True))["scores"] == []


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no chromium and chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


def text(browser, name):
    return browser.find_element("id", name).text


def test_the_slider_recounts_and_filters_filter(fitted, tmp_path, browser):
    every = list(rows(fitted))
    browser.get(written(fitted, tmp_path, every).as_uri())
    assert "a </script> title" in text(browser, "title")
    assert text(browser, "counts").startswith("10 of 30 (33.3 %)")
    assert len(browser.find_elements("css selector", "figure.anomaly")) == 10
    # Some way up, by the keyboard, as a person would.
    slider = browser.find_element("id", "slider")
    for _ in range(12):
        slider.send_keys("\ue014")
    limit = float(browser.execute_script("return threshold"))
    expected = sum(row.score < limit for row in every)
    assert expected > 10 and text(browser, "counts").startswith(f"{expected} of 30")
    held = int((fitted.calibration < limit).sum())
    assert f"{held} of {len(fitted.calibration)}" in text(browser, "counts")
    assert len(browser.find_elements("css selector", "figure.anomaly")) == expected
    browser.find_element("id", "reset").click()
    assert text(browser, "counts").startswith("10 of 30")
    browser.execute_script(
        "const k = document.getElementById('kind'); k.value = 'normal'; k.dispatchEvent(new Event('input'))"
    )
    assert text(browser, "shown") == "20 pictures"
    browser.find_element("id", "find").send_keys("part</b> 1")
    assert text(browser, "shown") == f"{sum(10 <= i < 20 and i % 3 > 0 for i in range(30))} pictures"
    lines = browser.execute_script("return table()").strip().split("\n")
    assert lines[0] == "path,verdict,score,p_value" and len(lines) == 1 + 7 and "set/<b>part</b> 1" in lines[1]
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_heat_lies_on_the_picture_and_a_phone_shows_all(fitted, tmp_path, browser):
    browser.set_window_size(390, 844)
    browser.get(written(fitted, tmp_path, rows(fitted)).as_uri())
    time.sleep(0.3)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    canvas = browser.find_element("css selector", "figure canvas")
    assert canvas.value_of_css_property("opacity") == "0"
    browser.find_element("css selector", "figure").click()
    assert float(canvas.value_of_css_property("opacity")) > 0.5
    assert browser.execute_script("const c = document.querySelector('figure canvas'); return [c.width, c.height]") == [
        72,
        72,
    ]


def test_five_thousand_pictures_are_quick(fitted, tmp_path, browser):
    small, heat = stripes(0), np.zeros((64, 64), np.float32)
    every = [Row(Path(f"{i}.png"), -1 - i / 5000, 0.5, False, 0.01, heat=heat, small=small) for i in range(5000)]
    path = written(fitted, tmp_path, every)
    start = time.monotonic()
    browser.get(path.as_uri())
    assert text(browser, "shown") == "5000 pictures" and len(browser.find_elements("css selector", "figure")) == 60
    for _ in range(5):
        browser.find_element("id", "slider").send_keys("\ue012")
    browser.find_element("id", "more").click()
    assert len(browser.find_elements("css selector", "figure")) == 120
    assert time.monotonic() - start < 30 and path.stat().st_size < 40e6
