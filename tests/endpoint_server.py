"""An OpenAI-compatible endpoint over real sockets on 127.0.0.1 that misbehaves on command and writes down all it was asked.

The server is a process of its own (this file, standard library alone), steered through its pipes, so that it shares no
interpreter with the client under test and ends with the process that started it. Answers are a function of the
messages (`answer_text`), so a test knows whether an answer belongs to its question. Times are time.monotonic() of the
machine. An answer counts as delivered once its last byte is with the kernel of a connection that still stands.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import hashlib
import json
import math
import random
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any

TEN_YEARS_S = 10 * 365.25 * 24 * 3600
RESET_STYLES = ("go", "go_long", "ms", "plain", "epoch", "iso")
"""How endpoints write the time until a limit is reset: 1.5s, 0h0m1.5s, 1500ms, 1.5, 1767225600, 2026-01-01T00:00:00Z."""

LIMITED = ("429", "429_seconds", "429_date", *(f"429_{style}" for style in RESET_STYLES))
"""Bare; with Retry-After in seconds, as an HTTP date; with nothing but x-ratelimit-reset headers in one of the styles."""
REFUSED = ("307", "400", "401", "403", "404_model", "408", "409", "413", "498", "500", "502", "503", "504", "529")
"""Statuses. 404_model: the model is not there any more. 307: to settings.redirect_to."""
BROKEN = ("reset", "reset_midbody", "hang", "short_body", "truncated_json", "malformed", "error_in_200", "empty_choices", "null_content", "repeated", "twice")
"""No answer that can be used. short_body: Content-Length promises more than comes; truncated_json: it promises what comes.
repeated: the answer that some other question got, with its id. twice: the answer comes, and comes again unasked on the same
connection, which then serves no other request."""
ODD = ("drip", "length", "refusal", "content_filter", "think_tags", "think_unclosed", "reasoning_content", "wrong_model", "clock_past", "clock_future")
"""Answers that are complete. clock_*: the server's clock, in Date and in epoch reset headers, is ten years off."""
FAULTS = (*LIMITED, *REFUSED, *BROKEN, *ODD)
_COMPLETE = {None, "twice", *ODD}
BATCH_FAULTS = (
    "upload_503",
    "create_503",
    "create_lost",
    "status_503",
    "download_reset",
    "failed",
    "full",
    "bad_line",
    "expired",
    "cancelled",
    "missing",
    "messy",
)
"""Of the Batch API. create_lost: the batch is made and its answer is not sent. *_503, download_reset: the first of these calls fails.
failed, full: the file is refused, for good or because too much is queued. bad_line: its second line is refused. expired: half of its lines
were not reached. cancelled: none was. missing: some lines are in no file. messy: lines twice, torn, of nobody, and no JSON."""
_PHRASES = {status.value: status.phrase for status in HTTPStatus}

_ERRORS = {
    307: "moved", 400: "invalid_request_error", 401: "invalid_api_key", 403: "permission_denied", 404: "model_not_found", 408: "timeout", 409: "conflict",
    413: "request_too_large", 429: "rate_limit_exceeded", 498: "capacity_exceeded", 500: "internal_server_error", 502: "bad_gateway",
    503: "service_unavailable", 504: "gateway_timeout", 529: "overloaded_error",
}  # fmt: skip


