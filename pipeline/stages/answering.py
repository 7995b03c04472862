"""Synthesis, generation and judging are one motion: a step's questions to a model, its answers to a table, a commit.

Ray Data hands the steps to a pool of actors, each with one engine; an actor works on several steps at once, so that
the engine's batch stays full from the first question to the last. A step that fails leaves the others alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from pipeline.artifacts import Step, Store, commit, done_keys, open_store
from pipeline.errors import UserError
from pipeline.llm import Completion, LanguageModel, Request, engine_environment, open_model
from pipeline.plan import Plan, make_plan
from pipeline.runtime import Runtime
from pipeline.stages import Context, Failed, Steps
from pipeline.stages.workers import board, ensure_ray, root_cause, worker_environment
from pipeline.study import Study


@dataclass(frozen=True)
class Work:
    """What an actor needs to know of a step: its questions, and how their answers become the committed table."""

    requests: Sequence[Request]
    table: Callable[[Sequence[Completion]], pa.Table]


Prepare = Callable[[Plan, Step, Store, Runtime], Work]


class Answerer:
    """The actor. It makes the plan itself from the study, so a step travels as its key."""

    def __init__(self, study: str, runtime: str, model: str, adapters: int, prepare: Prepare, name: str, board: Any) -> None:
        self._runtime = Runtime.model_validate_json(runtime)
        self._plan = make_plan(Study.model_validate_json(study))
        self._store = open_store(self._runtime.store)
        self._model: LanguageModel = open_model(model, self._runtime, self._plan.study.precision, adapters, self._plan.study.training.rank)
        self._prepare, self._name, self._board = prepare, name, board

    async def __call__(self, batch: pa.Table) -> pa.Table:
        keys = [str(key) for key in batch["key"].to_pylist()]
        await asyncio.gather(*(self._build(self._plan.by_key[key]) for key in keys))
        return batch

    async def _build(self, step: Step) -> None:
        try:
            if step.key not in done_keys(self._store):  # another driver, or this step's earlier try
                await self._answer(step)
        except Exception as error:  # whatever it is fails this step alone, and is told
            logging.getLogger(__name__).exception("%s failed", step.key)
            await self._board.fail.remote(step.key, f"{type(error).__name__}: {error}")
        else:
            await self._board.finish.remote(step.key)

    async def _answer(self, step: Step) -> None:
        work = self._prepare(self._plan, step, self._store, self._runtime)
        tasks = [asyncio.ensure_future(self._model.complete(request)) for request in work.requests]
        for task in tasks:
            task.add_done_callback(lambda _: self._board.add.remote(1))
        completions = await asyncio.gather(*tasks)
        table = work.table(completions)
        prompt, completion = sum(item.prompt_tokens for item in completions), sum(item.completion_tokens for item in completions)
        facts: dict[str, Any] = {"rows": table.num_rows, "requests": len(completions), "prompt_tokens": prompt, "completion_tokens": completion}
        if "status" in table.schema.names:
            facts["ok"] = table["status"].to_pylist().count("ok")
        commit(self._store, step, {f"{self._name}.parquet": table}, facts)


def answer(context: Context, steps: Steps, model: str, prepare: Prepare, name: str, adapters: int = 0) -> Failed:
    """Answer all questions of `steps` with `model` and commit each step's table as `<name>.parquet`."""
    runtime = context.runtime
    ensure_ray(runtime)
    ray.data.DataContext.get_current().enable_progress_bars = False
    total = sum(len(prepare(context.plan, step, context.store, runtime).requests) for step in steps)
    workers = min(runtime.answer_workers, len(steps))
    with board(context, steps[0].stage, total, "answers") as counts:
        units = ray.data.from_items([{"key": step.key} for step in steps], override_num_blocks=len(steps))
        answered = units.map_batches(
            Answerer,
            fn_constructor_kwargs={
                "study": context.plan.study.model_dump_json(), "runtime": runtime.model_dump_json(), "model": model,
                "adapters": adapters, "prepare": prepare, "name": name, "board": counts,
            },
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=len(steps)),
            num_cpus=1,
            num_gpus=runtime.gpus_per_worker,
            max_concurrency=max(1, len(steps)),
            runtime_env=worker_environment(engine_environment(model, runtime), runtime, workers),
        )  # fmt: skip
        try:
            for _ in answered.iter_batches(batch_size=None):
                pass
        except Exception as error:
            cause = root_cause(error)
            if isinstance(cause, UserError):
                raise cause from error
            built = done_keys(context.store)
            return {step.key: f"{type(cause).__name__}: {cause}" for step in steps if step.key not in built}
        failed: Failed = ray.get(counts.failures.remote())
        return failed
