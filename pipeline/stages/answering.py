"""Synthesis, generation and judging are one motion: a step's questions to a model, its answers to a table, a commit.

Ray Data hands the steps to a pool of actors, each with one model; an actor works on several steps at once, so that
an engine's batch stays full from the first question to the last. A step that fails leaves the others alone; what is
wrong with the endpoint, the budget or too many of the rows stops the stage, and every answer that came is kept.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from pipeline.artifacts import Step, Store, commit, done_keys, open_store, read_manifest
from pipeline.budget import NO_LIMIT, Bill, Limit, Tally, Usage, usage_of
from pipeline.errors import EndpointStopped, UserError
from pipeline.journal import Journal
from pipeline.ledger import spent
from pipeline.llm import Completion, LanguageModel, Request, open_model
from pipeline.llm.asking import Answered, Asker, still_known
from pipeline.llm.batches import batches_for
from pipeline.llm.limiter import Limiter, limiter_for
from pipeline.plan import Plan, asked_model, make_plan
from pipeline.runtime import Runtime
from pipeline.stages import Context, Failed, Steps
from pipeline.stages.engines import RemoteEngine, end_engines, engines_for
from pipeline.stages.workers import board, ensure_ray, root_cause, worker_environment
from pipeline.study import Budget, ModelName, Study


@dataclass(frozen=True)
class Work:
    """What an actor needs to know of a step: its questions, and how their answers become the committed table."""

    requests: Sequence[Request]
    table: Callable[[Sequence[Completion]], pa.Table]


Prepare = Callable[[Plan, Step, Store, Runtime], Work]


@dataclass(frozen=True)
class Asked:
    """What a stage asks, and of whom."""

    model: str
    prepare: Prepare
    name: str
    """Of the committed table."""
    limit: Limit = NO_LIMIT
    adapters: int = 0
    keep_engines: bool = False
    """They go on running: the next stage asks the same model."""


class Answerer:
    """The actor. It makes the plan itself from the study, so a step travels as its key.

    settled: the stage as a whole is within its limit, so steps that were held back are committed as they are.
    engines: one for each actor of the pool, where the model runs on this cluster.
    """

    def __init__(
        self, study: str, runtime: str, asked: Asked, spent_before: Bill, settled: bool, limiter: Limiter | None, engines: Sequence[Any], board: Any
    ) -> None:
        self._runtime = Runtime.model_validate_json(runtime)
        self._plan = make_plan(Study.model_validate_json(study))
        self._store = open_store(self._runtime.store)
        self._asked, self._settled, self._board = asked, settled, board
        self._model: LanguageModel
        if engines:
            self._model = RemoteEngine(engines[ray.get(board.join.remote()) % len(engines)])
        else:
            self._model = open_model(asked.model, self._runtime, self._plan.study.precision, limiter=limiter)
        self._asker = Asker(
            self._model, asked.model, self._plan.study, spent_before, self._runtime.requests_in_flight, self._tell, batches_for(self._model, self._runtime)
        )

    def __del__(self) -> None:
        """Ray Data drops the object when its actor has nothing left to do."""
        if hasattr(self, "_model"):  # it may not have opened
            self._model.close()

    async def __call__(self, batch: pa.Table) -> pa.Table:
        keys = [str(key) for key in batch["key"].to_pylist()]
        await asyncio.gather(*(self._build(self._plan.by_key[key]) for key in keys))
        return batch

    async def _tell(self, done: int, used: Usage) -> tuple[Usage, str | None]:
        self._board.add.remote(done)
        total, reason = await self._board.tally.remote("use", used)
        return total, reason

    async def _build(self, step: Step) -> None:
        try:
            built = await self._answer(step)
        except EndpointStopped as error:
            await self._board.tally.remote("stop", str(error))
        except Exception as error:  # whatever it is fails this step alone, and is told
            logging.getLogger(__name__).exception("%s failed", step.key)
            await self._board.fail.remote(step.key, f"{type(error).__name__}: {error}")
        else:
            if built:
                await self._board.finish.remote(step.key)

    async def _answer(self, step: Step) -> bool:
        """Whether the step is committed: it is not where it has to wait for the stage's other rows."""
        journal = Journal(self._store, step) if self._asker.paid else None
        known = await asyncio.to_thread(journal.load) if journal else {}
        # Another driver, or this step's earlier try. A journal goes after the commit, so one that was read before is whole.
        if await asyncio.to_thread(read_manifest, self._store, step) is not None:
            return True
        work = await asyncio.to_thread(self._asked.prepare, self._plan, step, self._store, self._runtime)
        if not self._settled:
            known = dict(still_known(known, len(work.requests), self._asked.limit.share))
        answered = await self._asker.ask(work.requests, journal, known)
        table = await asyncio.to_thread(work.table, answered.completions)
        lost = quarantined(table)
        if not self._settled and not await self._board.tally.remote("quarantine", step.key, table.num_rows, lost, journal is not None):
            return False
        facts = self._facts(table, answered, lost)
        await asyncio.to_thread(commit, self._store, step, {f"{self._asked.name}.parquet": table}, facts)
        if journal:
            await asyncio.to_thread(journal.discard)
        return True

    def _facts(self, table: pa.Table, answered: Answered, lost: Counter[str]) -> dict[str, Any]:
        usage = usage_of(answered.completions)
        gpus = 0.0 if self._asker.paid else self._runtime.gpus_per_worker
        return {
            "rows": table.num_rows, "ok": table.num_rows - lost.total(), "quarantined": lost.total(), "reasons": dict(lost),
            "requests": usage.requests, "prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens,
            "seconds": answered.seconds, "gpu_seconds": gpus * answered.seconds if gpus else None,
        }  # fmt: skip


