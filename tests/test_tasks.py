"""What every task promises, whichever it is: this walks all modules of pipeline/tasks."""

from __future__ import annotations

import itertools
import pkgutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import tasks
from pipeline.study import parse
from pipeline.tasks import Example, Task, load, row_id

pytestmark = pytest.mark.fast

NAMES = [module.name for module in pkgutil.iter_modules(tasks.__path__)]
HEAD = 400


@pytest.fixture(scope="module", params=NAMES)
def task(request: pytest.FixtureRequest) -> Task:
    return load(request.param)


@pytest.fixture(scope="module")
def rows(task: Task) -> dict[str, list[Example]]:
    params = parse(task.params, {"name": task.name}, "[task]")
    return {split: list(itertools.islice(read(params), HEAD)) for split, read in (("train", task.train), ("evaluation", task.evaluation))}


def test_task_is_found_under_its_own_name(task: Task):
    assert task.name in NAMES
    assert task.version >= 1


def test_strata_and_cluster_are_columns(task: Task):
    assert {*task.strata, task.cluster} <= set(task.columns)


def test_row_is_known_by_a_digest_of_its_columns_and_no_two_are_alike(task: Task, rows):
    for split in rows.values():
        assert split
        assert len({row.row_id for row in split}) == len(split)
        for row in split:
            if row.problem is None:
                assert set(task.columns) <= row.fields.keys()
                assert row.row_id == row_id(task.name, task.columns, row.fields)


def test_rows_are_the_same_each_time_they_are_read(task: Task, rows):
    params = parse(task.params, {"name": task.name}, "[task]")
    assert list(itertools.islice(task.train(params), HEAD)) == rows["train"]


def test_answers_come_from_a_teacher_or_with_the_rows(task: Task, rows):
    assert (task.rich is None) == (task.parse is None)
    for row in rows["train"]:
        assert (row.answer is None) == (task.rich is not None or row.problem is not None)


def test_prompts_are_conversations_that_end_with_the_user(task: Task, rows):
    for row in itertools.chain(*rows.values()):
        for ask in filter(None, (task.plain, task.rich)):
            conversation = ask(row.fields)
            assert conversation[-1]["role"] == "user"
            assert all(message.keys() == {"role", "content"} and message["content"].strip() for message in conversation)


def test_rubric_names_what_is_compared_and_its_criteria_once_each(task: Task):
    if task.rubric is not None:
        assert task.rubric.subject.strip()
        names = [criterion.name for criterion in task.rubric.criteria]
        assert names
        assert len(set(names)) == len(names)


@given(text=st.text(max_size=300))
@pytest.mark.parametrize("name", NAMES)
def test_any_text_has_the_same_checks_each_between_none_and_all(name: str, text: str):
    found = load(name)
    row = next(iter(found.evaluation(parse(found.params, {"name": name}, "[task]"))))
    fields = {column: row.fields[column] for column in found.columns}
    checks = found.scores(fields, text)
    assert checks.keys() == found.scores(fields, "x").keys()
    assert all(0 <= value <= 1 for value in checks.values())


def test_a_rows_own_answer_passes_every_check(task: Task, rows):
    for row in rows["train"]:
        if row.answer is not None:
            assert set(task.scores({column: row.fields[column] for column in task.columns}, row.answer).values()) == {1.0}
