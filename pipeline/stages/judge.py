"""Pairwise verdicts: the base's answer against each candidate's, in both orders. One engine per judge."""

from __future__ import annotations

import functools
import itertools
import json
from typing import Any

import pyarrow as pa

from pipeline import judging
from pipeline.artifacts import Step, Store, read_table
from pipeline.llm import Completion, Request
from pipeline.plan import BROKEN, Plan
from pipeline.runtime import Runtime
from pipeline.schemas import VERDICTS, to_table
from pipeline.stages import Context, Failed, Steps
from pipeline.stages.answering import Work, answer
from pipeline.study import Sampling

GREEDY = Sampling(temperature=0, max_tokens=judging.SAMPLING_TOKENS)


def build(context: Context, steps: Steps) -> Failed:
    failed: Failed = {}
    for judge, group in itertools.groupby(steps, key=lambda step: str(step.config["judge"])):
        failed |= answer(context, list(group), judge, prepare, "verdicts")
    return failed


def prepare(plan: Plan, step: Step, store: Store, runtime: Runtime) -> Work:
    asked = questions(plan, step, store)
    # By prompt and order, so that an engine with a prefix cache reads rubric, request and first post once.
    return Work([Request(conversation, GREEDY, seed=0, choices=judging.CHOICES) for _, _, conversation in asked], functools.partial(_table, step, asked))


def questions(plan: Plan, step: Step, store: Store) -> list[tuple[dict[str, Any], int, Any]]:
    base = read_table(store, step.inputs[0], "generations.parquet").to_pylist(maps_as_pydicts="strict")
    if step.config["candidate"] == BROKEN:
        candidate = {row["row_id"]: judging.broken(row["raw"]) for row in base}
    else:
        candidate = {row["row_id"]: row["raw"] for row in read_table(store, step.inputs[1], "generations.parquet").to_pylist()}
    asked = []
    for row in base:
        request = json.loads(row["conversation"])[-1]["content"]
        for order in (0, 1):
            asked.append((row, order, judging.question(plan.task, request, row["raw"], candidate[row["row_id"]], order)))
    return asked


def _table(step: Step, asked: list[tuple[dict[str, Any], int, Any]], completions: list[Completion]) -> pa.Table:
    rows = []
    for (row, order, _), completion in zip(asked, completions, strict=True):
        status, pick = judging.parse_pick(completion.text, order)
        rows.append({
            "row_id": row["row_id"], "fields": row["fields"], "protocol": step.config["protocol"], "judge": step.config["judge"],
            "order": order, "raw": completion.text, "status": status, "pick": pick,
            "prompt_tokens": len(completion.prompt_ids), "completion_tokens": completion.completion_tokens,
        })  # fmt: skip
    return to_table(rows, VERDICTS)
