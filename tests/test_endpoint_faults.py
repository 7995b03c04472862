"""The client of OpenAI-compatible endpoints against a server that misbehaves on command: each fault alone, then all at random.

Whatever the server does, every row ends ok or with a reason, nothing is asked again once its answer came, and the key shows nowhere.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import traceback
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import EndpointStopped, UserError
from pipeline.llm import Completion, Request, open_model
from pipeline.llm.endpoint import EndpointModel
from pipeline.llm.limiter import LocalLimiter
from pipeline.runtime import Runtime
from pipeline.schemas import STATUSES
from pipeline.study import ModelName, Sampling
from tests.asking import answers
from tests.endpoint_server import LIMITED, TEN_YEARS_S, EndpointServer, answer_text

NAME = "openai-compatible/small"
KEY = "sk-canary-9b1d2f7e64"
SHORT = Sampling(max_tokens=64)
PASSING = (
    *LIMITED, "408", "409", "498", "500", "502", "503", "504", "529",
    "reset", "reset_midbody", "hang", "short_body", "truncated_json", "malformed", "error_in_200",
)  # fmt: skip
"""Faults after which it is right to ask again."""


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch, EndpointServer() as running:
        patch.setenv("OPENAI_API_KEY", KEY)
        yield running


def conversation(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def right(prompt: str) -> str:
    return answer_text(conversation(prompt))


QUICK = {"endpoint_timeout_s": 2.0, "endpoint_backoff_s": 0.02, "endpoint_wait_cap_s": 5.0}


def ask(server: EndpointServer, prompts: Sequence[str], at_once: int = 32, models: int = 1, minute_s: float = 60.0, **runtime: object) -> list[Any]:
    """What became of each prompt, completion or exception, at most `at_once` under way at a time, by `models` clients with one limiter."""

    settings = Runtime.model_validate({**QUICK, "endpoint_url": server.url, **runtime})
    limiter = LocalLimiter(minute_s)
    requests = [Request(conversation(prompt), SHORT, 7) for prompt in prompts]
    return answers(lambda: [open_model(NAME, settings, "float32", limiter=limiter) for _ in range(models)], requests, at_once)


def numbered(count: int, about: str = "row") -> list[str]:
    return [f"Please write a post about {about} number {number}" for number in range(count)]


# ---------------------------------------------------------------- faults that pass


@pytest.mark.parametrize("fault", PASSING)
def test_row_that_met_a_passing_fault_is_asked_again_and_answered(server, fault):
    server.restart(key=KEY, each=[fault], retry_after_s=0.05)
    (completion,) = ask(server, ["one small question"])
    assert (completion.status, completion.text, completion.attempts) == ("ok", right("one small question"), 2)
    assert [request.fault for request in server.requests] == [fault, None]


@pytest.mark.parametrize("fault", LIMITED[1:])
def test_row_told_when_to_come_back_does_not_come_earlier(server, fault):
    server.restart(key=KEY, each=[fault], retry_after_s=0.6)
    (completion,) = ask(server, ["one small question"])
    first, second = server.requests
    assert completion.status == "ok"
    assert 0.6 <= second.at - first.at < 4  # dates are in whole seconds


@pytest.mark.parametrize("fault", ["429_seconds", "429_date", "429_go_long", "429_epoch"])
def test_row_told_to_come_back_in_half_an_hour_waits_for_the_cap_alone(server, fault):
    server.restart(key=KEY, each=[fault], retry_after_s=1800)
    started = time.monotonic()
    (completion,) = ask(server, ["one small question"], endpoint_wait_cap_s=0.5)
    assert completion.status == "ok"
    assert time.monotonic() - started < 5


def test_endpoint_that_asks_for_a_day_stops_the_stage_instead_of_holding_it(server):
    server.restart(key=KEY, each=["429_seconds"] * 100, retry_after_s=24 * 3600)
    (outcome,) = ask(server, ["one small question"])
    assert isinstance(outcome, EndpointStopped)
    assert "24" in str(outcome)
    assert len(server.requests) == 1


@pytest.mark.parametrize("fault", ["429_date", "429_epoch", "clock_future"])
@pytest.mark.parametrize("off_s", [-TEN_YEARS_S, TEN_YEARS_S])
def test_server_whose_clock_is_ten_years_off_delays_nothing(server, fault, off_s):
    server.restart(key=KEY, each=[fault], retry_after_s=0.1, clock_s=off_s)
    started = time.monotonic()
    (completion,) = ask(server, ["one small question"], endpoint_wait_cap_s=60)
    assert completion.status == "ok"
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("fault", ["429", "503", "reset", "reset_midbody", "hang", "short_body", "malformed", "error_in_200"])
def test_row_whose_fault_never_passes_is_given_up_with_a_reason_and_leaves_the_others_alone(server, fault):
    server.restart(key=KEY, since={fault: 0})
    (lost,) = ask(server, ["the unlucky one"], endpoint_attempts=4, endpoint_timeout_s=0.5)
    asked = len(server.requests)
    server.configure(since={})
    (kept,) = ask(server, ["a lucky one"])
    assert (lost.status, lost.text, lost.attempts) == ("error", "", asked)
    assert asked == 4
    assert lost.reason
    assert kept.status == "ok"


# ---------------------------------------------------------------- faults that stay


@pytest.mark.parametrize("fault", ["400", "413"])
def test_row_that_the_endpoint_refuses_is_quarantined_at_once_with_the_endpoints_words(server, fault):
    server.restart(key=KEY, script=[None, fault])
    first, bad, last = ask(server, numbered(3), at_once=1)
    assert (bad.status, bad.attempts) == ("error", 1)
    assert fault in bad.reason
    assert "try something else" in bad.reason
    assert [first.status, last.status] == ["ok", "ok"]


def test_redirect_to_another_address_is_not_followed_and_takes_no_key_there(server):
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.setblocking(False)
        server.restart(key=KEY, each=["307"] * 100, redirect_to=f"http://127.0.0.1:{elsewhere.getsockname()[1]}/v1/chat/completions")
        (completion,) = ask(server, ["one small question"])
        assert (completion.status, completion.attempts) == ("error", 1)
        assert "307" in completion.reason
        with pytest.raises(BlockingIOError):
            elsewhere.accept()


@pytest.mark.parametrize(("fault", "named"), [("401", "401"), ("403", "403"), ("404_model", "small")])
def test_withdrawn_key_or_model_stops_the_stage_within_one_round(server, fault, named):
    server.restart(key=KEY, since={fault: 30}, latency_s=0.005)
    outcomes = ask(server, numbered(200), at_once=8)
    stops = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert {type(stop) for stop in stops} == {EndpointStopped}
    assert named in str(stops[0])
    assert [outcome.status for outcome in outcomes if not isinstance(outcome, BaseException)] == ["ok"] * 30
    assert len(stops) == 170
    assert len(server.requests) <= 30 + 8


def test_key_that_is_wrong_from_the_start_costs_one_round(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-wrong")
    server.restart(key=KEY)
    outcomes = ask(server, numbered(50), at_once=4)
    assert {type(outcome) for outcome in outcomes} == {EndpointStopped}
    assert len(server.requests) <= 4


# ---------------------------------------------------------------- answers that are not what they seem


@pytest.mark.parametrize(("fault", "status"), [("length", "truncated"), ("refusal", "refused"), ("content_filter", "refused"), ("think_unclosed", "truncated")])
def test_answer_that_did_not_come_to_its_end_has_its_status_and_is_not_asked_again(server, fault, status):
    server.restart(key=KEY, each=[fault] * 100)
    (completion,) = ask(server, ["one small question"])
    assert (completion.status, completion.attempts) == (status, 1)
    assert "Perhaps" not in completion.text
    assert len(server.requests) == 1


@pytest.mark.parametrize("fault", ["think_tags", "reasoning_content"])
def test_thinking_is_no_part_of_the_answer(server, fault):
    server.restart(key=KEY, each=[fault])
    (completion,) = ask(server, ["one small question"])
    assert (completion.status, completion.text) == ("ok", right("one small question"))


@pytest.mark.parametrize("fault", ["empty_choices", "null_content"])
def test_answer_without_text_is_no_answer_and_says_why(server, fault):
    server.restart(key=KEY, each=[fault] * 100)
    (completion,) = ask(server, ["one small question"])
    assert completion.status in ("error", "unparsed", "refused")
    assert completion.reason
    assert completion.text == ""
    assert completion.attempts == len(server.requests)


def test_row_keeps_the_name_of_the_model_that_answered_it(server):
    server.restart(key=KEY, script=[None, "wrong_model"])
    own, other = ask(server, numbered(2), at_once=1)
    assert (own.served_model, other.served_model) == ("small", "another-model")


@pytest.mark.parametrize("fault", ["repeated", "twice"])
def test_answer_delivered_twice_is_taken_once_and_every_row_gets_its_own(server, fault):
    server.restart(key=KEY, script=[None, None, fault, None, None, fault])
    prompts = numbered(8)
    completions = ask(server, prompts, at_once=1)
    assert [completion.status for completion in completions] == ["ok"] * 8
    assert [completion.text for completion in completions] == [right(prompt) for prompt in prompts]
    assert sum(request.fault == fault for request in server.requests) == 2


def test_answer_that_drips_in_byte_by_byte_is_waited_for(server):
    server.restart(key=KEY, each=["drip"], drip_s=0.0005)
    (completion,) = ask(server, ["one small question"], endpoint_timeout_s=30)
    assert (completion.status, completion.text, completion.attempts) == ("ok", right("one small question"), 1)
    assert completion.first_byte_s < completion.total_s


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("style", ["go", "epoch"])
def test_limit_of_requests_is_used_and_not_exceeded(server, style):
    server.restart(key=KEY, requests_per_minute=100, window_s=2.0, limit_style=style, latency_s=0.02)
    started = time.monotonic()
    completions = ask(server, numbered(130), models=2, minute_s=2.0)
    elapsed = time.monotonic() - started
    assert {completion.status for completion in completions} == {"ok"}
    assert server.peak_requests() <= 101
    assert server.violations() <= 1
    assert elapsed < 3 * 130 / 100 * 2.0


def test_limit_of_tokens_is_used_and_not_exceeded(server):
    server.restart(key=KEY, tokens_per_minute=1500, window_s=2.0, latency_s=0.02)
    started = time.monotonic()
    completions = ask(server, numbered(100), minute_s=2.0)
    elapsed = time.monotonic() - started
    asked = server.requests
    assert {completion.status for completion in completions} == {"ok"}
    assert server.violations() <= 1
    assert elapsed < 3 * sum(request.tokens for request in asked) / 1500 * 2.0


def test_limit_that_no_header_tells_is_found_by_its_refusals(server):
    server.restart(key=KEY, requests_per_minute=60, window_s=1.0, limit_style=None, latency_s=0.01)
    completions = ask(server, numbered(90), minute_s=1.0, endpoint_attempts=30)
    assert {completion.status for completion in completions} == {"ok"}
    assert server.asked_after_delivery() == []


# ---------------------------------------------------------------- all at once


@st.composite
def weather(draw: st.DrawFn) -> dict[str, float]:
    """Fault -> probability, together at most 0.6."""
    kinds = draw(st.lists(st.sampled_from([*PASSING, "repeated", "twice", "length", "think_tags", "400"]), unique=True, max_size=8))
    return {kind: 0.01 if kind == "hang" else draw(st.sampled_from([0.02, 0.05, 0.6 / 8])) for kind in kinds}


@settings(max_examples=10)
@given(chances=weather(), seed=st.integers(0, 10**6), at_once=st.sampled_from([2, 8, 25]))
def test_random_faults_lose_nothing_and_nothing_is_asked_again_once_answered(server, chances, seed, at_once):
    server.restart(key=KEY, chances=chances, seed=seed, retry_after_s=0.02)
    prompts = numbered(25, f"plan {seed}")
    completions = ask(server, prompts, at_once, endpoint_wait_cap_s=0.1)
    requests = server.requests
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.status in STATUSES
        if completion.status == "ok":
            assert (completion.text, completion.reason) == (right(prompt), None)
        elif completion.status == "error":
            assert completion.reason
    assert server.asked_after_delivery() == []
    assert max(server.delivered().values(), default=0) <= 1
    assert sum(completion.status in ("ok", "truncated") for completion in completions) == server.delivered().total()
    assert sum(completion.attempts for completion in completions) == len(requests)
    assert all(request.key_present for request in requests)


# ---------------------------------------------------------------- the key


def everything_of(outcome: Completion | BaseException) -> list[str]:
    """What a debugger or a verbose traceback shows: of an exception the local variables of every frame too."""
    told = [repr(outcome)]
    return [*told, *traceback.TracebackException.from_exception(outcome, capture_locals=True).format()] if isinstance(outcome, BaseException) else told


def test_key_shows_in_no_log_no_output_no_exception_and_no_repr(server, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    shown = []
    for fault in ("401", "403", "404_model", "400", "429_seconds", "500", "reset", "malformed", "error_in_200", "truncated_json", "hang"):
        server.restart(key=KEY, each=[fault] * 100)
        for outcome in ask(server, ["one small question"], endpoint_attempts=2, endpoint_timeout_s=0.5):
            shown += everything_of(outcome)
    server.restart(key="another")
    runtime = Runtime(endpoint_url=server.url)
    with pytest.raises(UserError) as refused:
        asyncio.run(EndpointModel(ModelName.parse(NAME), runtime, LocalLimiter()).list_models())
    shown += everything_of(refused.value)
    model = open_model(NAME, runtime, "float32")
    shown += [repr(model), str(vars(model)), repr(runtime)]
    model.close()
    shown += [record.getMessage() for record in caplog.records]
    shown += capfd.readouterr()
    assert len(shown) > 20
    assert [text for text in shown if KEY in text] == []
