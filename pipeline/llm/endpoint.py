"""Models behind an OpenAI-compatible endpoint: Groq, a vLLM server, others. One retry layer, here; none in the HTTP library.

A row that fails for good is a Completion with its status and its reason; what would fail for every row (key refused,
model gone, quota used up) raises EndpointStopped, for the requests under way too. No key and no exception of the HTTP
library gets out of this module. Answers are not streamed: the first byte that is timed is that of the response's head,
which an endpoint sends once the answer is whole, or when it begins to send it.

A fixed choice is asked for in the form that the endpoint honours, found by trying and remembered: vLLM's
`structured_outputs` first, then `response_format` with a JSON schema, else in words alone. A form is given up when the
endpoint refuses its parameter or answers with something else. vLLM takes sampling parameters that a request leaves out
from the model's own configuration, so they are sent even where they are neutral, until an endpoint refuses to know them.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import json
import random
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import EndpointStopped, UserError
from pipeline.keys import key_source, read_key
from pipeline.llm import Completion, Request
from pipeline.llm.limiter import LONGEST_WAIT_S, Limiter, Report, asked_wait, observed
from pipeline.network import address_of, allowed
from pipeline.runtime import Runtime
from pipeline.study import ModelName

RETRIED = {408, 409, 429, 498, 500, 502, 503, 504, 529}
"""Statuses that another attempt may mend: 498 and 529 are Groq's and Anthropic's ways to say that they are full."""
CONNECT_S = 10.0
"""A host that takes longer to accept is not there."""
KEEP_ALIVE_S = 4.0
"""Idle connections are left before uvicorn, which serves vLLM, closes them after 5 s under a request."""
CHARS_PER_TOKEN, TEMPLATE_TOKENS = 3.0, 8
"""A guess at a prompt that is rather too large (English has 4.2 characters), and what a template adds to a message."""
JSON_TOKENS = 16
"""What {"choice": "..."} may take beside the choice itself."""
SECRET = 16
"""Characters from which a key is taken out of answers too: shorter ones (EMPTY, token) are words, and no secrets."""
REMEMBERED = 65_536
"""Answers by which a repeated delivery is known."""

_NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
_THOUGHT = re.compile(r"\s*<(think|thinking)>.*?(?:</\1>|\Z)\s*", re.DOTALL)
_GONE = re.compile(r"model_not_found|model_decommissioned|\bmodels?\b.*\b(not found|does not exist|not exist|decommissioned)\b", re.IGNORECASE | re.DOTALL)
_PASSING = re.compile(r"rate.?limit|overload|capacity|server_error|internal|unavailable|timeout|timed out|try again", re.IGNORECASE)


class Form(enum.IntEnum):
    """How a request is written, the richest first."""

    VLLM = 0
    OPENAI = 1
    PLAIN = 2


class AgainError(Exception):
    """Worth another attempt, after `wait_s` where the endpoint named it."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class FormRefusedError(Exception):
    """The next form may do."""