@dataclass
class Settings:
    """How the server behaves; each can be changed while it runs. A fault is one of FAULTS; which of them a request meets:
    `since` first, then `script`, `each`, `chances`."""

    models: Sequence[str] = ("small",)
    key: str | None = field(default=None, repr=False)
    """What a request must carry as bearer token; None takes any or none."""
    latency_s: float = 0.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    window_s: float = 60.0
    """How long the minute of the two limits is: a sliding window."""
    limit_style: str | None = "go"
    """How reset times are written (RESET_STYLES) in x-ratelimit headers, sent where there is a limit; None sends none, and no Retry-After."""
    models_status: int = 200
    """Of GET /v1/models: some endpoints have none."""
    refuses: Sequence[str] = ()
    """Parameters of a request that are answered by 400."""
    script: Sequence[str | None] = ()
    """By number of the request, from 0."""
    each: Sequence[str | None] = ()
    """By attempt at one question, from 0."""
    since: Mapping[str, int] = field(default_factory=dict)
    """Fault -> number of the first request that meets it; all later ones do."""
    chances: Mapping[str, float] = field(default_factory=dict)
    """Fault -> its probability, drawn from seed, question and attempt: the order of arrival does not matter."""
    seed: int = 0
    redirect_to: str = ""
    retry_after_s: float = 0.2
    """What an injected 429 asks for."""
    clock_s: float = 0.0
    """How far its wall clock is off: in Date, in Retry-After as a date, in epoch and ISO resets."""
    drip_s: float = 0.1
    """Between two bytes of a body that drips."""
    batches: bool = True
    """Whether there is a Batch API."""
    batch_s: float = 0.0
    """How long a batch takes."""
    batch_script: Sequence[str | None] = ()
    """One of BATCH_FAULTS, by number of the uploaded file, from 0."""
    batch_page: int = 100
    """How many batches a page of their list has at most."""

    def __post_init__(self) -> None:
        if unknown := set(self.batch_script) - {None, *BATCH_FAULTS}:
            raise ValueError(f"unknown faults {unknown}; there are {', '.join(BATCH_FAULTS)}")
        for name in [*self.script, *self.each, *self.since, *self.chances]:
            if name is not None and name not in FAULTS:
                raise ValueError(f"unknown fault {name!r}; there are {', '.join(FAULTS)}")
        if self.limit_style is not None and self.limit_style not in RESET_STYLES:
            raise ValueError(f"unknown limit_style {self.limit_style!r}; there are {', '.join(RESET_STYLES)}")


@dataclass
class Record:
    """One request to /chat/completions and what became of it."""

    number: int
    at: float
    """When it was read whole."""
    question: str
    """Digest of model, messages and seed."""
    body_digest: str
    body: str
    attempt: int
    """How often this question was asked before."""
    key_present: bool
    text: str
    """What a well-behaved answer says."""
    tokens: int
    """Of prompt and answer, as usage has them."""
    fault: str | None = None
    status: int | None = None
    """None: nothing was answered (reset, hang)."""
    retry_after_s: float | None = None
    """How long it was told to wait."""
    over_limit: bool = False
    delivered_at: float | None = None
    """When a complete answer had been handed over; None where it was not."""
    batch: str | None = None
    """In which it came, if in one."""


def question_of(body: Mapping[str, Any]) -> str:
    asked = json.dumps([body.get("model"), body.get("messages"), body.get("seed")], sort_keys=True)
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


def answer_text(messages: Sequence[Mapping[str, str]]) -> str:
    """What a well-behaved answer says to these messages where nothing constrains it."""
    dice = _dice(messages)
    words = sorted({word for word in messages[-1]["content"].split() if word.isalpha()}) or ["nothing"]
    return f"Have you heard of {dice.choice(words)} and {dice.choice(words)}? Ask for number {dice.randrange(10**9)} today."


def _dice(messages: Sequence[Mapping[str, str]]) -> random.Random:
    return random.Random(json.dumps([[message["role"], message["content"]] for message in messages]))


def _constrained(schema: Mapping[str, Any], dice: random.Random) -> Any:
    if "enum" in schema:
        return dice.choice(schema["enum"])
    if "properties" in schema:
        return {name: _constrained(inner, dice) for name, inner in schema["properties"].items()}
    return "free"


def _content(body: Mapping[str, Any]) -> str:
    dice = _dice(body["messages"])
    choices = (body.get("structured_outputs") or {}).get("choice") or body.get("guided_choice")
    if choices:
        return str(dice.choice(choices))
    wanted = body.get("response_format") or {}
    if wanted.get("type") == "json_schema":
        return json.dumps(_constrained(wanted["json_schema"]["schema"], dice))
    return answer_text(body["messages"])


def peak(times: Iterable[float], window_s: float) -> int:
    """The largest number of `times` (seconds, ascending) that lie within `window_s`."""
    window: deque[float] = deque()
    most = 0
    for at in times:
        window.append(at)
        while window[0] <= at - window_s:
            window.popleft()
        most = max(most, len(window))
    return most


