"""Answers of the base and of every cell to the evaluation prompts: one engine, one adapter per cell."""

from __future__ import annotations

import functools
import json

import pyarrow as pa

from pipeline.artifacts import Step, Store, read_manifest
from pipeline.llm import Adapter, Completion, Request, seed_of
from pipeline.plan import BASE, Plan
from pipeline.runtime import Runtime
from pipeline.schemas import GENERATIONS, to_table
from pipeline.stages import Context, Failed, Steps
from pipeline.stages.answering import Asked, Work, answer
from pipeline.study import ModelName


def build(context: Context, steps: Steps) -> Failed:
    adapters = sum(step.name != BASE for step in context.plan.stage("generate"))
    study = context.plan.study
    keep = ModelName.parse(study.base) in map(ModelName.parse, study.judging.judges)
    return answer(context, steps, Asked(study.base, prepare, "generations", adapters=adapters, keep_engines=keep))


def prepare(plan: Plan, step: Step, store: Store, runtime: Runtime) -> Work:
    sampling = plan.study.generation
    adapter = adapter_of(plan, step, store, runtime)
    requests = [
        Request(plan.task.plain(row.fields), sampling, seed_of("generate", step.name, row.row_id, sampling.seed), adapter=adapter, prompt_logprobs=index == 0)
        for index, row in enumerate(plan.evaluation_rows)
    ]
    return Work(requests, functools.partial(_table, plan))


def adapter_of(plan: Plan, step: Step, store: Store, runtime: Runtime) -> Adapter | None:
    if step.name == BASE:
        return None
    (trained,) = step.inputs
    manifest = read_manifest(store, trained)
    if manifest is None:
        raise ValueError(f"{trained.key} is not built")
    paths = [store.path(item.key, runtime.cache_dir) for name, item in manifest.objects.items() if name.startswith("adapter/")]
    number = 1 + [item.name for item in plan.stage("train")].index(step.name)
    return Adapter(trained.key, number, paths[0].parent)


def _table(plan: Plan, completions: list[Completion]) -> pa.Table:
    rows = []
    for row, completion in zip(plan.evaluation_rows, completions, strict=True):
        text = completion.text.strip()  # scored and judged as it is, cut off or not: that is what a user would get
        rows.append({
            "row_id": row.row_id, "fields": {column: row.fields[column] for column in plan.task.columns},
            "conversation": json.dumps(plan.task.plain(row.fields)), "raw": completion.text,
            "status": "ok" if text else "unparsed", "answer": text or None,
            "finish_reason": completion.finish_reason, "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.completion_tokens, "prompt_ids": list(completion.prompt_ids),
            "prompt_logprobs": None if completion.prompt_logprobs is None else list(completion.prompt_logprobs),
        })  # fmt: skip
    return to_table(rows, GENERATIONS)
