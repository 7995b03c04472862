"""Language models behind one interface: `await model.complete(request)`. Any number of requests may be under way.

`open_model` is the only place that knows the providers. A scripted model is an ordinary model name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline.runtime import Runtime
from pipeline.study import ModelName, Sampling
from pipeline.tasks import Conversation

if TYPE_CHECKING:
    from pipeline.llm.limiter import Limiter


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter. Name, id and path are unique to a cell: engines cache by each of them."""

    name: str
    number: int
    path: Path


@dataclass(frozen=True)
class Request:
    conversation: Conversation
    sampling: Sampling
    seed: int
    choices: tuple[str, ...] | None = None
    """The answer is exactly one of these."""
    adapter: Adapter | None = None
    """None asks the untouched model."""
    prompt_logprobs: bool = False


@dataclass(frozen=True)
class Completion:
    """An answer, or why there is none: a row that fails for good does not raise."""

    text: str
    finish_reason: str
    """stop, length, choice, content_filter or what else a model says; error where it said nothing."""
    prompt_ids: tuple[int, ...]
    """Empty where they are not known: an endpoint tells their number only."""
    completion_tokens: int
    prompt_logprobs: tuple[float, ...] | None = None
    """Log-probability (nats) of each prompt token but the first, where asked for."""
    outcome: str = ""
    """One of schemas.STATUSES; where empty, the finish reason tells."""
    reason: str | None = None
    """Why it is not ok."""
    served_model: str | None = None
    """Who answered, by the endpoint's word."""
    attempts: int = 1
    """Times that it was asked for."""
    first_byte_s: float | None = None
    total_s: float | None = None
    """From the start of the last attempt to the first and to the last byte received; None in process and by batch."""
    prompt_count: int | None = None
    """Tokens of the prompt, where prompt_ids are not known."""

    @property
    def status(self) -> str:
        return self.outcome or ("truncated" if self.finish_reason == "length" else "ok")

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_ids) if self.prompt_count is None else self.prompt_count


class LanguageModel(Protocol):
    async def complete(self, request: Request) -> Completion: ...

    def close(self) -> None: ...


def seed_of(*parts: str | int) -> int:
    """A request's seed from what the request is about: 31 bits, the same in whatever batch it runs."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1


def open_model(name: str, runtime: Runtime, precision: str, adapters: int = 0, rank: int = 16, limiter: Limiter | None = None) -> LanguageModel:
    """Start the model `name`, with room for `adapters` LoRA adapters of `rank`.

    limiter: the run's, for a model behind an endpoint (limiter.limiter_for); without one this process has one of its own.
    """
    model = ModelName.parse(name)
    if model.provider == "scripted":
        from pipeline.llm.scripted import ScriptedModel

        return ScriptedModel(model.name)
    if model.behind_endpoint:
        from pipeline.llm.endpoint import EndpointModel
        from pipeline.llm.limiter import LocalLimiter

        return EndpointModel(model, runtime, limiter or LocalLimiter())
    from pipeline.llm.vllm_engine import VllmModel

    return VllmModel(model, runtime, precision, adapters, rank)


def engine_environment(name: str, runtime: Runtime) -> Mapping[str, str]:
    """What the process that opens this model must have in its environment from its first instruction on."""
    if not ModelName.parse(name).has_engine or runtime.gpus_per_worker:
        return {}
    from pipeline.cpu import preload_environment

    return preload_environment()