class EndpointServer:
    """A running server: `with EndpointServer(models=["small"], each=["503"]) as server: ... server.url ... server.requests`.

    Arguments are those of Settings. All methods may be called from any thread.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings(**settings)
        self._lock = threading.Lock()

    def __enter__(self) -> EndpointServer:
        command = [sys.executable, "-I", str(Path(__file__).resolve())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.port = int(self._call("start", dataclasses.asdict(self.settings)))
        self.url = f"http://127.0.0.1:{self.port}/v1"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()  # the server ends with its input
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def configure(self, **settings: Any) -> None:
        """Change some settings; numbers of requests and attempts go on counting."""
        self.settings = dataclasses.replace(self.settings, **settings)
        self._call("configure", dataclasses.asdict(self.settings))

    def restart(self, **settings: Any) -> None:
        """Forget all requests and behave by these settings, the others at their defaults."""
        self.settings = Settings(**settings)
        self._call("start", dataclasses.asdict(self.settings))

    @property
    def requests(self) -> list[Record]:
        """Every request to /chat/completions so far, in order of arrival."""
        return [Record(**record) for record in self._call("requests", None)]

    def wait_for(self, count: int, timeout_s: float = 60.0) -> None:
        """Return when `count` requests have arrived; other calls wait meanwhile. Raises TimeoutError."""
        if not self._call("wait", {"count": count, "timeout_s": timeout_s}):
            raise TimeoutError(f"fewer than {count} requests came within {timeout_s} s")

    @property
    def batches(self) -> list[list[str]]:
        """The questions of each batch that was made, in their order."""
        found: list[list[str]] = self._call("batches", None)
        return found

    def delivered(self) -> Counter[str]:
        """Question -> how many complete answers to it were handed over."""
        return Counter(record.question for record in self.requests if record.delivered_at is not None)

    def asked_after_delivery(self) -> list[Record]:
        """Requests whose question had been answered completely before they came; what such a one is tried again for is no other."""
        answered: dict[str, float] = {}
        again = []
        for record in self.requests:
            if answered.get(record.question, math.inf) < record.at:
                again.append(record)
                del answered[record.question]
            if record.delivered_at is not None:
                answered.setdefault(record.question, record.delivered_at)
        return again

    def peak_requests(self) -> int:
        """The most requests, refused ones too, that arrived within one window."""
        return peak((record.at for record in self.requests), self.settings.window_s)

    def violations(self) -> int:
        """How many requests came over a limit."""
        return sum(record.over_limit for record in self.requests)

    @property
    def pid(self) -> int:
        return self._process.pid

    def _call(self, command: str, argument: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with self._lock:
            stdin.write(json.dumps([command, argument]).encode() + b"\n")
            stdin.flush()
            line = stdout.readline()
        if not line:
            raise RuntimeError(f"the endpoint server (process {self._process.pid}) has ended")
        return json.loads(line)


# ---------------------------------------------------------------- in the server's process


@dataclass
class _Reply:
    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    promised: int | None = None
    """Content-Length, where it is not the truth."""
    clock_s: float = 0.0
    """How far the wall clock of this answer is off, beside settings.clock_s."""
    payload: dict[str, Any] | None = None
    """The completion, where there is one."""


class _Window:
    """What was spent within the last `window_s`: (time, amount) pairs."""

    def __init__(self) -> None:
        self._spent: deque[tuple[float, int]] = deque()
        self.total = 0

    def forget(self, before: float) -> None:
        while self._spent and self._spent[0][0] <= before:
            self.total -= self._spent.popleft()[1]

    def add(self, now: float, amount: int) -> None:
        self._spent.append((now, amount))
        self.total += amount

    def oldest(self, now: float) -> float:
        return self._spent[0][0] if self._spent else now


class _Server:
    def __init__(self) -> None:
        self.arrivals = asyncio.Event()
        self.forget(Settings())

    def forget(self, settings: Settings) -> None:
        self.settings = settings
        self.batches = _Batches(self)
        self.records: list[Record] = []
        self.attempts: Counter[str] = Counter()
        self.requests, self.tokens = _Window(), _Window()
        self.said: deque[tuple[str, dict[str, Any]]] = deque(maxlen=16)
        """Questions and complete answers that a client has read for certain: it has asked again on the same connection."""

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        pipe = asyncio.StreamReader(limit=2**26)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(pipe), sys.stdin)
        listening = await loop.create_server(functools.partial(_Connection, self), "127.0.0.1", 0, backlog=1024)
        while line := await pipe.readline():
            command, argument = json.loads(line)
            result: Any = None
            if command == "start":
                self.forget(Settings(**argument))
                result = listening.sockets[0].getsockname()[1]
            elif command == "configure":
                self.settings = Settings(**argument)
            elif command == "wait":
                result = await self._wait(**argument)
            elif command == "batches":
                result = self.batches.questions()
            else:
                result = [vars(record) for record in self.records]
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()

    async def _wait(self, count: int, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while len(self.records) < count:
                    self.arrivals.clear()
                    await self.arrivals.wait()
        except TimeoutError:
            return False
        return True

    def record(self, body: bytes, authorization: str) -> tuple[Record, dict[str, Any]]:
        asked = json.loads(body)
        question, text = question_of(asked), _content(asked)
        prompt = sum(len(message["content"]) for message in asked["messages"]) // 4 + 1
        record = Record(
            number=len(self.records), at=time.monotonic(), question=question, body_digest=hashlib.sha256(body).hexdigest()[:16], body=body.decode(),
            attempt=self.attempts[question], key_present=bool(authorization), text=text, tokens=prompt + len(text.split()),
        )  # fmt: skip
        self.attempts[question] += 1
        self.records.append(record)
        self.arrivals.set()
        return record, asked

    def fault(self, record: Record) -> str | None:
        settings = self.settings
        for name, first in settings.since.items():
            if record.number >= first:
                return name
        if record.number < len(settings.script) and settings.script[record.number]:
            return settings.script[record.number]
        if record.attempt < len(settings.each) and settings.each[record.attempt]:
            return settings.each[record.attempt]
        if not settings.chances:
            return None
        drawn = random.Random(f"{settings.seed}|{record.question}|{record.attempt}").random()
        for name, chance in settings.chances.items():
            drawn -= chance
            if drawn < 0:
                return name
        return None

    def reply(self, record: Record, asked: dict[str, Any], authorization: str) -> _Reply:
        """What is answered, which `record.fault` may still keep from arriving."""
        settings = self.settings
        if settings.key is not None and authorization != f"Bearer {settings.key}":
            return self.error(401, authorization)
        if asked["model"] not in settings.models:
            return self.error(404, authorization, f"The model `{asked['model']}` does not exist or you do not have access to it.")
        if unknown := [name for name in settings.refuses if name in asked]:
            return self.error(400, authorization, f"property '{unknown[0]}' is unsupported")
        if (wait := self._over_limit(record)) is not None:
            record.over_limit, reply = True, self.error(429, authorization)
            if settings.limit_style is not None:
                record.retry_after_s = math.ceil(wait)
                reply.headers |= {"retry-after": f"{record.retry_after_s}", **self._limits(record.at, settings.clock_s)}
            return reply
        record.fault = self.fault(record)
        reply = self._answer(record, asked, authorization)
        reply.headers = {**self._limits(record.at, settings.clock_s + reply.clock_s), **reply.headers}
        return reply

    def error(self, status: int, authorization: str, message: str = "try something else") -> _Reply:
        # Endpoints do repeat what they were sent, keys too.
        told = f"{message} (you sent Authorization: {authorization})" if authorization else message
        error = {"message": told, "type": _ERRORS[status], "param": None, "code": _ERRORS[status]}
        return _Reply(status, json.dumps({"error": error}).encode())

    def _over_limit(self, record: Record) -> float | None:
        """Seconds until this request would have been within the limits; None if it is, and then it is spent."""
        settings, now = self.settings, record.at
        limits = ((self.requests, settings.requests_per_minute, 1), (self.tokens, settings.tokens_per_minute, record.tokens))
        for window, limit, amount in limits:
            window.forget(now - settings.window_s)
            if limit is not None and window.total + amount > limit:
                return window.oldest(now) + settings.window_s - now
        for window, _, amount in limits:
            window.add(now, amount)
        return None

    def _limits(self, now: float, clock_s: float) -> dict[str, str]:
        settings, headers = self.settings, {}
        for name, window, limit in (("requests", self.requests, settings.requests_per_minute), ("tokens", self.tokens, settings.tokens_per_minute)):
            if limit is not None and settings.limit_style is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(limit)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, limit - window.total))
                headers[f"x-ratelimit-reset-{name}"] = _reset(max(0.0, window.oldest(now) + settings.window_s - now), settings.limit_style, clock_s)
        return headers

    def _answer(self, record: Record, asked: dict[str, Any], authorization: str) -> _Reply:
        fault = record.fault
        if fault in LIMITED:
            return self._limited(record, fault, authorization)
        if fault in REFUSED:
            reply = self.error(int(fault[:3]), authorization)
            if fault == "307":
                reply.headers["location"] = self.settings.redirect_to
            return reply
        if fault == "error_in_200":
            return dataclasses.replace(self.error(500, authorization), status=200)
        payload = self._completion(record, asked)
        if fault == "repeated":
            others = [said for said in self.said if said[0] != record.question]
            if not others:  # nothing that could be repeated yet: an answer like any other
                record.fault = fault = None
            else:
                payload = others[-1][1]
        whole = json.dumps(payload).encode()
        reply = _Reply(200, whole, payload=payload)
        if fault == "short_body":
            reply.body, reply.promised = whole[: len(whole) // 2], len(whole)
        elif fault == "truncated_json":
            reply.body = whole[: len(whole) // 2]
        elif fault == "malformed":
            reply.body = whole.replace(b'"choices":', b"choices=").replace(b'"', b"'")
        elif fault in ("clock_past", "clock_future"):
            reply.clock_s = -TEN_YEARS_S if fault == "clock_past" else TEN_YEARS_S
            reply.headers["x-ratelimit-reset-requests"] = _reset(1.0, "epoch", self.settings.clock_s + reply.clock_s)
        return reply

    def _limited(self, record: Record, fault: str, authorization: str) -> _Reply:
        wait = record.retry_after_s = self.settings.retry_after_s
        reply = self.error(429, authorization)
        if fault == "429":
            record.retry_after_s = None
        elif fault == "429_seconds":
            reply.headers["retry-after"] = f"{wait:g}"
        elif fault == "429_date":
            reply.headers["retry-after"] = formatdate(math.ceil(time.time() + wait + self.settings.clock_s), usegmt=True)
        else:
            style = fault.removeprefix("429_")
            reply.headers |= {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": _reset(wait, style, self.settings.clock_s)}
        return reply

    def _completion(self, record: Record, asked: dict[str, Any]) -> dict[str, Any]:
        fault, model, text = record.fault, asked["model"], record.text
        words, finish = text.split(), "stop"
        most = asked.get("max_completion_tokens") or asked.get("max_tokens")
        if most is not None and len(words) > most:
            text, finish = " ".join(words[:most]), "length"
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if fault == "length":
            message["content"], finish = " ".join(words[: len(words) // 2]), "length"
        elif fault == "refusal":
            message |= {"content": None, "refusal": "I cannot help with that."}
        elif fault == "content_filter":
            message["content"], finish = "", "content_filter"
        elif fault == "think_tags":
            message["content"] = f"<think>The user wants a post. Perhaps B? No.</think>\n\n{text}"
        elif fault == "think_unclosed":
            message["content"], finish = "<think>The user wants a post. Perhaps", "length"
        elif fault == "reasoning_content":
            message["reasoning_content"] = "The user wants a post. Perhaps B? No."
        elif fault == "null_content":
            message["content"] = None
        elif fault == "wrong_model":
            model = "another-model"
        count = len((message["content"] or "").split())
        return {
            "id": f"chatcmpl-{secrets.token_hex(8)}", "object": "chat.completion", "created": int(time.time()), "model": model,
            "choices": [] if fault == "empty_choices" else [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
            "usage": {"prompt_tokens": record.tokens - len(words), "completion_tokens": count, "total_tokens": record.tokens - len(words) + count},
        }  # fmt: skip

    def models(self, authorization: str) -> _Reply:
        settings = self.settings
        if settings.key is not None and authorization != f"Bearer {settings.key}":
            return self.error(401, authorization)
        if settings.models_status != 200:
            return _Reply(settings.models_status, b'{"error": {"message": "not here"}}')
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "tests"} for name in settings.models]
        return _Reply(200, json.dumps({"object": "list", "data": listed}).encode())


class _Batches:
    """Files of questions, and what became of them. A batch is worked off when it is first looked at after `batch_s`."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._files: dict[str, tuple[bytes, list[Record]]] = {}
        """Content, and the requests whose answers it has."""
        self._made: dict[str, dict[str, Any]] = {}
        self._ready_at: dict[str, float] = {}
        self._faults: dict[str, str | None] = {}
        """By file, once: a fault of a call passes when it was met."""

    def questions(self) -> list[list[str]]:
        return [[question_of(line["body"]) for line in self._lines(batch)] for batch in self._made.values()]

    def answer(self, method: str, path: str, authorization: str, body: bytes) -> _Reply | None:
        """None: the connection is reset, where the answer was to be."""
        settings = self._server.settings
        if settings.key is not None and authorization != f"Bearer {settings.key}":
            return self._server.error(401, authorization)
        path, _, query = path.removeprefix("/v1/").partition("?")
        if not settings.batches:
            return self._server.error(404, authorization, "Unknown request URL")
        kind, name = path.partition("/")[::2]
        if (method, path) == ("POST", "files"):
            return self._upload(body)
        if (method, path) == ("POST", "batches"):
            return self._make(json.loads(body))
        if (method, path) == ("GET", "batches"):
            return self._list(dict(part.split("=") for part in query.split("&")))
        if method == "GET" and kind == "batches" and name in self._made:
            return self._look(name)
        if method == "GET" and kind == "files" and (file := name.removesuffix("/content")) in self._files:
            return self._download(file)
        return self._server.error(404, authorization, f"no {path}")

    def _once(self, file: str, fault: str) -> bool:
        if self._faults.get(file) != fault:
            return False
        self._faults[file] = None
        return True

    def _upload(self, body: bytes) -> _Reply:
        boundary = body.partition(b"\r\n")[0]
        fields = {}
        for part in body.split(boundary)[1:-1]:
            head, _, content = part.partition(b"\r\n\r\n")
            fields[head.partition(b'name="')[2].partition(b'"')[0]] = content.removesuffix(b"\r\n")
        assert fields[b"purpose"] == b"batch"
        number, script = len(self._faults), self._server.settings.batch_script
        file = f"file-{number}"
        self._faults[file] = script[number] if number < len(script) else None
        if self._once(file, "upload_503"):
            return self._server.error(503, "")
        self._files[file] = (fields[b"file"], [])
        return _json({"id": file, "object": "file", "purpose": "batch", "bytes": len(fields[b"file"])})

    def _make(self, asked: dict[str, Any]) -> _Reply | None:
        file = asked["input_file_id"]
        assert (asked["endpoint"], asked["completion_window"]) == ("/v1/chat/completions", "24h")
        if self._once(file, "create_503"):
            return self._server.error(503, "")
        name = f"batch_{len(self._made)}"
        self._made[name] = {"id": name, "object": "batch", "input_file_id": file, "status": "validating", "created_at": int(time.time()), **asked}
        self._ready_at[name] = time.monotonic() + self._server.settings.batch_s
        return None if self._once(file, "create_lost") else _json(self._made[name])

    def _list(self, query: dict[str, str]) -> _Reply:
        names = list(reversed(self._made))
        start = names.index(query["after"]) + 1 if "after" in query else 0
        most = min(int(query["limit"]), self._server.settings.batch_page)
        page = [self._made[name] for name in names[start : start + most]]
        return _json({"object": "list", "data": page, "has_more": start + most < len(names)})

    def _look(self, name: str) -> _Reply:
        batch = self._made[name]
        if self._once(batch["input_file_id"], "status_503"):
            return self._server.error(503, "")
        if batch["status"] == "validating" and time.monotonic() >= self._ready_at[name]:
            self._work(name)
        return _json(batch)

    def _lines(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._files[batch["input_file_id"]][0].splitlines()]

    def _work(self, name: str) -> None:
        batch = self._made[name]
        fault, lines = self._faults[batch["input_file_id"]], self._lines(batch)
        refusals = {
            "failed": {"code": "invalid_file", "message": "the file cannot be read", "line": None},
            "full": {"code": "token_limit_exceeded", "message": "Enqueued token limit reached", "line": None},
            "bad_line": {"code": "invalid_line", "message": "not like this", "line": 2},
        }
        if fault in refusals:
            batch |= {"status": "failed", "errors": {"object": "list", "data": [refusals[fault]]}}
            return
        reached = {"expired": len(lines) // 2, "cancelled": 0}.get(str(fault), len(lines))
        out, bad = list[str](), list[str]()
        records = []
        for place, line in enumerate(lines):
            assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
            if place >= reached:
                error = {"code": "batch_expired", "message": "This request could not be executed before the completion window expired."}
                bad.append(json.dumps({"id": f"r{place}", "custom_id": line["custom_id"], "response": None, "error": error}))
                continue
            if fault == "missing" and place % 3 == 1:
                continue
            record, asked = self._server.record(json.dumps(line["body"]).encode(), "")
            record.batch = name
            reply = self._server.reply(record, asked, f"Bearer {self._server.settings.key}")
            record.status = reply.status
            good = reply.status == 200 and record.fault in _COMPLETE
            try:
                said = json.loads(reply.body)
            except ValueError:
                said = None
            if record.fault in ("reset", "reset_midbody", "hang", "short_body"):
                reply.status, said = 500, {"error": {"message": "the worker died"}}
            response = {"status_code": reply.status, "request_id": f"q{record.number}", "body": said}
            (out if reply.status == 200 else bad).append(json.dumps({"id": f"r{place}", "custom_id": line["custom_id"], "response": response, "error": None}))
            if good:
                records.append(record)
        if fault == "messy":
            random.Random(0).shuffle(out)
            out = [*out, out[0], json.dumps({"custom_id": "9999", "response": {}}), "[]", '"', json.dumps({"custom_id": "-1"}), '{"custom_id": "0", "resp']
        batch["status"] = fault if fault in ("expired", "cancelled") else "completed"
        for kind, content in (("output", out), ("error", bad)):
            if content:
                batch[f"{kind}_file_id"] = f"file-{kind}-{name}"
                self._files[f"file-{kind}-{name}"] = ("\n".join(content).encode(), records if kind == "output" else [])

    def _download(self, file: str) -> _Reply | None:
        content, records = self._files[file]
        source = self._made.get(file.rpartition("-")[2], {}).get("input_file_id", "")
        if self._once(source, "download_reset"):
            return _Reply(200, content[: len(content) // 2], promised=len(content))
        for record in records:
            record.delivered_at = record.delivered_at or time.monotonic()
        return _Reply(200, content)


def _json(value: Any) -> _Reply:
    return _Reply(200, json.dumps(value).encode())


def _reset(seconds: float, style: str, clock_s: float) -> str:
    """`seconds` from now in one of RESET_STYLES, by a wall clock that is `clock_s` off; never less than `seconds`."""
    seconds = math.ceil(seconds * 1000) / 1000
    if style == "go":
        minutes, rest = divmod(seconds, 60)
        return f"{int(minutes)}m{rest:.3f}s" if minutes else f"{seconds:.3f}s"
    if style == "go_long":
        return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60)}m{seconds % 60:.3f}s"
    if style == "ms":
        return f"{round(seconds * 1000)}ms"
    if style == "plain":
        return f"{seconds:.3f}"
    at = math.ceil(time.time() + seconds + clock_s)
    return str(at) if style == "epoch" else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class _Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, one request at a time; bodies have a Content-Length."""

    def __init__(self, server: _Server) -> None:
        self._server, self._buffer, self._busy, self._spoilt = server, bytearray(), False, False
        self._said: tuple[str, dict[str, Any]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._next()

    def _next(self) -> None:
        end = self._buffer.find(b"\r\n\r\n")
        if self._busy or end < 0:
            return
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", "0"))
        if len(self._buffer) < end + 4 + length:
            return
        body = bytes(self._buffer[end + 4 : end + 4 + length])
        del self._buffer[: end + 4 + length]
        method, path, _ = first.split(" ")
        self._busy = True
        self._serve(method, path, headers.get("authorization", ""), body)

    def _serve(self, method: str, path: str, authorization: str, body: bytes) -> None:
        server, later = self._server, asyncio.get_running_loop().call_later
        if (method, path) != ("POST", "/v1/chat/completions"):
            self._serve_other(method, path, authorization, body)
            return
        if self._said is not None:
            server.said.append(self._said)
            self._said = None
        record, asked = server.record(body, authorization)
        if self._spoilt:
            self._reset_connection()
            return
        reply = server.reply(record, asked, authorization)
        if record.fault == "hang":
            return
        if record.fault == "reset":
            later(server.settings.latency_s, self._reset_connection)
        elif server.settings.latency_s:
            later(server.settings.latency_s, self._send, reply, record)
        else:
            self._send(reply, record)

    def _serve_other(self, method: str, path: str, authorization: str, body: bytes) -> None:
        if path == "/v1/models":
            reply: _Reply | None = self._server.models(authorization)
        else:
            reply = self._server.batches.answer(method, path, authorization, body)
        if reply is None:
            self._reset_connection()
            return
        self._send(reply, None)
        if reply.promised is not None:
            self._transport.close()

    def _send(self, reply: _Reply, record: Record | None) -> None:
        if self._transport.is_closing():
            return
        fault = record.fault if record else None
        if record:
            record.status = reply.status
        date = formatdate(time.time() + self._server.settings.clock_s + reply.clock_s, usegmt=True)
        lines = [f"HTTP/1.1 {reply.status} {_PHRASES.get(reply.status, 'Unusual')}", f"date: {date}", "content-type: application/json"]
        promised = len(reply.body) if reply.promised is None else reply.promised
        lines += [f"content-length: {promised}", *(f"{name}: {value}" for name, value in reply.headers.items())]
        message = "\r\n".join(lines).encode() + b"\r\n\r\n" + reply.body
        if fault == "reset_midbody":
            self._transport.write(message[: -len(reply.body) // 2])
            asyncio.get_running_loop().call_later(0.01, self._reset_connection)
        elif fault == "short_body":
            self._transport.write(message)
            self._transport.close()
        elif fault == "drip":
            self._transport.write(message[: -len(reply.body)])
            self._drip(reply, record, 0)
        else:
            self._spoilt = fault == "twice"
            self._transport.write(message * 2 if self._spoilt else message)
            self._finish(reply, record)

    def _drip(self, reply: _Reply, record: Record | None, sent: int) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(reply.body[sent : sent + 1])
        if sent + 1 < len(reply.body):
            asyncio.get_running_loop().call_later(self._server.settings.drip_s, self._drip, reply, record, sent + 1)
        else:
            self._finish(reply, record)

    def _finish(self, reply: _Reply, record: Record | None) -> None:
        if record and reply.status == 200 and record.fault in _COMPLETE and not self._transport.is_closing():
            record.delivered_at = time.monotonic()
            assert reply.payload is not None
            self._said = (record.question, reply.payload)
        self._busy = False
        self._next()

    def _reset_connection(self) -> None:
        if not self._transport.is_closing():
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # on, 0 s: close sends RST
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._transport.abort()


if __name__ == "__main__":
    gc.disable()  # records only grow, and walking through them costs more than what a test leaves behind
    asyncio.run(_Server().run())