def quarantined(table: pa.Table) -> Counter[str]:
    """Rows of a table that are not ok, by status and reason."""
    reasons = table["reason"].to_pylist() if "reason" in table.schema.names else [None] * table.num_rows
    statuses: list[Any] = table["status"].to_pylist()
    return Counter(f"{status}: {reason}" if reason else status for status, reason in zip(statuses, reasons, strict=True) if status != "ok")


def answer(context: Context, steps: Steps, asked: Asked) -> Failed:
    """Answer all questions of `steps` and commit each step's table as `<asked.name>.parquet`.

    Raises EndpointStopped where the stage had to stop: the key was refused, the budget is used up, too many rows are quarantined.
    """
    plan, store = context.plan, context.store
    ensure_ray(context.runtime)
    ray.data.DataContext.get_current().enable_progress_bars = False
    total = sum(len(asked.prepare(plan, step, store, context.runtime).requests) for step in steps)
    rows, lost = _committed(context, steps, asked)
    tally = Tally(asked.limit, rows + total, lost)
    if tally.check() is not None:
        raise EndpointStopped(f"{steps[0].stage}: {tally.reason}")
    before = spent(plan, store) if ModelName.parse(asked.model).behind_endpoint and plan.study.budget != Budget() else {}
    kept = False
    try:
        failed, held = _round(context, steps, asked, tally, before, total, settled=False)
        if held:
            waiting = [step for step in steps if step.key in held]
            failed |= _round(context, waiting, asked, tally, before, total, settled=True)[0]
        kept = asked.keep_engines and not failed  # an engine that died answers nobody any more
        return failed
    finally:
        if not kept:
            end_engines()


def _committed(context: Context, steps: Steps, asked: Asked) -> tuple[int, Counter[str]]:
    """Rows of the stage's other steps under the same model that are committed, and those of them that are quarantined."""
    rows, lost, mine = 0, Counter[str](), {step.key for step in steps}
    for step in context.plan.stage(steps[0].stage):
        if step.key not in mine and asked_model(step) == asked.model and (manifest := read_manifest(context.store, step)) is not None:
            rows += manifest.facts["rows"]
            lost.update(manifest.facts.get("reasons", {}))
    return rows, lost


def _round(context: Context, steps: Steps, asked: Asked, tally: Tally, before: Bill, total: int, settled: bool) -> tuple[Failed, list[str]]:
    """One pass over the steps -> why some failed, and the keys of those that are answered and not committed."""
    runtime, stage = context.runtime, steps[0].stage
    workers = min(runtime.answer_workers, len(steps))
    engines: list[Any] = []
    if ModelName.parse(asked.model).has_engine:
        engines = engines_for(asked.model, runtime, context.plan.study, asked.adapters, workers)
    with board(context, stage, total, "answers", tally) as counts:
        units = ray.data.from_items([{"key": step.key} for step in steps], override_num_blocks=len(steps))
        answered = units.map_batches(
            Answerer,
            fn_constructor_kwargs={
                "study": context.plan.study.model_dump_json(), "runtime": runtime.model_dump_json(), "asked": asked, "spent_before": before,
                "settled": settled, "limiter": limiter_for(asked.model, runtime), "engines": engines, "board": counts,
            },
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=len(steps)),
            num_cpus=0 if engines else 1,
            max_concurrency=max(1, len(steps)),
            runtime_env=worker_environment({}, workers),
        )  # fmt: skip
        try:
            for _ in answered.iter_batches(batch_size=None):
                pass
        except Exception as error:
            cause = root_cause(error)
            if isinstance(cause, UserError):
                raise cause from error
            built = done_keys(context.store)
            return {step.key: f"{type(cause).__name__}: {cause}" for step in steps if step.key not in built}, []
        reason, held = ray.get(counts.tally.remote("outcome"))
        failed: Failed = ray.get(counts.failures.remote())
    if reason is not None:
        context.events.emit("stage_stopped", stage=stage, reason=reason)
        raise EndpointStopped(f"{stage}: {reason}")
    return failed, held
