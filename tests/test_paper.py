"""The study of Infantino 2024, number by number, and what a study may vary beyond it by one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.plan import Plan, describe, make_plan
from pipeline.study import STUDIES, Study, load_study, parse
from pipeline.tasks import SEEN
from pipeline.tasks.posts import NEW_COMPANY, NEW_PRODUCT, NEW_STYLE, TONES, TYPES
from tests.companies import COMPANY, study_with_companies
from tests.runs import ROOT, SMALL, environment

pytestmark = pytest.mark.fast

EXPERIMENTS = {
    17_600: [(50, 0.023), (150, 0.068), (2_200, 1)],
    8_800: [(50, 0.045), (150, 0.136), (1_100, 1)],
    1_760: [(50, 0.227), (150, 0.682), (220, 1)],
    176: [(50, 2.27), (150, 6.82), (22, 1)],
    88: [(50, 4.55), (150, 13.6), (11, 1)],
}
"""Rows -> (steps, epochs): the table of experiments, its 0.069 and 4.54 as the arithmetic has them."""


@pytest.fixture(scope="module")
def paper() -> Plan:
    return make_plan(load_study("paper"))


def small(**tables: dict[str, Any]) -> Study:
    import tomllib

    raw = tomllib.loads(SMALL)
    for name, values in tables.items():
        raw[name] = raw.get(name, {}) | values
    return parse(Study, raw, "small.toml")


# ---------------------------------------------------------------- the paper


def test_plan_command_prints_prompts_evaluation_prompts_and_the_fifteen_cells(tmp_path):
    command = [sys.executable, "-m", "jobs.cli", "plan", "paper", "--json"]
    told = json.loads(subprocess.run(command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, check=True).stdout)
    assert told["prompts"] == 17_600
    assert told["evaluation_prompts"] == 95
    assert [(cell["rows"], cell["steps"]) for cell in told["cells"]] == [(rows, steps) for rows, cells in EXPERIMENTS.items() for steps, _ in cells]
    for cell, (_, epochs) in zip(told["cells"], [cell for cells in EXPERIMENTS.values() for cell in cells], strict=True):
        assert (round(cell["epochs"], 3) if epochs < 1 else float(f"{cell['epochs']:.3g}")) == epochs


def test_rows_are_the_whole_cross_product_each_prompt_once(paper: Plan):
    assert len({row.row_id for row in paper.train_rows}) == 17_600
    assert len({paper.task.rich(row.fields)[1]["content"] for row in paper.train_rows}) == 17_600
    assert len({paper.task.plain(row.fields)[1]["content"] for row in paper.train_rows}) == 17_600
    assert Counter(row.tier for row in paper.train_rows) == {SEEN: 17_600}


def test_evaluation_holds_five_rows_for_each_of_nineteen_values_and_says_that_training_sees_them(paper: Plan):
    assert len({row.row_id for row in paper.evaluation_rows}) == 95
    for column, values in (("length", 3), ("type", 11), ("tone", 5)):
        counts = Counter(row.fields[column] for row in paper.evaluation_rows)
        assert len(counts) == values
        assert min(counts.values()) >= 5
    assert {row.tier for row in paper.evaluation_rows} == {SEEN}


def test_training_arguments_are_those_of_the_tables(paper: Plan):
    training = paper.study.training
    assert (training.global_batch, training.warmup_steps, training.learning_rate, training.optimizer) == (2 * 4, 5, 2e-4, "adamw_8bit")
    assert (training.weight_decay, training.schedule, training.seeds) == (0.1, "linear", (3407,))
    assert (training.rank, training.alpha, training.quantization, training.layers) == (16, 16, "nf4", None)
    assert training.targets == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert paper.study.train_on == "plain"


# ---------------------------------------------------------------- what a study may vary


def test_rows_and_exposure_vary_independently_by_rows_times_epochs():
    plan = make_plan(small(grid={"rows": [24, 16, 8], "steps": [], "epochs": [0.5, 1, 4]}))
    assert {(cell.rows, cell.steps) for cell in plan.cells} == {(24, 2), (24, 3), (24, 12), (16, 1), (16, 2), (16, 8), (8, 1), (8, 4)}


def test_shares_are_of_the_rows_that_there_are():
    plan = make_plan(small(grid={"rows": [], "shares": [1.0, 0.5, 0.1], "steps": [1]}))
    assert sorted({cell.rows for cell in plan.cells}) == [2, 12, 24]


def test_several_draws_and_training_seeds_are_cells_of_their_own():
    plan = make_plan(small(subsets={"seeds": [1, 2]}, training={"seeds": [5, 6, 7]}))
    assert {(cell.draw, cell.seed) for cell in plan.cells} == {(draw, seed) for draw in (1, 2) for seed in (5, 6, 7)}
    assert len(plan.stage("subset")) == 2
    assert len({step.fingerprint for step in plan.stage("train")}) == 7


@pytest.mark.parametrize(
    ("table", "value"),
    [
        ("training", {"learning_rate": 1e-4}),
        ("training", {"rank": 8}),
        ("training", {"global_batch": 4}),
        ("training", {"layers": [0, 1]}),
        ("subsets", {"nested": True, "seeds": [1]}),
        ("generation", {"temperature": 0.1}),
    ],
)
def test_one_line_makes_other_cells(table: str, value: dict[str, Any]):
    before, after = make_plan(small()), make_plan(small(**{table: value}))
    assert not {step.key for step in before.stage("generate") if step.name not in ("base", "zero")} & {step.key for step in after.stage("generate")}


def test_nested_subsets_lie_inside_the_next_larger_one():
    plan = make_plan(small(grid={"rows": [16, 8]}, subsets={"nested": True}))
    smaller, larger = (plan.by_name["subset", name] for name in ("n00008-d3407", "n00016-d3407"))
    assert smaller.inputs == (larger,)


def test_tiers_are_balanced_and_never_new_in_two_respects():
    study = small(
        task={"companies": None, "held_out": ["wrenfold-software"], "held_out_products": ["Tax Pot"], "held_out_tones": ["witty"], "tiers": None}
        | {"companies": ["penrook"]},
        evaluation={"count": 12},
    )
    products = {row.fields["product"] for row in make_plan(small()).train_rows}
    named = sorted(products)[0]
    study = study.model_copy(update={"task": study.task | {"held_out_products": [named]}})
    plan = make_plan(study)
    assert Counter(row.tier for row in plan.evaluation_rows) == {NEW_COMPANY: 4, NEW_PRODUCT: 4, NEW_STYLE: 4}
    for row in plan.evaluation_rows:
        new = {NEW_COMPANY: row.fields["company"] == "Wrenfold Software", NEW_PRODUCT: row.fields["product"] == named, NEW_STYLE: row.fields["tone"] == "witty"}
        assert [tier for tier, is_new in new.items() if is_new] == [row.tier]
    assert not any(row.fields["tone"] == "witty" or row.fields["product"] == named for row in plan.train_rows)


def test_seen_combinations_are_evaluated_beside_new_ones_where_asked():
    plan = make_plan(small(task={"tiers": [SEEN, NEW_COMPANY]}, evaluation={"count": 8}))
    assert Counter(row.tier for row in plan.evaluation_rows) == {SEEN: 4, NEW_COMPANY: 4}


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"held_out_tones": ["wity"]}, "did you mean 'witty'"),
        ({"held_out_types": ["poll"]}, "'poll' is not one of"),
        ({"held_out_products": ["Perpetual Motion"]}, "sold by none"),
        ({"tiers": [NEW_PRODUCT]}, "'new product' is not one of"),
    ],
)
def test_what_cannot_be_held_out_is_named(task: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        make_plan(small(task=task))


# ---------------------------------------------------------------- companies of the user's own


def test_study_with_a_file_of_two_hundred_companies_plans_as_one_with_fifteen(tmp_path):
    plan = make_plan(load_study(study_with_companies(tmp_path, 200)))
    assert len({row.fields["company"] for row in plan.task.train(plan.params)}) == 200
    assert sum(1 for _ in plan.task.train(plan.params)) == 200 * 2 * len(TYPES) * len(TONES)
    assert len(plan.cells) == 1


def test_file_of_companies_is_known_by_its_content_not_its_place(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    one, other = (make_plan(load_study(study_with_companies(tmp_path / name, 2, held_out=["kite-1"]))) for name in ("here", "there"))
    assert [step.key for step in one.steps] == [step.key for step in other.steps]


def test_companies_of_a_file_and_of_the_tree_can_be_mixed(tmp_path):
    plan = make_plan(load_study(study_with_companies(tmp_path, 2, companies=["kite-0", "penrook"], held_out=["kite-1"])))
    assert {row.fields["company"] for row in plan.task.train(plan.params)} == {"Kite 0", "Penrook"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "wanted one table for each company"),
        ("name = 'Kite'", "wanted one table for each company"),
        ("[kite]\nname = 'Kite'", "'description' is missing"),
        ("[kite", "not valid TOML"),
        (COMPANY.format(slug="kite", name="Kite") + "motto = 'up'\n", "unknown key 'motto'"),
    ],
)
def test_bad_file_of_companies_is_named(tmp_path, text: str, said: str):
    path = study_with_companies(tmp_path, 1)
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UserError, match=said):
        make_plan(load_study(path))


def test_missing_file_of_companies_is_named(tmp_path):
    path = study_with_companies(tmp_path, 1)
    (tmp_path / "mine.toml").unlink()
    with pytest.raises(UserError, match=r"task\.companies_file = 'mine\.toml' cannot be read"):
        load_study(path)


# ---------------------------------------------------------------- rehearsal


def test_rehearsal_of_a_study_has_its_cells_and_no_model(paper: Plan):
    rehearsed = make_plan(paper.study.rehearsed())
    assert [cell.name for cell in rehearsed.cells] == [cell.name for cell in paper.cells]
    assert len(rehearsed.study.simulated) == 2 + len(paper.study.judging.judges)
    assert not {step.key for step in rehearsed.steps} & {step.key for step in paper.steps}
    assert describe(rehearsed, set())["study"] == "paper-rehearsal"


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_study_in_the_tree_can_be_rehearsed(path: Path):
    assert make_plan(load_study(path).rehearsed()).cells
