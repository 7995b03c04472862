"""The whole chain on scripted models, through the command line: build, rerun, look at it, and what is refused before it starts."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from tests.runs import REHEARSAL, ROOT, contents, datadose, report_files


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory, ray_address):
    store = tmp_path_factory.mktemp("rehearsal")
    run = datadose("run", REHEARSAL, store=store, RAY_ADDRESS=ray_address)
    assert run.returncode == 0, run.stderr
    return store, run


def test_run_of_a_study_ends_with_table_and_report_path(rehearsed):
    store, run = rehearsed
    assert "n00032-d3407-s0003-t3407" in run.stdout
    assert "Simulated" in run.stdout
    path = next(line for line in run.stdout.splitlines() if line.startswith("report: ")).removeprefix("report: ")
    assert (ROOT / path).resolve() == report_files(store)["report.html"].resolve()


def test_rows_in_are_rows_ok_plus_quarantined(rehearsed):
    results = json.loads(report_files(rehearsed[0])["results.json"].read_text())
    train = results["rows"]["train"]
    assert train["asked"] == 160 == train["ok"] + train["quarantined"]
    assert sum(train["by_status"].values()) == train["quarantined"] > 0
    assert train["by_status"].keys() == {"truncated", "unparsed"}


def test_tables_beside_the_report_hold_every_answer_and_verdict(rehearsed):
    files = report_files(rehearsed[0])
    assert pq.read_table(files["answers.parquet"]).num_rows == 6 * 6  # base, zero, four cells; six prompts
    assert pq.read_table(files["verdicts.parquet"]).num_rows == 6 * 6 * 2  # broken, zero, four cells; both orders
    assert pq.read_table(files["train_log.parquet"]).num_rows == 3 + 3 + 4 + 1


def test_event_log_of_the_run_is_in_the_store(rehearsed):
    (log,) = (rehearsed[0] / "events/rehearsal").glob("*.jsonl")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [event["stage"] for event in events if event["kind"] == "stage_end"] == ["synthesize", "subset", "train", "generate", "judge", "report"]
    assert sum(event["kind"] == "step_done" for event in events) == 24


def test_rerun_of_a_finished_study_builds_nothing_and_touches_nothing(rehearsed):
    store, _ = rehearsed
    before = contents(store)
    run = datadose("run", REHEARSAL, store=store)
    assert run.returncode == 0
    assert "nothing to build" in run.stdout
    assert contents(store) == before


def test_status_and_plan_as_json_say_that_all_is_done(rehearsed):
    status = json.loads(datadose("status", REHEARSAL, "--json", store=rehearsed[0]).stdout)
    assert status["missing"] == []
    plan = json.loads(datadose("plan", REHEARSAL, "--json", store=rehearsed[0]).stdout)
    assert all(cell["done"] for cell in plan["cells"])


def test_report_is_copied_with_its_tables_where_out_says(rehearsed, tmp_path):
    run = datadose("report", REHEARSAL, "--out", tmp_path / "copy", store=rehearsed[0])
    assert run.returncode == 0
    assert {path.name for path in (tmp_path / "copy").iterdir()} == set(report_files(rehearsed[0]))


def test_dry_run_lists_steps_and_builds_none(tmp_path):
    run = datadose("run", REHEARSAL, "--dry-run", store=tmp_path / "store")
    assert run.returncode == 0
    assert "24 of 24 steps would be built" in run.stdout
    assert contents(tmp_path / "store") == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "laptpo"), "did you mean 'laptop'"),
        (("run", "laptop", "--only", "trian"), "did you mean 'train'"),
        (("plan", "/nowhere/study.toml"), "no study"),
    ],
)
def test_bad_arguments_end_with_2_and_the_nearest_valid_name(tmp_path, arguments, said):
    run = datadose(*arguments, store=tmp_path)
    assert run.returncode == 2
    assert said in run.stderr.replace("\n", " ")


def test_unknown_setting_in_the_environment_names_the_nearest(tmp_path):
    run = datadose("plan", "laptop", store=tmp_path, DATADOSE_STOER="x")
    assert run.returncode == 2
    assert "did you mean 'store'" in run.stderr


def test_store_that_cannot_be_made_ends_with_2_and_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    run = datadose("run", REHEARSAL, store=tmp_path / "file" / "store")
    assert run.returncode == 2
    assert "DATADOSE_STORE" in run.stderr


def test_too_little_memory_ends_before_anything_is_built(tmp_path):
    run = datadose("run", "laptop", store=tmp_path / "store", DATADOSE_MEMORY_GIB="100000")
    assert run.returncode == 2
    assert "GiB are needed" in run.stderr.replace("\n", " ")
    assert contents(tmp_path / "store") == {}


def test_doctor_passes_on_a_machine_that_can_run_the_tests(tmp_path):
    run = datadose("doctor", REHEARSAL, store=tmp_path)
    assert run.returncode == 0, run.stdout
    assert "conditional writes: honoured" in run.stdout
