"""A limiter hands out what the endpoint allows and no more, evenly, and learns what that is from answers alone."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import deque
from email.utils import formatdate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import EndpointStopped
from pipeline.llm.limiter import LONGEST_WAIT_S, LocalLimiter, Observation, Pace, Report, asked_wait, limiter_for, observed, seconds_until
from pipeline.runtime import Runtime

pytestmark = pytest.mark.fast

NOW = 1_795_000_000.0
"""Seconds since 1970, in November 2026."""

# ---------------------------------------------------------------- headers


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2m59.56s", 179.56),
        ("7.66s", 7.66),
        ("120ms", 0.12),
        ("1h2m", 3720),
        ("1d", 86400),
        ("0h0m1.5s", 1.5),
        ("6m0s", 360),
        ("30", 30),
        ("0.25", 0.25),
        (" 1s ", 1),
        (str(int(NOW) + 90), 90),
        (str((int(NOW) + 90) * 1000), 90),
        (formatdate(NOW + 12, usegmt=True), 12),
        ("2026-11-18T11:07:40Z", 1_795_000_060 - NOW),
        ("2026-11-18T11:07:40+00:00", 60),
        (formatdate(NOW - 1000, usegmt=True), 0),
        (str(int(NOW) - 1000), 0),
    ],
)
def test_reset_in_each_format_seen_is_read_as_seconds_from_now(text: str, seconds: float):
    assert seconds_until(text, NOW) == pytest.approx(seconds, abs=1e-6)


@pytest.mark.parametrize("text", ["", "soon", "nan", "inf", "-5", "1x", "s", "1..5s", "99999999999999999999-01-01"])
def test_reset_in_no_known_format_is_unknown(text: str):
    assert seconds_until(text, NOW) is None


@given(st.text())
def test_reset_of_any_text_is_unknown_or_seconds_that_are_not_negative(text: str):
    assert (seconds_until(text, NOW) or 0.0) >= 0.0


def test_limit_without_a_window_in_its_name_is_of_a_minute_except_for_the_requests_of_groq():
    headers = {
        "x-ratelimit-limit-requests": "14400",
        "x-ratelimit-remaining-requests": "14370",
        "x-ratelimit-reset-requests": "2m59.56s",
        "x-ratelimit-limit-tokens": "18000",
        "x-ratelimit-remaining-tokens": "17997",
        "x-ratelimit-reset-tokens": "7.66s",
    }
    tokens = Observation("tokens", "minute", 18000, 17997, pytest.approx(7.66))
    assert observed(headers) == (Observation("requests", "minute", 14400, 14370, pytest.approx(179.56)), tokens)
    assert observed(headers, "day") == (Observation("requests", "day", 14400, 14370, pytest.approx(179.56)), tokens)


def test_limit_that_names_its_window_is_of_that_window():
    headers = {"x-ratelimit-limit-tokens-day": "500000", "x-ratelimit-limit-req-minute": "60", "content-type": "application/json"}
    assert {item[:3] for item in observed(headers)} == {("tokens", "day", 500000.0), ("requests", "minute", 60.0)}


def test_wait_asked_for_is_retry_after_then_the_reset_of_what_is_used_up():
    resets = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "3s", "x-ratelimit-remaining-tokens": "50", "x-ratelimit-reset-tokens": "9s"}
    assert asked_wait({"retry-after": "7", **resets}, observed(resets)) == 7
    assert asked_wait({"retry-after-ms": "250", "retry-after": "1"}, ()) == 0.25
    assert asked_wait(resets, observed(resets)) == 3
    assert asked_wait({}, ()) is None


@pytest.mark.parametrize("years", [-10, 10])
def test_date_of_an_endpoint_whose_clock_is_years_off_is_read_by_its_own_clock(years: int):
    theirs = NOW + years * 365 * 86400
    headers = {"date": formatdate(theirs, usegmt=True), "retry-after": formatdate(theirs + 20, usegmt=True)}
    assert asked_wait(headers, ()) == 20


# ---------------------------------------------------------------- the arithmetic, on a clock of the test's own


class Endpoint:
    """An endpoint with a sliding window, asked by `concurrent` callers who always have another request, for `seconds`."""

    def __init__(self, pace: Pace, limit: int, latency_s: float = 0.2, concurrent: int = 256, tokens: tuple[int, int] = (100, 100), budget: int = 0) -> None:
        self.pace, self.limit, self.latency_s, self.concurrent = pace, limit, latency_s, concurrent
        self.estimate, self.cost = tokens
        self.budget = budget
        self.sent: list[float] = []
        self.refused = 0
        self.now = 0.0
        self._under_way: list[tuple[float, int, Report]] = []
        self._spent: deque[tuple[float, int]] = deque()
        self.limits_told = True
        self.stray = 0
        """One in so many requests is refused for no reason, the fifth among them."""

    def _spend(self) -> tuple[int, int]:
        while self._spent and self._spent[0][0] <= self.now - 60:
            self._spent.popleft()
        return len(self._spent), sum(cost for _, cost in self._spent) if self.budget else 0

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            while self._under_way and self._under_way[0][0] <= self.now:
                self.pace.report(self.now, heapq.heappop(self._under_way)[2])
            ready = self.pace.ready(self.now, self.estimate)
            if ready <= self.now and len(self._under_way) < self.concurrent:
                self._send()
                continue
            moments = [end, self._under_way[0][0] if self._under_way else end]
            if len(self._under_way) < self.concurrent:
                moments.append(ready)
            self.now = max(self.now, min(moments))

    def _send(self) -> None:
        permit = self.pace.take(self.now, self.estimate)
        self.sent.append(self.now)
        requests, tokens = self._spend()
        refused = (self.stray and len(self.sent) % self.stray == 5) or requests >= self.limit or (self.budget and tokens + self.cost > self.budget)
        self.refused += bool(refused)
        if not refused:
            self._spent.append((self.now, self.cost))
        told = (Observation("requests", "minute", self.limit, max(0, self.limit - requests - 1), None),) if self.limits_told else ()
        if self.budget and self.limits_told:
            told = (Observation("tokens", "minute", self.budget, max(0, self.budget - tokens - self.cost), None),)
        report = Report(permit, 0 if refused else self.cost, observed=told, refused=bool(refused))
        heapq.heappush(self._under_way, (self.now + self.latency_s, len(self.sent), report))

    def most_in_a_window(self) -> int:
        window: deque[float] = deque()
        most = 0
        for at in self.sent:
            window.append(at)
            while window[0] <= at - 60:
                window.popleft()
            most = max(most, len(window))
        return most


def test_six_thousand_a_minute_are_used_to_97_percent_in_every_minute_and_never_exceeded():
    endpoint = Endpoint(Pace(), 6000)
    endpoint.run(300)
    for minute in range(5):
        assert sum(60 * minute <= at < 60 * (minute + 1) for at in endpoint.sent) >= 0.97 * 6000
    assert endpoint.most_in_a_window() <= 6000
    assert endpoint.refused == 0


@settings(max_examples=25)
@given(st.integers(1, 200), st.floats(0.001, 20), st.integers(1, 300))
def test_limit_once_known_is_never_exceeded_by_more_than_one_request(limit: int, latency_s: float, concurrent: int):
    endpoint = Endpoint(Pace(), limit, latency_s, concurrent)
    endpoint.run(130)
    asked_before_known = sum(at <= latency_s for at in endpoint.sent)
    assert endpoint.most_in_a_window() <= max(limit + 1, asked_before_known)


@settings(max_examples=15)
@given(st.integers(20, 60), st.integers(20, 60))
def test_tokens_estimated_too_high_or_too_low_cost_no_more_than_the_limit_and_use_most_of_it(estimate: int, cost: int):
    endpoint = Endpoint(Pace(), 10**9, 0.5, 100, tokens=(max(estimate, cost), cost), budget=3000)
    endpoint.run(180)
    assert endpoint.refused == 0
    assert len(endpoint.sent) * cost >= 0.9 * 3 * 3000 - 2 * max(estimate, cost)


def test_what_a_run_before_this_one_has_spent_is_not_spent_again():
    endpoint = Endpoint(Pace(), 600)
    endpoint.run(61)
    endpoint.pace = Pace()  # killed and begun anew
    endpoint._under_way.clear()
    endpoint.run(120)
    assert endpoint.most_in_a_window() <= 601
    assert endpoint.refused <= 1


def test_limits_that_nobody_tells_are_found_by_refusals_and_mostly_used():
    endpoint = Endpoint(Pace(), 1200, 0.1, 64)
    endpoint.limits_told = False
    endpoint.run(600)
    answered = len(endpoint.sent) - endpoint.refused
    assert answered >= 0.9 * 1200 * 9
    assert endpoint.refused <= 0.3 * len(endpoint.sent)


def test_refusals_now_and_then_at_an_endpoint_without_a_limit_cost_little_of_its_speed():
    endpoint = Endpoint(Pace(), 10**9, 0.1, 32)
    endpoint.limits_told, endpoint.stray = False, 500
    endpoint.run(300)
    assert len(endpoint.sent) >= 0.8 * 300 * 32 / 0.1


def test_only_one_request_is_sent_before_the_first_answer():
    endpoint = Endpoint(Pace(), 10, latency_s=0.5)
    endpoint.run(0.4)
    assert len(endpoint.sent) == 1


def test_refusal_with_a_wait_stops_all_requests_for_so_long():
    pace = Pace()
    permit = pace.take(0.0, 1)
    pace.report(0.1, Report(permit, 0, refused=True, pause_s=5.0))
    assert pace.ready(0.2, 1) == pytest.approx(5.1)


def test_permit_that_was_given_back_was_not_spent():
    pace = Pace()
    pace.report(0.0, Report(pace.take(0.0, 1), 1, observed=(Observation("requests", "day", 3, 2, None),)))
    pace.report(1.1, Report(pace.take(1.0, 1), None, sent=False))
    pace.take(2.0, 1)
    assert pace.ready(3.0, 1) == 3.0
    pace.take(3.0, 1)
    assert pace.ready(4.0, 1) > 80000


# ---------------------------------------------------------------- who waits


def test_limiter_sends_one_request_a_second_until_an_answer_then_all():
    async def main() -> tuple[float, float]:
        limiter = LocalLimiter()
        started = time.monotonic()
        first = await limiter.acquire(1)
        waiting = [asyncio.ensure_future(limiter.acquire(1)) for _ in range(50)]
        done, _ = await asyncio.wait(waiting, timeout=0.05)
        held = len(done)
        limiter.report(Report(first, 1))
        await asyncio.gather(*waiting)
        return held, time.monotonic() - started

    held, seconds = asyncio.run(main())
    assert held == 0
    assert seconds < 0.9


def test_limiter_stays_within_a_limit_of_real_time_while_the_wall_clock_jumps(monkeypatch: pytest.MonkeyPatch):
    async def main() -> list[float]:
        limiter, granted = LocalLimiter(minute_s=0.5), []

        async def ask() -> None:
            permit = await limiter.acquire(1)
            granted.append(time.monotonic())
            monkeypatch.setattr(time, "time", lambda: NOW * (len(granted) % 3))
            limiter.report(Report(permit, 1, observed=(Observation("requests", "minute", 20, None, None),)))

        await ask()
        await asyncio.gather(*(ask() for _ in range(39)))
        return granted

    granted = asyncio.run(main())
    assert len(granted) == 40
    assert all(sum(at <= other < at + 0.49 for other in granted) <= 21 for at in granted)
    assert granted[-1] - granted[0] >= 0.95


def test_permit_of_a_caller_who_gave_up_goes_to_the_next():
    async def main() -> int:
        limiter = LocalLimiter(minute_s=1.0)
        first = await limiter.acquire(1)
        limiter.report(Report(first, 1, observed=(Observation("requests", "minute", 10, None, None),)))
        waiting = [asyncio.ensure_future(limiter.acquire(1)) for _ in range(6)]
        await asyncio.sleep(0.05)
        for task in waiting[:3]:
            task.cancel()
        return len(await asyncio.wait_for(asyncio.gather(*waiting[3:]), 2))

    assert asyncio.run(main()) == 3


def test_limit_of_a_day_that_is_used_up_stops_instead_of_waiting():
    async def main() -> None:
        limiter = LocalLimiter()
        permit = await limiter.acquire(1)
        limiter.report(Report(permit, 1, observed=(Observation("requests", "day", 1, 0, LONGEST_WAIT_S * 20),)))
        await asyncio.sleep(0.05)
        await limiter.acquire(1)

    with pytest.raises(EndpointStopped, match=r"used up for another \d+\.\d hours; run again"):
        asyncio.run(main())


def test_model_that_is_in_process_has_no_limiter():
    assert limiter_for("vllm/any", Runtime()) is None
    assert limiter_for("scripted/writer", Runtime()) is None
