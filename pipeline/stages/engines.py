"""Engines in processes of their own: a stage that is followed by one with the same model leaves them running for it.

An engine takes half a minute and more to start. The actors that ask are Ray Data's and end with their stage; an engine is
the driver's and ends with the driver, or once a stage needs another model or none.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import ray

from pipeline.llm import Completion, LanguageModel, Request, engine_environment, open_model
from pipeline.runtime import Runtime
from pipeline.stages.workers import root_cause, worker_environment
from pipeline.study import ModelName, Study


class Engine:
    """The actor. Where its process dies, Ray starts another and asks what was under way again."""

    def __init__(self, name: str, runtime: str, precision: str, adapters: int, rank: int) -> None:
        self._arguments = name, Runtime.model_validate_json(runtime), precision, adapters, rank
        self._model: LanguageModel | None = None

    async def open(self) -> LanguageModel:
        """Not in __init__: what is raised there reaches the caller as a dead actor, without its cause."""
        if self._model is None:
            self._model = open_model(*self._arguments)
        return self._model

    async def start(self) -> None:
        await self.open()

    async def complete(self, request: Request) -> Completion:
        return await (await self.open()).complete(request)


class RemoteEngine:
    """A language model that is one of the engines."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    async def complete(self, request: Request) -> Completion:
        completion: Completion = await self._engine.complete.remote(request)
        return completion

    def close(self) -> None:
        """The engine goes on: the driver ends it."""


class _Running(NamedTuple):
    what: tuple[ModelName, str, int]
    """Model, precision, rank of the adapters."""
    adapters: int
    actors: list[Any]


_running: list[_Running] = []


def engines_for(name: str, runtime: Runtime, study: Study, adapters: int, workers: int) -> list[Any]:
    """`workers` engines that answer for `name` with room for `adapters`: those that run, or new ones in place of those that run.

    Raises what a model raises that cannot be opened, before anything is asked of it.
    """
    wanted = ModelName.parse(name), study.precision, study.training.rank
    for running in _running:
        if running.what == wanted and running.adapters >= adapters and len(running.actors) >= workers:
            return running.actors[:workers]
    end_engines()
    start = ray.remote(Engine).options(
        num_cpus=1, num_gpus=runtime.gpus_per_worker, max_concurrency=max(1000, runtime.requests_in_flight), max_restarts=2, max_task_retries=2,
        runtime_env=worker_environment(engine_environment(name, runtime), workers),
    )  # fmt: skip
    arguments = name, runtime.model_dump_json(), study.precision, adapters, study.training.rank
    actors = [start.remote(*arguments) for _ in range(workers)]
    _running.append(_Running(wanted, adapters, actors))
    try:
        ray.get([actor.start.remote() for actor in actors])
    except ray.exceptions.RayError as error:
        raise root_cause(error) from error
    return actors


def end_engines() -> None:
    for actor in itertools.chain.from_iterable(running.actors for running in _running):
        ray.kill(actor)
    _running.clear()
