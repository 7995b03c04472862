"""Pairwise verdicts: the base's answer against each candidate's, in every order of the protocol. One engine per judge."""

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
from pipeline.tasks import Conversation


def build(context: Context, steps: Steps) -> Failed:
    failed: Failed = {}
    for judge, group in itertools.groupby(steps, key=lambda step: str(step.config["judge"])):
        failed |= answer(context, list(group), judge, prepare, "verdicts")
    return failed


def prepare(plan: Plan, step: Step, store: Store, runtime: Runtime) -> Work:
    protocol = judging.PROTOCOLS[str(step.config["protocol"])]
    asked = questions(plan, step, store)
    # By prompt and order, so that an engine with a prefix cache reads rubric, request and first completion once.
    requests = [Request(conversation, protocol.sampling, seed=0, choices=protocol.choices) for _, _, conversation in asked]
    return Work(requests, functools.partial(_table, step, asked))


def questions(plan: Plan, step: Step, store: Store) -> list[tuple[dict[str, Any], int, Conversation]]:
    """The base's row, the order and the question, for every evaluation prompt: an answer that is empty is judged like any other."""
    protocol, rubric = judging.PROTOCOLS[str(step.config["protocol"])], plan.task.rubric
    assert rubric is not None  # make_plan refuses judges without one
    base = read_table(store, step.inputs[0], "generations.parquet").to_pylist(maps_as_pydicts="strict")
    if step.config["candidate"] == BROKEN:
        candidate = {row["row_id"]: judging.broken(row["raw"]) for row in base}
    else:
        candidate = {row["row_id"]: row["raw"] for row in read_table(store, step.inputs[1], "generations.parquet").to_pylist()}
    asked = []
    for row in base:
        prompt = json.loads(row["conversation"])
        for order in protocol.orders:
            asked.append((row, order, judging.question(protocol, rubric, prompt, row["raw"], candidate[row["row_id"]], order)))
    return asked


def _table(step: Step, asked: list[tuple[dict[str, Any], int, Conversation]], completions: list[Completion]) -> pa.Table:
    protocol = judging.PROTOCOLS[str(step.config["protocol"])]
    rows = []
    for (row, order, _), completion in zip(asked, completions, strict=True):
        verdict = protocol.parse(completion.text, completion.finish_reason, order)
        rows.append({
            "row_id": row["row_id"], "fields": row["fields"], "protocol": step.config["protocol"], "judge": step.config["judge"],
            "order": order, "raw": completion.text, **verdict._asdict(),
            "prompt_tokens": completion.prompt_tokens, "completion_tokens": completion.completion_tokens,
        })  # fmt: skip
    return to_table(rows, VERDICTS)
