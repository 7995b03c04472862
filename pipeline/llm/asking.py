"""How one worker asks one model: so many requests under way, each answer journaled before it counts, the budget watched.

The slot of a request is held until its answer is in the journal, so a worker that is killed loses the answers under way
and no other. Once the stage has to stop nothing more is sent, and what is under way is awaited and kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.budget import Bill, Usage, added, reached, usage_of
from pipeline.errors import EndpointStopped
from pipeline.journal import Journal, failed, keys_of
from pipeline.llm import Completion, LanguageModel, Request
from pipeline.study import ModelName, Study

if TYPE_CHECKING:
    from pipeline.llm.batches import Batches

Tell = Callable[[int, Usage], Awaitable[tuple[Usage, str | None]]]
"""Answers and usage since the last call -> what all workers of the stage have used in this run, and why to stop if they must."""

TELL_EVERY_S = 0.2
"""Workers know of each other's use as of then; of their own at once."""


@dataclass(frozen=True)
class Answered:
    completions: list[Completion]
    """One for each request, in their order."""
    seconds: float
    """The worker's time, shared out equally among all requests under way at each moment: over all steps it adds up to its busy wall time."""


class Asker:
    """Any number of `ask` may be under way; they share the slots, first come first served.

    spent: what the study's models used before this run. in_flight: slots, for a model behind an endpoint; an engine in process
    takes everything at once and fills its own batch. batches: where the endpoint is asked by its Batch API; the first question
    of all still goes by itself, which shows in what form the endpoint takes it.
    """

    def __init__(self, model: LanguageModel, name: str, study: Study, spent: Bill, in_flight: int, tell: Tell, batches: Batches | None = None) -> None:
        self._model, self._name, self._study, self._spent, self._tell_others = model, name, study, spent, tell
        self.paid = ModelName.parse(name).behind_endpoint
        self._slots = asyncio.Semaphore(in_flight) if self.paid else contextlib.nullcontext()
        self._clock = _Clock()
        self._batches, self._first, self._tried = batches, asyncio.Lock(), False
        self._used, self._untold, self._done = Usage(), Usage(), 0
        self._told_at, self._telling = 0.0, asyncio.Lock()
        self._stop: str | None = None

    async def ask(self, requests: Sequence[Request], journal: Journal | None = None, known: Mapping[str, Completion] | None = None) -> Answered:
        """Answers, out of `known` (by `journal.keys_of`) where they are there.

        Raises EndpointStopped where the stage has to stop, else the first error of a request; either once nothing is under way.
        """
        keys = keys_of(requests) if journal is not None else [""] * len(requests)
        found = [(known or {}).get(key) for key in keys]
        self._done += sum(completion is not None for completion in found)
        missing = [index for index, completion in enumerate(found) if completion is None]
        if self._batches is None or journal is None:
            results = await asyncio.gather(*(self._ask(requests[index], keys[index], journal) for index in missing), return_exceptions=True)
        else:
            results = await self._ask_by_batches(self._batches, {keys[index]: requests[index] for index in missing}, journal)
        await self._tell()
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            raise next((error for error in errors if isinstance(error, EndpointStopped)), errors[0])
        answers = dict(zip(missing, (result for result in results if not isinstance(result, BaseException)), strict=True))
        completions = [answers[index][0] if completion is None else completion for index, completion in enumerate(found)]
        return Answered(completions, sum(seconds for _, seconds in answers.values()))

    async def _ask(self, request: Request, key: str, journal: Journal | None) -> tuple[Completion, float]:
        async with self._slots:
            if self._stop is None and self.paid:
                self._stop = reached(self._study, added(self._spent, self._name, self._used), self._clock.under_way)
            if self._stop is not None:
                raise EndpointStopped(self._stop)
            entered = self._clock.enter()
            try:
                completion = await self._model.complete(request)
                if journal is not None:
                    await self._keep(journal, key, completion)
            except EndpointStopped as error:
                self._stop = self._stop or str(error)
                raise
            finally:
                seconds = self._clock.leave(entered)
        await self._count(completion)
        return completion, seconds

    async def _ask_by_batches(self, batches: Batches, asked: dict[str, Request], journal: Journal) -> list[tuple[Completion, float] | BaseException]:
        first: list[tuple[Completion, float]] = []

        async def keep(key: str, completion: Completion) -> None:
            await self._keep(journal, key, completion)
            await self._count(completion)

        async def may_send() -> None:
            await self._tell()
            if self._stop is None:
                self._stop = reached(self._study, added(self._spent, self._name, self._used), batches.under_way - 1)
            if self._stop is not None:
                raise EndpointStopped(self._stop)

        try:
            async with self._first:
                if asked and not self._tried and not await asyncio.to_thread(journal.batches):
                    key = next(iter(asked))
                    first.append(await self._ask(asked[key], key, journal))
                    self._tried = True
            rest = dict(itertools.islice(asked.items(), len(first), None))
            entered = self._clock.enter()
            try:
                answers = await batches.ask(rest, journal, keep, may_send)
            finally:
                seconds = self._clock.leave(entered)
        except Exception as error:  # noqa: BLE001  # as from `gather`
            if isinstance(error, EndpointStopped):
                self._stop = self._stop or str(error)
            return [error]
        return [*first, *((answers[key], seconds / len(rest)) for key in rest)]

    async def _keep(self, journal: Journal, key: str, completion: Completion) -> None:
        try:
            await journal.put(key, completion)
        except Exception as error:
            raise EndpointStopped(f"an answer came and could not be kept, so nothing more is asked: {error}") from error

    async def _count(self, completion: Completion) -> None:
        if self.paid:
            usage = usage_of([completion])
            self._used, self._untold = self._used + usage, self._untold + usage
        self._done += 1
        if time.monotonic() - self._told_at > TELL_EVERY_S:
            await self._tell()

    async def _tell(self) -> None:
        async with self._telling:
            self._told_at = time.monotonic()
            (done, self._done), (untold, self._untold) = (self._done, 0), (self._untold, Usage())
            used, stop = await self._tell_others(done, untold)
            self._used = used + self._untold
            self._stop = self._stop or stop


def still_known(known: Mapping[str, Completion], requests: int, share: float) -> Mapping[str, Completion]:
    """Of a step's journal what need not be asked again, at the start of a run.

    Answers, whatever they say, are never asked again. Requests that got none are, where the step was held back for them or
    was on the way to it: all of its requests are in the journal, or more of them failed than `share` of the step.
    """
    answers = {key: completion for key, completion in known.items() if not failed(completion)}
    failures = len(known) - len(answers)
    return answers if len(known) >= requests or failures > share * requests else known


class _Clock:
    """Wall time shared out among what is under way: of a moment with n requests each gets the n-th part."""

    def __init__(self) -> None:
        self.under_way = 0
        self._share, self._at = 0.0, time.monotonic()

    def enter(self) -> float:
        self._advance()
        self.under_way += 1
        return self._share

    def leave(self, entered: float) -> float:
        self._advance()
        self.under_way -= 1
        return self._share - entered

    def _advance(self) -> None:
        now = time.monotonic()
        if self.under_way:
            self._share += (now - self._at) / self.under_way
        self._at = now