@dataclass(frozen=True)
class Reply:
    """headers: names in small letters. first_byte_s, total_s: from the request's start to the response's head and to its last byte."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    first_byte_s: float
    total_s: float


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Message(_Lenient):
    content: str | list[dict[str, Any]] | None = None
    refusal: str | None = None

    @property
    def text(self) -> str:
        """What is said aloud: `reasoning` and `reasoning_content` are not, nor are parts that are not text."""
        if isinstance(self.content, list):
            return "".join(str(part.get("text", "")) for part in self.content if part.get("type") == "text")
        return self.content or ""


class _Choice(_Lenient):
    message: _Message | None = None
    finish_reason: str | None = None


class _Usage(_Lenient):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Answer(_Lenient):
    id: Any = None
    model: str | None = None
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


class EndpointModel:
    """Any number of requests at once; their connections belong to the event loop that asks and are closed with it.

    Raises UserError where the address or the key is missing, or where the closed network does not hold the endpoint.
    """

    def __init__(self, model: ModelName, runtime: Runtime, limiter: Limiter) -> None:
        self._model, self._runtime, self._limiter = model, runtime, limiter
        self.name, self.attempts = model.name, runtime.endpoint_attempts
        self._address = address_of(model, runtime)
        if not allowed(model, runtime):
            raise UserError(f"{model} is outside the closed network (DATADOSE_NETWORK=closed); nothing was sent. Add its host to DATADOSE_ALLOWED_HOSTS")
        self._key = read_key(model, runtime)
        self.form = Form.OPENAI if model.provider == "groq" else Form.VLLM
        self._stopped: str | None = None
        self._answered: dict[int, int] = {}
        """Digest of an answer that has an id -> digest of its question."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: aiohttp.ClientSession | None = None
        self._lifetime: AsyncGenerator[aiohttp.ClientSession] | None = None
        self._closing: asyncio.Task[None] | None = None

    async def complete(self, request: Request) -> Completion:
        """The answer, or a status and a reason after `endpoint_attempts`. Raises EndpointStopped where asking on is no use."""
        if request.adapter or request.prompt_logprobs:
            raise UserError(f"{self._model} is behind an endpoint: adapters and prompt log-probabilities can only be had from a model in process, vllm/...")
        form, asked, failed = self.form, 0, 0
        while True:
            if self._stopped:
                raise EndpointStopped(self._stopped)
            form = max(form, self.form)
            asked += 1
            try:
                completion = await self._ask(request, form)
            except FormRefusedError:
                form = Form(form + 1)
            except AgainError as again:
                failed += 1
                if failed >= self.attempts:
                    return Completion("", "error", (), 0, outcome="error", reason=f"{again} (attempt {asked}, the last)", attempts=asked, prompt_count=0)
                await asyncio.sleep(self._wait_s(again, failed))
            except EndpointStopped as error:
                self._stopped = str(error)
                raise
            else:
                if completion.outcome != "error":
                    self.form = max(self.form, form)
                return replace(completion, attempts=asked)

    def close(self) -> None:
        """Close the connections, from any thread; the end of the event loop closes them too. Who asks again opens new ones."""
        lifetime, self._lifetime, self._session = self._lifetime, None, None
        if lifetime is None or self._loop is None or not self._loop.is_running():
            return
        try:
            inside = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            inside = False
        if inside:
            self._closing = self._loop.create_task(_shut(lifetime))
        else:
            asyncio.run_coroutine_threadsafe(_shut(lifetime), self._loop)

    async def list_models(self) -> list[str] | None:
        """Names by GET /models; None where the endpoint has no such list. Raises UserError where it cannot be reached or refuses the key."""
        try:
            reply = await self.call("GET", "models")
        except AgainError as error:
            raise UserError(f"{self._address} cannot be reached ({error}); check the address, and that the server runs") from None
        if reply.status in (401, 403):
            raise UserError(f"{self._address} refuses the key ({reply.status}); {self._key_state()}")
        body = loads(reply.body) if reply.status == 200 else None
        listed = body.get("data") if isinstance(body, dict) else None
        return [str(item["id"]) for item in listed if isinstance(item, dict) and "id" in item] if isinstance(listed, list) else None

    def _key_state(self) -> str:
        return f"{key_source(self._model, self._runtime)} {'holds a wrong one' if self._key else 'is not set'}"

    def _wait_s(self, again: AgainError, failed: int) -> float:
        """What the endpoint asks for, else exponential backoff with full jitter (Brooker 2015, AWS Architecture Blog)."""
        cap = self._runtime.endpoint_wait_cap_s
        if again.wait_s:
            return min(again.wait_s, cap)
        return random.uniform(0, min(cap, self._runtime.endpoint_backoff_s * 2 ** (failed - 1)))

    # ---------------------------------------------------------------- one attempt

    async def _ask(self, request: Request, form: Form) -> Completion:
        permit = await self._limiter.acquire(_estimate(request))
        report = Report(permit, None)
        try:
            reply = await self.call("POST", "chat/completions", json.dumps(body_of(self.name, request, form)).encode())
            limits = observed(reply.headers, "day" if self._model.provider == "groq" else "minute")
            report = report._replace(observed=limits, tokens=None if reply.status == 200 else 0)
            if reply.status == 429:
                report = report._replace(refused=True, pause_s=min(asked_wait(reply.headers, limits) or 0.0, self._runtime.endpoint_wait_cap_s))
            completion = self.read(reply, request, form)
            if reply.status == 200:
                report = report._replace(tokens=completion.prompt_tokens + completion.completion_tokens or None)
            return completion
        finally:
            self._limiter.report(report)

    async def call(self, method: str, path: str, content: bytes | aiohttp.FormData | None = None) -> Reply:
        """One exchange, tried once, with no redirect followed. Raises AgainError where no whole answer came."""
        session = await self._open()
        kind = {"content-type": "application/json"} if isinstance(content, bytes) else None
        started = time.monotonic()
        try:
            async with (
                asyncio.timeout(self._runtime.endpoint_timeout_s),
                session.request(method, f"{self._address}/{path}", data=content, headers=kind, allow_redirects=False) as response,
            ):
                first_byte_s = time.monotonic() - started
                body = await response.read()
        except TimeoutError:
            failure = f"no whole answer within {time.monotonic() - started:.3g} s"
        except (aiohttp.ClientError, OSError) as error:
            failure = self._said(f"the connection failed: {type(error).__name__} {getattr(error, 'os_error', error)}")
        else:
            if self._key and (response.status != 200 or len(self._key) >= SECRET):
                body = self._key.scrub_bytes(body)
            headers = {name.lower(): value for name, value in response.headers.items()}
            return Reply(response.status, headers, body, first_byte_s, time.monotonic() - started)
        raise AgainError(failure)  # outside of `except`: what the library raised holds the headers that were sent

    async def insist(self, method: str, path: str, content: Callable[[], bytes | aiohttp.FormData] | None = None) -> Reply:
        """A call that may be made again until its answer is no passing fault. Raises EndpointStopped where it stays one, or the key is refused."""
        for failed in itertools.count(1):
            try:
                reply = await self.call(method, path, content() if content else None)
                if reply.status not in RETRIED:
                    break
                again = AgainError(self.told(reply), asked_wait(reply.headers, observed(reply.headers)))
            except AgainError as error:
                again = error
            if failed >= self.attempts:
                raise EndpointStopped(f"{self._address}/{path}: {again} (attempt {failed}, the last); run again later, what came back stays")
            await asyncio.sleep(self._wait_s(again, failed))
        if reply.status in (401, 403):
            raise EndpointStopped(f"{self._address} refuses the key ({self.told(reply)}); {self._key_state()}")
        return reply

    def told(self, reply: Reply) -> str:
        """Status and message of an error."""
        return self._said(f"{reply.status} {_error_in(loads(reply.body))[1]}")

    def stop(self, why: str) -> EndpointStopped:
        return EndpointStopped(f"{self._address}: {self._said(why)}")

    async def _open(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if self._session is None or loop is not self._loop:
            self._loop, self._lifetime = loop, self._connected()
            self._session = await anext(self._lifetime)
        return self._session

    async def _connected(self) -> AsyncGenerator[aiohttp.ClientSession]:
        """A generator, since an event loop closes these when it ends: connections do not outlive it."""
        connector = aiohttp.TCPConnector(
            limit=0,
            keepalive_timeout=KEEP_ALIVE_S,
            resolver=aiohttp.ThreadedResolver(),  # by Python's sockets, which the guard of a closed network sees
        )
        async with aiohttp.ClientSession(
            connector=connector,
            headers={"user-agent": "datadose", **({"authorization": f"Bearer {self._key.reveal()}"} if self._key else {})},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            trust_env=not _on_loopback(self._address),  # no proxy between a machine and itself
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as session:
            yield session

    # ---------------------------------------------------------------- what came back

    def read(self, reply: Reply, request: Request, form: Form) -> Completion:
        """What a whole response says. Raises AgainError, FormRefusedError, EndpointStopped."""
        if reply.status != 200:
            return self._explain(reply.status, loads(reply.body), reply, request, form)
        try:
            answer = _Answer.model_validate_json(reply.body)
        except ValidationError:
            raise AgainError("the answer is not the JSON of a chat completion") from None
        if answer.error:
            code = answer.error.get("code") if isinstance(answer.error, dict) else None
            return self._explain(code if isinstance(code, int) and 400 <= code < 600 else 200, {"error": answer.error}, reply, request, form)
        if answer.id and not self._first_time(hash((str(answer.id), reply.body)), hash((json.dumps(request.conversation), request.seed))):
            raise AgainError("the answer to another question was delivered again")
        usage = answer.usage or _Usage()
        found = Completion(
            "", "error", (), usage.completion_tokens or 0, served_model=answer.model, first_byte_s=reply.first_byte_s, total_s=reply.total_s,
            prompt_count=usage.prompt_tokens or 0,
        )  # fmt: skip
        if not answer.choices:
            return replace(found, outcome="unparsed", reason="the answer has no choices")
        choice = answer.choices[0]
        finish = choice.finish_reason or "stop"
        if finish in ("error", "abort"):
            raise AgainError(f"the answer broke off ({finish})")
        message = choice.message or _Message()
        text, thought = message.text, _THOUGHT.match(message.text)
        if thought:
            text = text[thought.end() :]
        elif "</think>" in text:  # a template that opens the thought itself
            text = text.partition("</think>")[2].lstrip()
        found = replace(found, text=text, finish_reason=finish)
        if message.refusal:
            return replace(found, text=message.refusal, outcome="refused", reason="the model refused")
        if finish == "content_filter":
            return replace(found, outcome="refused", reason="the endpoint's content filter")
        if finish == "length":
            return replace(found, outcome="truncated", reason="max_tokens were used up" + ("" if text else " before an answer"))
        if not text.strip():
            what = "has null content" if message.content is None else "is thinking alone" if thought else "is empty"
            return replace(found, outcome="unparsed", reason=f"the answer {what}")
        return self._chosen(found, request.choices, form) if request.choices else found

    def _chosen(self, found: Completion, choices: tuple[str, ...], form: Form) -> Completion:
        """The choice itself. What is none shows that the form is not honoured; in words alone, the protocol's parse decides."""
        text = found.text
        if form == Form.OPENAI and isinstance(inner := loads(text.encode()), dict):
            text = str(inner.get("choice", text))
        if text not in choices and form < Form.PLAIN:
            raise FormRefusedError
        return replace(found, text=text)

    def _first_time(self, answer: int, question: int) -> bool:
        """Whether no other question got this answer before."""
        first = self._answered.setdefault(answer, question)
        if len(self._answered) > REMEMBERED:
            del self._answered[next(iter(self._answered))]
        return first == question

    def _explain(self, status: int, body: Any, reply: Reply, request: Request, form: Form) -> Completion:
        """What an error means: for this row (returned), for this attempt (AgainError), for all rows (EndpointStopped)."""
        kind, message = _error_in(body)
        told = self._said(f"{status} {message}")
        if status in (401, 403) or "invalid_api_key" in kind:
            raise EndpointStopped(f"{self._address} refuses the key ({told}); {self._key_state()}, or one that may not use {self._model.name}")
        if status == 404 or (status in (200, 400) and _GONE.search(f"{kind} {message}")):
            raise EndpointStopped(f"{self._address} has no model {self._model.name!r} at that address ({told}); check both")
        if status == 402 or "insufficient_quota" in kind:
            raise EndpointStopped(f"the account at {self._address} is used up ({told}); fill it up and run again: what came back stays")
        if status in (400, 422) and any(name in f"{kind} {message}" for name in _given_up_after(form, request)):
            raise FormRefusedError
        if status in RETRIED or (status == 200 and _PASSING.search(f"{kind} {message}")):
            wait_s = asked_wait(reply.headers, observed(reply.headers)) if status != 200 else None
            if wait_s is not None and wait_s > LONGEST_WAIT_S:
                raise EndpointStopped(f"{self._address} asks to wait {wait_s / 3600:.1f} hours ({told}); run again then, what came back stays")
            raise AgainError(told, wait_s)
        refused = "content_filter" in kind
        return Completion(
            "", "content_filter" if refused else "error", (), 0, outcome="refused" if refused else "error", reason=told, first_byte_s=reply.first_byte_s,
            total_s=reply.total_s, prompt_count=0,
        )  # fmt: skip

    def _said(self, text: str) -> str:
        """On one line, of bearable length, without the key, which some endpoints repeat."""
        line = " ".join((self._key.scrub(text) if self._key else text).split())
        return line if len(line) <= 300 else f"{line[:300]}..."


# ---------------------------------------------------------------- what is sent


def body_of(model: str, request: Request, form: Form) -> dict[str, Any]:
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model, "messages": request.conversation, "temperature": sampling.temperature, "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens, "seed": request.seed,
    }  # fmt: skip
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    body |= {name: getattr(sampling, name) for name, neutral in _NEUTRAL.items() if form == Form.VLLM or getattr(sampling, name) != neutral}
    if request.choices and form == Form.VLLM:
        body["structured_outputs"] = {"choice": list(request.choices)}
    elif request.choices and form == Form.OPENAI:
        # An object: strict endpoints take no other schema.
        properties = {"choice": {"type": "string", "enum": list(request.choices)}}
        schema = {"type": "object", "properties": properties, "required": ["choice"], "additionalProperties": False}
        body |= {"response_format": {"type": "json_schema", "json_schema": {"name": "choice", "strict": True, "schema": schema}}}
        body["max_tokens"] += JSON_TOKENS
    return body


def _given_up_after(form: Form, request: Request) -> tuple[str, ...]:
    """Names by which an endpoint may refuse this form for what the next one leaves out: nothing that changes a result."""
    if form == Form.VLLM:
        return (*(name for name, neutral in _NEUTRAL.items() if getattr(request.sampling, name) == neutral), "structured_outputs")
    return ("response_format", "response format", "json_schema") if form == Form.OPENAI and request.choices else ()


def _estimate(request: Request) -> int:
    """Tokens of the prompt and of the longest answer: rather too many, corrected when the answer tells."""
    prompt = sum(len(message["content"]) / CHARS_PER_TOKEN + TEMPLATE_TOKENS for message in request.conversation)
    return round(prompt) + request.sampling.max_tokens


def _error_in(body: Any) -> tuple[str, str]:
    """Code with type, and message, of an error in any of the forms that endpoints give it."""
    error = body.get("error", body) if isinstance(body, dict) else body
    details = error if isinstance(error, dict) else {"message": error}
    return f"{details.get('code')} {details.get('type')}", str(details.get("message") or details.get("detail") or error or "")


def loads(data: bytes) -> Any:
    """None where it is no JSON."""
    try:
        return json.loads(data)
    except ValueError:
        return None


def _on_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


async def _shut(lifetime: AsyncGenerator[aiohttp.ClientSession]) -> None:
    await lifetime.aclose()
