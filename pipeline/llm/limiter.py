"""How fast one endpoint may be asked for one model: one limiter for the whole run, whoever asks.

Limits come from the endpoint's rate-limit headers; nothing is assumed before the first answer. Requests and tokens of
a minute are paced evenly, so that a burst at the start costs no idle time later. Within any window of a limit's length
no more than the limit is handed out, tokens by an estimate that the answer corrects. A 429 cuts the rate and later
answers let it grow again (additive increase, multiplicative decrease: Chiu & Jain, 1989). Time is a monotonic clock's.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, Protocol

from pipeline.errors import EndpointStopped
from pipeline.network import address_of
from pipeline.runtime import Runtime
from pipeline.study import ModelName

SHARE = 0.985
"""Of a limit that is asked for: the rest is room for requests that arrive bunched (0.9 s of them at any limit)."""
BURST = 1 / 240
"""Of a window that a late timer may catch up on: a quarter of a second of a minute, 0.4 % of it, within what SHARE leaves."""
QUANTUM_S = 0.02
"""Shortest wait for a permit: at high rates several become due meanwhile and travel together."""
CUT, GROWTH = 0.6, 0.04
"""Rate kept after a 429; what it regains in each second that brings answers, as a share of the best rate seen."""
CUT_EVERY_S = 1.0
"""Refusals of requests that were under way together are one message."""
RECENT_S, FEW = 5.0, 5
"""Over which the present rate is measured; fewer requests than that have no rate, and a refusal is not about it."""
STRAY = 0.01
"""Share of recent requests up to which refusals are not about the rate: at it, an endpoint refuses whatever is too much."""
LEARNING = 0.05
"""Weight of one answer in what the next is taken to cost."""
LONGEST_WAIT_S = 3600.0
"""A limit that stays closed longer (that of a day) stops the run instead of holding it."""
LEASE = 64
"""Permits that travel together at most: few enough that no actor hoards them."""

LENGTHS_S = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0}


class Observation(NamedTuple):
    """What an answer's headers say of one limit. None: not said. reset_s: from now until there is room again."""

    resource: str
    """requests or tokens."""
    window: str
    """A key of LENGTHS_S."""
    limit: float | None
    remaining: float | None
    reset_s: float | None


class Permit(NamedTuple):
    """Leave to send one request."""

    granted: float
    tokens: int
    likely: float
    """Tokens that it will cost by what others did: the windows count the estimate, the even pace counts this."""
    places: tuple[tuple[str, str, int], ...]
    """Where it is booked: resource, window, number of the entry."""


class Report(NamedTuple):
    """What became of a permit."""

    permit: Permit
    tokens: int | None
    """That the request has cost; None where nobody knows, and the estimate stands."""
    sent: bool = True
    """False gives the permit back."""
    observed: tuple[Observation, ...] = ()
    refused: bool = False
    """By a 429."""
    pause_s: float = 0.0
    """How long the endpoint wants to hear nothing."""


# ---------------------------------------------------------------- headers

_HEADER = re.compile(r"(?:x-)?ratelimit-(limit|remaining|reset)-(requests|req|tokens)(?:-(second|minute|hour|day))?")
_DURATION = re.compile(r"(?=.)(?:([\d.]+)d)?(?:([\d.]+)h)?(?:([\d.]+)m(?!s))?(?:([\d.]+)s)?(?:([\d.]+)ms)?")
_UNITS_S = (86400.0, 3600.0, 60.0, 1.0, 0.001)


def observed(headers: Mapping[str, str], requests_window: str = "minute") -> tuple[Observation, ...]:
    """The limits in an answer's headers, whose names are in small letters.

    A limit whose header does not name its window is one of a minute, except for requests, whose window is
    `requests_window`: OpenAI's are of a minute, Groq's of a day (each by its documentation of rate limits).
    """
    found: dict[tuple[str, str], dict[str, float | None]] = {}
    for name, value in headers.items():
        if match := _HEADER.fullmatch(name):
            what, resource, window = match[1], "tokens" if match[2] == "tokens" else "requests", match[3]
            window = window or (requests_window if resource == "requests" else "minute")
            found.setdefault((resource, window), {})[what] = seconds_until(value, server_time(headers)) if what == "reset" else _number(value)
    return tuple(Observation(*key, values.get("limit") or None, values.get("remaining"), values.get("reset")) for key, values in found.items())


