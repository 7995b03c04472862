"""What a reader of the report sees: charts and table are there, failures are red, a phone can show it."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from pipeline.artifacts import open_store, parquet_bytes
from pipeline.plan import make_plan
from pipeline.stages import report_pairs
from pipeline.stages.report import make_report
from pipeline.study import load_study
from tests.browser import DESKTOP, PHONE, opened
from tests.runs import SMALL, datadose

RED = "rgb(180, 35, 24)"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """With a judge that looks at position alone, so that a gate fails, and with companies and a tone that are new."""
    path = tmp_path_factory.mktemp("report") / "small.toml"
    text = SMALL.replace('["scripted/longest"]', '["scripted/longest", "scripted/first"]\nprotocols = ["paper", "blind"]').replace(
        "rows = [8]", "rows = [16, 8, 4]"
    )
    path.write_text(text.replace('name = "posts"', 'name = "posts"\nheld_out_tones = ["witty"]').replace("count = 3", "count = 6"))
    return path


@pytest.fixture(scope="module")
def report(study, ray_address):
    folder = study.parent
    run = datadose("run", study, store=folder / "store", RAY_ADDRESS=ray_address)
    assert run.returncode == 0
    (folder / "stdout").write_text(run.stdout)
    assert datadose("report", study, "--out", folder / "out", store=folder / "store").returncode == 0
    return folder / "out"


@pytest.fixture(scope="module")
def results(report):
    return json.loads((report / "results.json").read_text())


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_report_shows_charts_and_table_without_network_or_sideways_scrolling(report, chromium, size):
    with opened(report / "report.html", chromium, size) as (page, wrong):
        assert page.locator(".chart svg .mark-symbol path").count() > 0
        assert page.locator("#results tbody tr").count() == 3 + 2
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        widths = page.evaluate("[...document.querySelectorAll('.chart svg')].map(svg => svg.getBoundingClientRect().width)")
        titles = page.locator("figure h3").all_inner_texts()
        assert len(widths) == len(titles) == 2 + 4 * 2 + 2 * 2 + 2 + 1  # loss, checks; win rates; ratios with losses; protocols, breakdown; steps
        assert {"Held-out loss", "What the protocols say, side by side", "Where it wins", "Training loss, 2 steps"} <= set(titles)
        assert all(0.6 * min(size["width"], 500) < width <= size["width"] for width in widths)
        assert wrong == []


def test_judge_that_looks_at_position_alone_fails_its_gate_in_words_and_figures(report, results):
    told = " ".join((report.parent / "stdout").read_text().split())
    assert "FAILED a broken answer loses (scripted/first, protocol blind)" in told
    gates = [(gate["about"], gate["passed"]) for gate in results["gates"] if gate["about"].startswith("blind")]
    assert gates == [("blind-0", True), ("blind-0", True), ("blind-1", True), ("blind-1", False)]
    judge = next(item for item in results["judges"] if item["key"] == "blind-1")
    assert (judge["first_position_share"], judge["flip_rate"]) == (1.0, 1.0)


def test_failed_gate_and_simulation_stand_in_red_before_any_result(report, chromium):
    with opened(report / "report.html", chromium, DESKTOP) as (page, _):
        failed = page.locator("#gates li.failed strong")
        assert failed.count() == 1
        assert failed.evaluate("node => getComputedStyle(node).color") == RED
        warnings = page.locator("p.warning").all_inner_texts()
        assert any(text.startswith("Simulated") for text in warnings)
        assert [text for text in warnings if "failed a gate" in text] == [
            "Under protocol blind the judge scripted/first failed a gate below: what it says there is shown for comparison only."
        ]
        assert failed.bounding_box()["y"] < page.locator("#results").bounding_box()["y"]


def test_table_of_the_page_says_what_results_json_says(report, results, chromium):
    with opened(report / "report.html", chromium, DESKTOP) as (page, _):
        rows = [row.split("\t") for row in page.locator("#results tbody tr").all_inner_texts()]
    assert [(row[0], row[4]) for row in rows] == [(cell["name"], f"{cell['heldout_loss']:.3f}") for cell in results["cells"]]


def test_ratios_stand_highest_first_with_both_protocols_beside_each_other(report, results, chromium):
    with opened(report / "report.html", chromium, DESKTOP) as (page, _):
        rows = [row.split("\t") for row in page.locator("#ratios tbody tr").all_inner_texts()]
        heads = page.locator("#ratios th").all_inner_texts()
    assert [head for head in heads if head.startswith("ratio")] == ["ratio, paper-0", "ratio, blind-0", "ratio, paper-1", "ratio, blind-1"]
    ratios = {cell["name"]: cell["win_rates"]["paper-0"]["ratio"] for cell in results["cells"] if cell["rows"]}
    heights = [float("inf") if ratios[row[0]]["value"] is None else ratios[row[0]]["value"] for row in rows]
    assert heights == sorted(heights, reverse=True)


def test_tiers_are_shown_apart_and_the_audit_says_what_training_holds(results, report, chromium):
    base = results["cells"][0]
    assert {tier: part["prompts"] for tier, part in base["tiers"].items()} == {"new company": 3, "new tone or type": 3}
    assert results["overlap"]["exact"] == 0
    with opened(report / "report.html", chromium, DESKTOP) as (page, _):
        assert page.locator("#tiers tbody tr").count() == 3 + 2


def test_verdicts_of_the_table_are_the_counts_of_the_results(results, report):
    verdicts = pq.read_table(report / "verdicts.parquet").to_pylist()
    for cell in results["cells"][2:]:
        mine = [row for row in verdicts if row["candidate"] == cell["name"] and row["judge"] == "scripted/longest" and row["protocol"] == "paper"]
        counts = cell["win_rates"]["paper-0"]
        assert (counts["wins"], counts["losses"]) == tuple(sum(row["pick"] == pick for row in mine) for pick in ("candidate", "baseline"))
        assert all(row["explanation"] for row in mine)


def test_breakdown_by_each_stratum_sums_to_the_cell(results):
    for cell in results["cells"][2:]:
        for key, counts in cell["win_rates"].items():
            for by in {row["by"] for row in results["breakdown"]}:
                mine = [row for row in results["breakdown"] if (row["cell"], row["key"], row["by"]) == (cell["name"], key, by)]
                assert [sum(row[name] for row in mine) for name in ("win", "loss", "tie")] == [counts["wins"], counts["losses"], counts["ties"]]


def browse(page, cells: int) -> None:
    """What a reader does with the pairs: choose a cell, open one, filter by verdict, search."""
    assert page.locator("#pairs-count").inner_text() == "6 of 6 pairs"
    assert page.locator("#pairs > details").count() == 6
    names = page.locator("#pairs-filters select").first.locator("option").all_inner_texts()
    assert len(names) == cells
    page.locator("#pairs-filters select").first.select_option(names[-1])
    page.wait_for_function("name => [...document.querySelectorAll('#pairs > details')].length === 6", arg=names[-1])
    first = page.locator("#pairs > details").first
    first.locator("summary").click()
    first.locator(".pair").first.wait_for()  # it is filled when the browser tells that it was opened
    assert first.locator(".pair b").all_inner_texts() == ["base", names[-1]]
    assert first.locator(".verdicts li").count() == 2 * (1 + 2)
    assert first.locator(".verdicts q").count() == 2
    page.locator("#pairs-filters select").nth(1).select_option("blind-1|tied")
    assert page.locator("#pairs-count").inner_text() == "6 of 6 pairs"
    page.locator("#pairs-filters select").nth(1).select_option("blind-1|won")
    assert page.locator("#pairs-count").inner_text() == "0 of 6 pairs"
    page.locator("#pairs-filters select").nth(1).select_option("")
    page.locator("#pairs-filters input").fill("Wrenfold")
    assert page.locator("#pairs-count").inner_text() == "3 of 6 pairs"


def test_pairs_can_be_browsed_filtered_and_searched(report, chromium):
    with opened(report / "report.html", chromium, PHONE) as (page, wrong):
        browse(page, 3)
        assert wrong == []


def test_more_pairs_than_the_page_carries_lie_beside_it_and_are_loaded_when_chosen(study, report, chromium, tmp_path, monkeypatch):
    monkeypatch.setattr(report_pairs, "INLINE", 17)  # 3 cells x 6 prompts are one too many
    files = make_report(make_plan(load_study(study)), open_store(str(report.parent / "store")))
    for name, item in files.items():
        (tmp_path / name).write_bytes(item if isinstance(item, bytes) else parquet_bytes(item))
    assert len(list(tmp_path.glob("pairs-*.js"))) == 1 + 3
    with opened(tmp_path / "report.html", chromium, PHONE) as (page, wrong):
        page.wait_for_selector("#pairs > details")
        assert page.locator("head script[src]").count() == 2  # the rows and the first cell
        browse(page, 3)
        assert page.locator("head script[src]").count() == 3
        assert wrong == []


def test_answer_that_looks_like_markup_is_shown_as_text(study, report, chromium, tmp_path, monkeypatch):
    hostile = "</script><script>document.title='stolen'</script><img src=x onerror=\"document.title='stolen'\"><!--"
    real = report_pairs.pairs

    def poisoned(plan, answers, judged):
        return real(plan, {name: [{**row, "raw": hostile} for row in rows] for name, rows in answers.items()}, judged)

    monkeypatch.setattr(report_pairs, "pairs", poisoned)
    (tmp_path / "report.html").write_bytes(make_report(make_plan(load_study(study)), open_store(str(report.parent / "store")))["report.html"])
    with opened(tmp_path / "report.html", chromium, PHONE) as (page, wrong):
        page.locator("#pairs summary").first.click()
        assert hostile in page.locator("#pairs .pair p").first.inner_text()
        assert "stolen" not in page.title()
        assert wrong == []


def test_report_is_light_enough_to_mail(report):
    assert (report / "report.html").stat().st_size < 5 * 2**20
