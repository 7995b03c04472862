"""`datadose plan --gpus`: the training of a study on so many GPUs."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.schedule import gpu_hours, schedule_of
from pipeline.errors import UserError
from pipeline.plan import make_plan
from pipeline.runtime import Runtime
from pipeline.study import load_study

pytestmark = pytest.mark.fast

MEASURED = {"points": [[1000, 6000], [4000, 10000]], "sync_s": 0.01, "memory_gib": 80, "base_gib": 12, "cell_gib": 0.5}


@pytest.fixture(scope="module")
def paper():
    return make_plan(load_study("paper"))


@pytest.fixture
def speed(tmp_path):
    path = tmp_path / "speed.json"
    path.write_text(json.dumps(MEASURED))
    return path


@pytest.fixture
def asked(tmp_path, monkeypatch):
    monkeypatch.setenv("DATADOSE_STORE", str(tmp_path / "store"))
    return lambda *arguments: CliRunner().invoke(app, ["plan", "paper", *arguments])


def test_reference_grid_on_fifteen_gpus(paper):
    made = schedule_of(paper, 15, Runtime(), None)
    assert made["rows_on_critical_path"] <= 3_400
    assert made["rows_one_gpu_a_cell"] == 17_600
    assert made["makespan_s"] >= made["lower_bound_s"]
    assert sorted(key for item in made["placed"] for key in item["keys"]) == sorted(cell.name for cell in paper.cells)
    hours = sum((item["end_s"] - item["start_s"]) * len(item["devices"]) for item in made["placed"]) / 3600
    assert made["gpu_hours"] == pytest.approx(hours)


def test_speed_that_was_measured_counts_and_short_passes_cost_gpu_hours(paper, speed):
    one, many = schedule_of(paper, 1, Runtime(), speed), schedule_of(paper, 15, Runtime(), speed)
    assert many["makespan_s"] < one["makespan_s"] / 4
    assert many["gpu_hours"] > one["gpu_hours"]
    assert schedule_of(paper, 1, Runtime(share_base=8), speed)["makespan_s"] < one["makespan_s"] + 1e-6


def test_command_shows_schedule_makespan_bound_and_gpu_hours(asked, speed):
    shown = asked("--gpus", "15")
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.output.split())
    for wanted in ("training on 15 GPUs", "makespan", "at least", "GPU-hours", "assumed, not measured", "critical path 2,960 rows"):
        assert wanted in text
    assert "measured: " in asked("--gpus", "2", "--speed", str(speed)).output


def test_command_gives_the_schedule_as_json(asked):
    made = json.loads(asked("--gpus", "4", "--json").output)["schedule"]
    assert made["gpus"] == 4
    assert made["measured"] is None


def test_gpu_hours_of_each_stage_follow_its_tokens_and_the_size_of_its_model(paper):
    tokens = {"synthesize": 7_500 * 3600, "train": 1, "generate": 7_500 * 7200, "judge": 1_200 * 3600}
    found = gpu_hours(paper, tokens, Runtime(), None)
    assert found == {"synthesize": 1, "train": schedule_of(paper, 1, Runtime(), None)["gpu_hours"], "generate": 2, "judge": 1}  # a 70B judge


def test_stages_that_endpoints_answer_take_no_gpu_hours():
    onprem = make_plan(load_study("onprem"))
    found = gpu_hours(onprem, {"synthesize": 1, "train": 1, "generate": 1, "judge": 1}, Runtime(), None)
    assert [stage for stage, hours in found.items() if hours is None] == ["synthesize", "judge"]


def test_command_shows_gpu_hours_by_stage(asked, speed):
    shown = " ".join(asked().output.split())
    assert "GPU-hours: synthesize 0.57, train 0.61, generate 0.035, judge 1.8" in shown
    assert "not measured here" in shown
    assert json.loads(asked("--json", "--speed", str(speed)).output)["gpu_hours"]["train"] == pytest.approx(0.598, abs=0.001)


@pytest.mark.parametrize("text", ["not JSON", "[]", '{"points": []}', '{"points": [[1, 1]], "memory_gib": 80, "sped": 1}'])
def test_speed_file_that_is_none_is_told(paper, tmp_path, text):
    path = tmp_path / "speed.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"speed\.json"):
        schedule_of(paper, 2, Runtime(), path)