def asked_wait(headers: Mapping[str, str], limits: Sequence[Observation]) -> float | None:
    """Seconds that a refusal asks to wait: Retry-After (RFC 9110, 10.2.3), else the reset of whatever is used up; None: not said."""
    if (milliseconds := _number(headers.get("retry-after-ms", ""))) is not None:
        return milliseconds / 1000
    if (wait := seconds_until(headers.get("retry-after", ""), server_time(headers))) is not None:
        return wait
    return max((item.reset_s for item in limits if item.reset_s is not None and not item.remaining), default=None)


def server_time(headers: Mapping[str, str]) -> float:
    """Seconds since 1970 by the endpoint's clock, which its dates are written by; ours where it does not tell its own."""
    try:
        return parsedate_to_datetime(headers.get("date", "")).timestamp()
    except ValueError:
        return time.time()


def seconds_until(text: str, now: float) -> float | None:
    """Seconds from `now` (since 1970) that a header means: 2m59.56s, 120ms, 1h2m, 7.66, 1767225600 (s or ms since 1970), an HTTP or ISO date.

    0 for what has passed; None for what is none of these.
    """
    text = text.strip()
    seconds: float | None = None
    if (number := _number(text)) is not None:
        seconds = number if number < 1e9 else number / (1000 if number >= 1e12 else 1) - now
    elif match := _DURATION.fullmatch(text):
        parts = [_number(part or "0") for part in match.groups()]
        seconds = None if None in parts else sum(part * unit for part, unit in zip(parts, _UNITS_S, strict=True) if part)
    else:
        for read in (parsedate_to_datetime, datetime.fromisoformat):
            try:
                date = read(text)
            except ValueError:
                continue
            seconds = date.replace(tzinfo=date.tzinfo or UTC).timestamp() - now
            break
    return None if seconds is None else max(0.0, seconds)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


# ---------------------------------------------------------------- the arithmetic, without a clock or a wait of its own


class Window:
    """What was spent of one limit within its window. Bookings closer than a thousandth of the window share an entry.

    What others spend with the same key, or a run before this one, is known from what the endpoint says is left. It is
    taken to come back evenly over a window, as it does where the endpoint fills a bucket or others ask steadily.
    """

    def __init__(self, length_s: float) -> None:
        self.length_s = length_s
        self.limit = math.inf
        self._entries: deque[list[float]] = deque()
        """[time of the last booking, amount]."""
        self._first = 0
        """Number of the oldest entry."""
        self._opened = -math.inf
        self._own = 0.0
        self._others, self._others_at = 0.0, -math.inf

    def spent(self, now: float) -> float:
        while self._entries and self._entries[0][0] <= now - self.length_s:
            self._own -= self._entries.popleft()[1]
            self._first += 1
        return self._own + max(0.0, self._others * (1 - (now - self._others_at) / self.length_s)) if self._others else self._own

    def ready(self, now: float, amount: float) -> float:
        """`now` if the amount fits, else the next moment at which it may. What is more than the limit alone fits an empty window."""
        spent = self.spent(now)
        if not spent or spent + amount <= self.limit:
            return now
        moments = [self._entries[0][0] + self.length_s] if self._entries else []
        if spent > self._own:
            room = max(0.0, self.limit - self._own - amount)
            moments.append(self._others_at + self.length_s * max(0.0, 1 - room / self._others))
        return max(now + 1e-3, min(moments, default=now))

    def book(self, now: float, amount: float) -> int:
        """The number of the entry, for `correct`."""
        if not self._entries or now - self._opened > self.length_s / 1000:
            self._entries.append([now, 0.0])
            self._opened = now
        self._entries[-1][0] = now
        self._entries[-1][1] += amount
        self._own += amount
        return self._first + len(self._entries) - 1

    def correct(self, number: int, change: float) -> None:
        """Does nothing to an entry that is older than the window, or of a desk before this one."""
        if self._first <= number < self._first + len(self._entries):
            self._entries[number - self._first][1] += change
            self._own += change

    def observe(self, now: float, seen: Observation) -> None:
        self.limit = seen.limit or self.limit
        if seen.remaining is not None and self.limit < math.inf:
            self.spent(now)
            self._others, self._others_at = max(0.0, self.limit - seen.remaining - self._own), now


