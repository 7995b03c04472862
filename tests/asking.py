"""Models asked from a test: in an event loop of their own, which ends with no connection left open."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.llm import Completion, LanguageModel, Request


def answers(models: Callable[[], Sequence[LanguageModel]], requests: Sequence[Request], at_once: int = 32) -> list[Any]:
    """For each request its completion or exception: at most `at_once` under way at a time, in turn by each of the models."""

    async def everything() -> list[Any]:
        opened = models()
        places = asyncio.Semaphore(at_once)

        async def one(number: int, request: Request) -> Completion:
            async with places:
                return await opened[number % len(opened)].complete(request)

        try:
            return await asyncio.gather(*itertools.starmap(one, enumerate(requests)), return_exceptions=True)
        finally:
            for model in opened:
                model.close()
            if closing := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(closing)

    return asyncio.run(everything())
