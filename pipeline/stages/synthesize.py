"""The teacher answers the rich prompt of each row, or the rows bring their own answers; a shard of rows is a step."""

from __future__ import annotations

import functools
import json
from typing import Any

import pyarrow as pa

from pipeline.artifacts import Step, Store, commit
from pipeline.llm import Completion, Request, seed_of
from pipeline.plan import Plan
from pipeline.runtime import Runtime
from pipeline.schemas import EXAMPLES, to_table
from pipeline.stages import Context, Failed, Steps
from pipeline.stages.answering import Work, answer
from pipeline.tasks import Example


def build(context: Context, steps: Steps) -> Failed:
    teacher = context.plan.study.synthesis.teacher
    if teacher is not None:
        return answer(context, steps, teacher, prepare, "examples")
    for index, step in enumerate(steps):
        table = own_rows(context.plan, step)
        commit(context.store, step, {"examples.parquet": table}, {"rows": table.num_rows, "ok": table["status"].to_pylist().count("ok")})
        context.committed(step)
        context.events.emit("progress", stage="synthesize", done=index + 1, total=len(steps), unit="shards")
    return {}


def prepare(plan: Plan, step: Step, store: Store, runtime: Runtime) -> Work:
    sampling, task = plan.study.synthesis.sampling, plan.task
    assert task.rich is not None  # a plan with a teacher has a task for it
    # Rows of the evaluation may be rows of the training too (its tier says so); their answers are not.
    requests = [
        Request(task.rich(row.fields), sampling, seed_of("synthesize", step.config["split"], row.row_id, sampling.seed)) for row in plan.shards[step.key]
    ]
    return Work(requests, functools.partial(_table, plan, step))


def _table(plan: Plan, step: Step, completions: list[Completion]) -> pa.Table:
    task = plan.task
    assert task.rich is not None
    assert task.parse is not None
    rows = []
    for row, completion in zip(plan.shards[step.key], completions, strict=True):
        status, answer = task.parse(plan.params, row.fields, completion.text, completion.status == "ok")
        rows.append({
            **_asked(plan, row), "rich": json.dumps(task.rich(row.fields)), "raw": completion.text, "status": status, "reason": None, "answer": answer,
            "finish_reason": completion.finish_reason, "prompt_tokens": completion.prompt_tokens, "completion_tokens": completion.completion_tokens,
        })  # fmt: skip
    return to_table(rows, EXAMPLES)


def own_rows(plan: Plan, step: Step) -> pa.Table:
    """The user's rows as if a teacher had written them; a row with a problem is quarantined under its reason."""
    rows = []
    for row in plan.shards[step.key]:
        status = "ok" if row.problem is None else "error"
        rows.append({
            **_asked(plan, row), "rich": None, "raw": row.answer or "", "status": status, "reason": row.problem,
            "answer": row.answer if row.problem is None else None, "finish_reason": "given", "prompt_tokens": 0, "completion_tokens": 0,
        })  # fmt: skip
    return to_table(rows, EXAMPLES)


def _asked(plan: Plan, row: Example) -> dict[str, Any]:
    return {
        "row_id": row.row_id, "fields": {column: row.fields[column] for column in plan.task.columns}, "plain": json.dumps(plan.task.plain(row.fields)),
    }  # fmt: skip