class Bucket:
    """Permits that drop in at a steady rate: what evens out the requests of a window."""

    def __init__(self, burst_s: float) -> None:
        self.rate = math.inf
        self._level, self._at, self._burst_s = 1.0, -math.inf, burst_s

    def _fill(self, now: float) -> float:
        """Brings the level up to date; how much may lie there."""
        room = max(1.0, self.rate * self._burst_s)
        if now > self._at:
            self._level = min(room, self._level + (self.rate * (now - self._at) if self._at > -math.inf else 0.0))
            self._at = now
        return room

    def ready(self, now: float, amount: float) -> float:
        if self.rate == math.inf:
            return now
        room = self._fill(now)
        missing = min(amount, room) - self._level
        return now + missing / self.rate if missing > 1e-9 else now

    def take(self, now: float, amount: float) -> None:
        """A negative amount puts back. The level may fall below zero: an amount larger than the bucket waits afterwards."""
        if self.rate < math.inf:
            self._fill(now)
            self._level -= amount


class Pace:
    """When the next request may go: the windows of every known limit, evenly paced, and the rate that 429s leave."""

    def __init__(self, minute_s: float = 60.0) -> None:
        self._minute_s = minute_s
        self._windows: dict[tuple[str, str], tuple[Window, Bucket | None]] = {}
        self._speed = Bucket(BURST * minute_s)
        self._speed.rate = 1.0  # until the first answer has told of limits
        self._answered = False
        self._ratio, self._costs_known = 1.0, 0
        """Of what requests cost to what they were estimated at."""
        self._recent, self._refusals = Window(RECENT_S), Window(RECENT_S)
        self._history = {"requests": Window(minute_s), "tokens": Window(minute_s)}
        """What was handed out before a limit was known counts against it too."""
        self._first_grant: float | None = None
        self._best, self._cut_at, self._grown_at = 0.0, -math.inf, -math.inf
        self._paused_until = -math.inf

    def ready(self, now: float, tokens: int) -> float:
        """`now` if a request of about so many tokens may go, else the next moment at which to ask again."""
        times = [now, self._paused_until, self._speed.ready(now, 1)]
        for (resource, _), (window, bucket) in self._windows.items():
            times.append(window.ready(now, 1 if resource == "requests" else tokens))
            if bucket:
                times.append(bucket.ready(now, 1 if resource == "requests" else tokens * self._ratio))
        return max(times)

    def take(self, now: float, tokens: int) -> Permit:
        if self._first_grant is None:
            self._first_grant = now
        self._speed.take(now, 1)
        for past, amount in ((self._recent, 1), (self._history["requests"], 1), (self._history["tokens"], tokens)):
            past.spent(now)
            past.book(now, amount)
        places = []
        for (resource, name), (window, bucket) in self._windows.items():
            places.append((resource, name, window.book(now, 1 if resource == "requests" else tokens)))
            if bucket:
                bucket.take(now, 1 if resource == "requests" else tokens * self._ratio)
        return Permit(now, tokens, tokens * self._ratio, tuple(places))

    def report(self, now: float, report: Report) -> None:
        permit = report.permit
        cost = report.tokens if report.sent else 0
        if cost and permit.tokens:
            self._costs_known += 1
            self._ratio += max(LEARNING, 1 / self._costs_known) * (cost / permit.tokens - self._ratio)
        for resource, name, number in permit.places:
            window, bucket = self._windows.get((resource, name), (None, None))
            if window is None:  # booked at a desk that died
                continue
            booked, likely = (permit.tokens, permit.likely) if resource == "tokens" else (1, 1)
            used = cost if resource == "tokens" else int(report.sent)
            if used is not None:
                window.correct(number, used - booked)
            if used is not None and bucket:
                bucket.take(now, used - likely)
        if not report.sent:
            self._speed.take(now, -1)
            return
        if not self._answered and not report.refused:
            self._answered, self._speed.rate = True, math.inf
        for seen in report.observed:
            self._observe(now, seen)
        if report.refused:
            self._cut(now, permit)
            self._grown_at = now
            self._paused_until = max(self._paused_until, now + report.pause_s)
        elif self._cut_at > -math.inf:
            self._best = max(self._best, self._recent_rate(now))
            self._speed.rate += max(1.0, GROWTH * self._best) * min(1.0, now - self._grown_at)
            self._grown_at = now

    def _observe(self, now: float, seen: Observation) -> None:
        key = (seen.resource, seen.window)
        if key not in self._windows:
            length_s = LENGTHS_S[seen.window] * self._minute_s / 60
            # What a day allows may be used at once; only short windows are worth evening out.
            self._windows[key] = (Window(length_s), Bucket(BURST * length_s) if length_s <= self._minute_s else None)
            self._windows[key][0].book(now, self._history[seen.resource].spent(now))
        window, bucket = self._windows[key]
        window.observe(now, seen)
        if bucket and window.limit < math.inf:
            bucket.rate = SHARE * window.limit / window.length_s

    def _cut(self, now: float, permit: Permit) -> None:
        spent, refused = self._recent.spent(now), self._refusals.spent(now) + 1
        self._refusals.book(now, 1)
        if spent < FEW or refused <= STRAY * spent or permit.granted <= self._cut_at or now - self._cut_at < CUT_EVERY_S:
            return
        recent = self._recent_rate(now)
        self._best = max(self._best, recent)
        self._speed.rate = max(1.0, CUT * min(self._speed.rate, recent))
        self._cut_at = self._grown_at = now

    def _recent_rate(self, now: float) -> float:
        return 0.0 if self._first_grant is None else self._recent.spent(now) / min(RECENT_S, max(1.0, now - self._first_grant))


