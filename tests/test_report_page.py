"""What a reader of the report sees: charts and table are there, failures are red, a phone can show it."""

from __future__ import annotations

import json

import pytest

from tests.browser import DESKTOP, PHONE, opened
from tests.runs import SMALL, datadose

RED = "rgb(180, 35, 24)"


@pytest.fixture(scope="module")
def report(tmp_path_factory, ray_address):
    """Of a study whose judge looks at position alone, so that a gate fails."""
    folder = tmp_path_factory.mktemp("report")
    study = folder / "small.toml"
    study.write_text(SMALL.replace("scripted/longest", "scripted/first").replace("rows = [8]", "rows = [16, 8, 4]"))
    assert datadose("run", study, store=folder / "store", RAY_ADDRESS=ray_address).returncode == 0
    assert datadose("report", study, "--out", folder / "out", store=folder / "store").returncode == 0
    return folder / "out"


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_report_shows_charts_and_table_without_network_or_sideways_scrolling(report, chromium, size):
    with opened(report / "report.html", chromium, size) as (page, wrong):
        assert page.locator(".chart svg .mark-symbol path").count() > 0
        assert page.locator("#results tbody tr").count() == 3 + 2
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        widths = page.evaluate("[...document.querySelectorAll('.chart svg')].map(svg => svg.getBoundingClientRect().width)")
        assert len(widths) == 4
        assert all(0.6 * min(size["width"], 500) < width <= size["width"] for width in widths)
        assert wrong == []


def test_failed_gate_and_simulation_stand_in_red_before_any_result(report, chromium):
    with opened(report / "report.html", chromium, DESKTOP) as (page, _):
        failed = page.locator("#gates li.failed strong")
        assert failed.count() == 1
        assert failed.evaluate("node => getComputedStyle(node).color") == RED
        warnings = page.locator("p.warning").all_inner_texts()
        assert any(text.startswith("Simulated") for text in warnings)
        assert any("judge cannot be trusted" in text for text in warnings)
        assert failed.bounding_box()["y"] < page.locator("#results").bounding_box()["y"]


def test_table_of_the_page_says_what_results_json_says(report, chromium):
    cells = json.loads((report / "results.json").read_text())["cells"]
    with opened(report / "report.html", chromium, DESKTOP) as (page, _):
        rows = [row.split("\t") for row in page.locator("#results tbody tr").all_inner_texts()]
    assert [(row[0], row[4]) for row in rows] == [(cell["name"], f"{cell['heldout_loss']:.3f}") for cell in cells]


def test_report_is_light_enough_to_mail(report):
    assert (report / "report.html").stat().st_size < 5 * 2**20
