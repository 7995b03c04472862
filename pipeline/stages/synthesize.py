"""The teacher answers the rich prompt of each row; a shard of rows is a step."""

from __future__ import annotations

import functools
import json

import pyarrow as pa

from pipeline.artifacts import Step, Store
from pipeline.llm import Completion, Request, seed_of
from pipeline.plan import Plan
from pipeline.runtime import Runtime
from pipeline.schemas import EXAMPLES, to_table
from pipeline.stages import Context, Failed, Steps
from pipeline.stages.answering import Work, answer


def build(context: Context, steps: Steps) -> Failed:
    return answer(context, steps, context.plan.study.synthesis.teacher, prepare, "examples")


def prepare(plan: Plan, step: Step, store: Store, runtime: Runtime) -> Work:
    sampling, task = plan.study.synthesis.sampling, plan.task
    requests = [Request(task.rich(row.fields), sampling, seed_of("synthesize", row.row_id, sampling.seed)) for row in plan.shards[step.key]]
    return Work(requests, functools.partial(_table, plan, step))


def _table(plan: Plan, step: Step, completions: list[Completion]) -> pa.Table:
    rows = []
    for row, completion in zip(plan.shards[step.key], completions, strict=True):
        status, answer = plan.task.parse(plan.params, row.fields, completion.text, completion.status == "ok")
        rows.append({
            "row_id": row.row_id, "fields": {column: row.fields[column] for column in plan.task.columns},
            "plain": json.dumps(plan.task.plain(row.fields)), "rich": json.dumps(plan.task.rich(row.fields)),
            "raw": completion.text, "status": status, "answer": answer, "finish_reason": completion.finish_reason,
            "prompt_tokens": len(completion.prompt_ids), "completion_tokens": completion.completion_tokens,
        })  # fmt: skip
    return to_table(rows, EXAMPLES)