# ---------------------------------------------------------------- who waits


class Desk:
    """Hands out permits, first come, first served; lives in the process of its one caller, or in an actor of its own."""

    def __init__(self, minute_s: float = 60.0) -> None:
        self._pace = Pace(minute_s)
        self._turn = asyncio.Lock()
        self._news = asyncio.Event()

    async def lease(self, wants: Sequence[int], reports: Sequence[Report]) -> list[Permit] | str:
        """Permits for the first of `wants` (tokens of each request), as many as are due, one at least.

        A sentence instead, where a limit stays closed for too long to wait.
        """
        self.tell(reports)
        async with self._turn:
            permits: list[Permit] = []
            while not permits:
                now = time.monotonic()
                while len(permits) < len(wants) and self._pace.ready(now, wants[len(permits)]) <= now:
                    permits.append(self._pace.take(now, wants[len(permits)]))
                wait = self._pace.ready(now, wants[0]) - now
                if not permits and wait > LONGEST_WAIT_S:
                    return f"a limit of the endpoint is used up for another {wait / 3600:.1f} hours"
                if not permits:
                    await self._wait(max(wait, QUANTUM_S))
            return permits

    async def _wait(self, seconds: float) -> None:
        self._news.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            pass

    def tell(self, reports: Sequence[Report]) -> None:
        now = time.monotonic()
        for report in reports:
            self._pace.report(now, report)
        if reports:
            self._news.set()


