"""`datadose plan --gpus`: the training of a study on so many GPUs."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.schedule import schedule_of
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


@pytest.mark.parametrize("text", ["not JSON", "[]", '{"points": []}', '{"points": [[1, 1]], "memory_gib": 80, "sped": 1}'])
def test_speed_file_that_is_none_is_told(paper, tmp_path, text):
    path = tmp_path / "speed.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"speed\.json"):
        schedule_of(paper, 2, Runtime(), path)