class Limiter(Protocol):
    """A limiter as those who ask see it."""

    async def acquire(self, tokens: int) -> Permit:
        """Wait for leave to send a request of about so many tokens. Raises EndpointStopped where that would take hours."""

    def report(self, report: Report) -> None:
        """What became of a permit; every one is reported once."""


class _Queue:
    """Those who wait in this process: permits come in leases, reports go back with the next one or soon after."""

    FLUSH_S = 0.01
    """Longest that a report waits for a lease to travel with."""

    def __init__(self, lease: Callable[[Sequence[int], Sequence[Report]], Awaitable[list[Permit] | str]], tell: Callable[[Sequence[Report]], Any]) -> None:
        self._lease, self._tell = lease, tell
        self._waiting: deque[tuple[int, asyncio.Future[Permit]]] = deque()
        self._reports: list[Report] = []
        self._leasing: asyncio.Task[None] | None = None
        self._flushing: asyncio.TimerHandle | None = None

    async def acquire(self, tokens: int) -> Permit:
        future: asyncio.Future[Permit] = asyncio.get_running_loop().create_future()
        self._waiting.append((tokens, future))
        if self._leasing is None:
            self._leasing = asyncio.ensure_future(self._run())
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and not future.exception():
                self.report(Report(future.result(), None, sent=False))
            raise

    def report(self, report: Report) -> None:
        self._reports.append(report)
        if report.refused:
            self._flush()
        elif self._flushing is None:
            self._flushing = asyncio.get_running_loop().call_later(self.FLUSH_S, self._flush)

    def _flush(self) -> None:
        if self._flushing:
            self._flushing.cancel()
            self._flushing = None
        reports, self._reports = self._reports, []
        if reports:
            self._tell(reports)

    async def _run(self) -> None:
        try:
            while self._waiting:
                reports, self._reports = self._reports, []
                leased = await self._lease([tokens for tokens, _ in itertools.islice(self._waiting, LEASE)], reports)
                if isinstance(leased, str):
                    raise EndpointStopped(f"{leased}; run again then, what came back stays")
                for permit in leased:
                    self._hand_out(permit)
                while self._waiting and self._waiting[0][1].done():
                    self._waiting.popleft()
        except Exception as error:  # noqa: BLE001  # those who wait are told, whatever it is
            while self._waiting:
                _, future = self._waiting.popleft()
                if not future.done():
                    future.set_exception(error)
        finally:
            self._leasing = None

    def _hand_out(self, permit: Permit) -> None:
        while self._waiting:
            _, future = self._waiting.popleft()
            if not future.done():
                future.set_result(permit)
                return
        self.report(Report(permit, None, sent=False))


class LocalLimiter(_Queue):
    """For one process. `minute_s`: how long the endpoint's minute is (tests shorten it; hours and days shrink with it)."""

    def __init__(self, minute_s: float = 60.0) -> None:
        desk = Desk(minute_s)
        super().__init__(desk.lease, desk.tell)


class SharedLimiter(_Queue):
    """For all actors of a run: the desk is a Ray actor, and this object may be sent to whoever asks."""

    def __init__(self, desk: Any) -> None:
        super().__init__(desk.lease.remote, desk.tell.remote)
        self._desk = desk

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedLimiter, (self._desk,)


def limiter_for(name: str, runtime: Runtime) -> SharedLimiter | None:
    """The run's limiter for this model, made on first use by the driver; None for a model that is not behind an endpoint."""
    model = ModelName.parse(name)
    if not model.behind_endpoint:
        return None
    import ray

    return SharedLimiter(_desk(ray.get_runtime_context().get_job_id(), address_of(model, runtime), model.name))


@functools.cache
def _desk(job: str, address: str, model: str) -> Any:
    import ray

    # A desk that died with its machine begins again: the endpoint's headers tell it what was spent.
    return ray.remote(num_cpus=0, max_concurrency=1000, max_restarts=-1, max_task_retries=-1)(Desk).remote()
