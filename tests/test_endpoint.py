"""What an endpoint is asked and how its answers are read, over real sockets; faults and races are in test_endpoint_faults."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import EndpointStopped, UserError
from pipeline.keys import read_key
from pipeline.llm import Adapter, Completion, Request, open_model
from pipeline.plan import make_plan
from pipeline.preflight import endpoints, preflight
from pipeline.runtime import Runtime
from pipeline.study import ModelName, Sampling, Study, load_study, parse
from tests.endpoint_server import EndpointServer, answer_text, peak
from tests.runs import ROOT, SMALL, environment

CANARY = "sk-canary-0123456789abcdef"
ASKED = [{"role": "system", "content": "You sell."}, {"role": "user", "content": "Write about kettles and tea."}]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)


def runtime(server: EndpointServer | None = None, **settings: Any) -> Runtime:
    given = {"endpoint_backoff_s": 0.01, "endpoint_timeout_s": 5.0, **({"endpoint_url": server.url} if server else {}), **settings}
    return Runtime(**given)


def ask(server: EndpointServer, *requests: Request, model: str = "openai-compatible/small", **settings: Any) -> list[Completion]:
    """Answers to requests made one after the other."""

    async def main() -> list[Completion]:
        opened = open_model(model, runtime(server, **settings), "float32")
        try:
            return [await opened.complete(request) for request in requests]
        finally:
            opened.close()

    return asyncio.run(main())


def request(**changes: Any) -> Request:
    return Request(**{"conversation": ASKED, "sampling": Sampling(temperature=0.5, top_p=0.9, max_tokens=64), "seed": 7, **changes})


def bodies(server: EndpointServer) -> list[dict[str, Any]]:
    return [json.loads(record.body) for record in server.requests]


# ---------------------------------------------------------------- what is asked


def test_request_carries_every_sampling_parameter_and_the_answer_its_provenance():
    with EndpointServer(key=CANARY) as server:
        (answer,) = ask(server, request(sampling=Sampling(temperature=0.5, top_p=0.9, top_k=20, min_p=0.1, max_tokens=64, stop=("###",))))
        (body,) = bodies(server)
    wanted = {"model": "small", "messages": ASKED, "temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.0, "max_tokens": 64}
    assert body == {**wanted, "seed": 7, "stop": ["###"]}
    assert (answer.text, answer.status, answer.reason) == (answer_text(ASKED), "ok", None)
    assert (answer.served_model, answer.attempts, answer.finish_reason) == ("small", 1, "stop")
    assert answer.prompt_ids == ()
    assert answer.prompt_tokens > 0
    assert answer.completion_tokens > 0
    assert answer.first_byte_s is not None
    assert answer.total_s is not None
    assert 0 < answer.first_byte_s <= answer.total_s


def test_neutral_parameter_that_the_endpoint_refuses_is_left_out_from_then_on():
    with EndpointServer(refuses=["top_k", "min_p", "repetition_penalty"]) as server:
        answers = ask(server, request(), request(seed=8))
        assert [("top_k" in body) for body in bodies(server)] == [True, False, False]
    assert [answer.status for answer in answers] == ["ok", "ok"]
    assert [answer.attempts for answer in answers] == [2, 1]


def test_parameter_that_changes_results_is_never_left_out():
    with EndpointServer(refuses=["top_k"]) as server:
        (answer,) = ask(server, request(sampling=Sampling(top_k=5)))
        assert all(body["top_k"] == 5 for body in bodies(server))
    assert answer.status == "error"
    assert "top_k" in str(answer.reason)


@pytest.mark.parametrize(
    ("refuses", "form", "attempts"),
    [([], "structured_outputs", 1), (["structured_outputs"], "response_format", 2), (["structured_outputs", "response_format"], None, 3)],
)
def test_fixed_choice_is_asked_for_in_the_form_that_the_endpoint_takes_and_remembered(refuses: list[str], form: str | None, attempts: int):
    with EndpointServer(refuses=refuses) as server:
        answers = ask(server, request(choices=("A", "B")), request(choices=("A", "B"), seed=8))
        sent = bodies(server)
    assert [answer.attempts for answer in answers] == [attempts, 1]
    assert {"structured_outputs", "response_format"} & set(sent[-1]) == ({form} if form else set())
    assert all(answer.status == "ok" for answer in answers)
    if form:
        assert all(answer.text in ("A", "B") for answer in answers)


def test_choice_as_a_json_object_has_room_beside_its_own_tokens():
    with EndpointServer(refuses=["structured_outputs"]) as server:
        ask(server, request(choices=("A", "B"), sampling=Sampling(max_tokens=5)))
        assert [body["max_tokens"] for body in bodies(server)] == [5, 21]


def test_adapter_and_prompt_logprobs_cannot_be_had_from_an_endpoint():
    with EndpointServer() as server:
        for impossible in (request(prompt_logprobs=True), request(adapter=Adapter("a", 1, Path("/nowhere")))):
            with pytest.raises(UserError, match="in process"):
                ask(server, impossible)
        assert server.requests == []


# ---------------------------------------------------------------- what comes back


@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        ("length", "truncated", "max_tokens"),
        ("refusal", "refused", "refused"),
        ("content_filter", "refused", "content filter"),
        ("empty_choices", "unparsed", "no choices"),
        ("null_content", "unparsed", "null content"),
        ("think_unclosed", "truncated", "before an answer"),
        ("400", "error", "400"),
        ("413", "error", "413"),
    ],
)
def test_answer_that_is_none_has_its_status_and_its_reason_at_the_first_attempt(fault: str, status: str, reason: str):
    with EndpointServer(script=[fault]) as server:
        (answer,) = ask(server, request())
        assert len(server.requests) == 1
    assert (answer.status, answer.attempts) == (status, 1)
    assert reason in str(answer.reason)


@pytest.mark.parametrize("fault", ["think_tags", "reasoning_content"])
def test_thinking_is_no_part_of_an_answer(fault: str):
    with EndpointServer(script=[fault]) as server:
        (answer,) = ask(server, request())
    assert (answer.status, answer.text) == ("ok", answer_text(ASKED))


@pytest.mark.parametrize("fault", ["429", "429_go", "408", "409", "498", "500", "503", "529", "reset", "reset_midbody", "short_body", "truncated_json"])
def test_passing_fault_costs_an_attempt_and_no_row(fault: str):
    with EndpointServer(each=[fault], retry_after_s=0.05) as server:
        (answer,) = ask(server, request())
    assert (answer.status, answer.attempts, answer.text) == ("ok", 2, answer_text(ASKED))


def test_fault_that_does_not_pass_ends_the_row_after_the_last_attempt():
    with EndpointServer(since={"malformed": 0}) as server:
        (answer,) = ask(server, request(), endpoint_attempts=3)
        assert len(server.requests) == 3
    assert (answer.status, answer.attempts) == ("error", 3)
    assert "not the JSON of a chat completion" in str(answer.reason)


def test_answer_that_belongs_to_another_question_is_asked_for_again():
    other = [{"role": "user", "content": "Write about harbours."}]
    with EndpointServer(script=[None, "repeated"]) as server:
        answers = ask(server, request(conversation=other), request())
    assert [answer.text for answer in answers] == [answer_text(other), answer_text(ASKED)]
    assert answers[1].attempts == 2


@pytest.mark.parametrize(("fault", "sentence"), [("401", "refuses the key"), ("403", "refuses the key"), ("404_model", "has no model 'small'")])
def test_key_or_model_lost_midway_stops_all_that_follows_with_a_sentence(fault: str, sentence: str):
    async def main() -> None:
        opened = open_model("openai-compatible/small", runtime(server), "float32")
        assert (await opened.complete(request())).status == "ok"
        for seed in (8, 9):
            with pytest.raises(EndpointStopped, match=sentence):
                await opened.complete(request(seed=seed))

    with EndpointServer(since={fault: 1}) as server:
        asyncio.run(main())
        assert len(server.requests) == 2


def test_model_may_be_asked_from_one_event_loop_after_another():
    with EndpointServer() as server:
        opened = open_model("openai-compatible/small", runtime(server), "float32")
        for _ in range(2):
            assert asyncio.run(opened.complete(request())).status == "ok"


# ---------------------------------------------------------------- keys


def test_key_is_sent_and_seen_nowhere_else(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]):
    caplog.set_level(logging.DEBUG)
    with EndpointServer(key=CANARY, script=["400", "500"]) as server:
        opened = open_model("openai-compatible/small", runtime(server), "float32")
        answers = [asyncio.run(opened.complete(request(seed=seed))) for seed in range(3)]
        server.configure(key="another")
        with pytest.raises(EndpointStopped, match="OPENAI_API_KEY holds a wrong one") as stopped:
            asyncio.run(opened.complete(request(seed=9)))
        assert server.requests[0].key_present
    assert "***" in str(answers[0].reason)  # the server repeats what it was sent
    seen = [repr(answers), repr(stopped.value), repr(vars(opened)), caplog.text, *capfd.readouterr()]
    assert not any(CANARY in text for text in seen)


@pytest.mark.fast
def test_key_comes_from_the_named_variable_or_a_mounted_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = ModelName.parse("openai-compatible/any")
    assert read_key(model, runtime()).reveal() == CANARY
    monkeypatch.setenv("MY_KEY", "other")
    assert read_key(model, runtime(endpoint_key_name="MY_KEY")).reveal() == "other"
    (tmp_path / "key").write_text("mounted\n")
    assert read_key(model, runtime(endpoint_key_file=tmp_path / "key")).reveal() == "mounted"
    assert read_key(model, runtime(endpoint_key_name="NOT_SET")) is None


@pytest.mark.fast
def test_key_that_is_missing_or_cannot_be_one_raises_user_error_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GROQ_API_KEY", raising=False)
    with pytest.raises(UserError, match="GROQ_API_KEY is not set"):
        read_key(ModelName.parse("groq/any"), runtime())
    with pytest.raises(UserError, match="cannot be read"):
        read_key(ModelName.parse("openai-compatible/any"), runtime(endpoint_key_file=tmp_path / "none"))
    with pytest.raises(UserError, match="DATADOSE_ENDPOINT_KEY_FILE") as pasted:
        read_key(ModelName.parse("openai-compatible/any"), runtime(endpoint_key_file=CANARY))
    assert CANARY not in str(pasted.value)
    monkeypatch.setenv("OPENAI_API_KEY", f"{CANARY}\n{CANARY}")
    with pytest.raises(UserError, match="without a space") as error:
        read_key(ModelName.parse("openai-compatible/any"), runtime())
    assert CANARY not in str(error.value)


@pytest.mark.fast
def test_key_can_be_neither_printed_nor_pickled():
    secret = read_key(ModelName.parse("openai-compatible/any"), runtime())
    assert f"{secret} {secret!r} {[secret]}" == "*** *** [***]"
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="does not travel"):
            copied(secret)


# ---------------------------------------------------------------- before the start


def small_study(**changes: Any) -> Study:
    import tomllib

    raw = tomllib.loads(SMALL)
    raw["synthesis"]["teacher"] = "openai-compatible/small"
    return parse(Study, {**raw, **changes}, "small")


def found(server: EndpointServer, **settings: Any) -> tuple[bool, str]:
    (check,) = endpoints(make_plan(small_study()), runtime(server, **settings), set())
    return check.passed, check.found


def test_preflight_asks_the_endpoint_for_one_token_and_passes():
    with EndpointServer(key=CANARY) as server:
        assert found(server) == (True, "openai-compatible/small answers as small")
        assert [body["max_tokens"] for body in bodies(server)] == [1]


def test_preflight_of_a_model_that_is_not_there_names_the_nearest():
    with EndpointServer(models=["smal", "large"]) as server:
        passed, text = found(server)
    assert not passed
    assert "did you mean 'smal'" in text


def test_preflight_explains_a_wrong_key_and_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch):
    with EndpointServer(key="another") as server:
        assert "OPENAI_API_KEY holds a wrong one" in found(server)[1]
        monkeypatch.delenv("OPENAI_API_KEY")
        assert "OPENAI_API_KEY is not set" in found(server)[1]


def test_preflight_of_an_endpoint_without_a_list_of_models_asks_all_the_same():
    with EndpointServer(models_status=404) as server:
        assert found(server)[0]


def test_preflight_raises_before_anything_is_built_where_nobody_answers(tmp_path: Path):
    with EndpointServer() as server:
        url = server.url
    with pytest.raises(UserError, match="cannot be reached"):
        preflight(make_plan(small_study()), runtime(store=str(tmp_path), endpoint_url=url))
    assert not (tmp_path / "manifests").exists()


@pytest.mark.fast
def test_base_behind_an_endpoint_raises_user_error():
    with pytest.raises(UserError, match="cannot be trained"):
        make_plan(small_study(base="groq/llama-3.1-8b-instant"))


@pytest.mark.fast
def test_sampling_that_groq_does_not_take_raises_user_error():
    synthesis = {"teacher": "groq/any", "rows": 24, "sampling": {"min_p": 0.1}}
    with pytest.raises(UserError, match="groq takes no min_p"):
        make_plan(small_study(synthesis=synthesis))


@pytest.mark.fast
def test_name_behind_an_endpoint_is_kept_whole_and_has_no_revision():
    assert ModelName.parse("groq/meta-llama/llama-4-scout") == ModelName(provider="groq", name="meta-llama/llama-4-scout")
    assert ModelName.parse("openai-compatible/@cf/meta/llama@3").name == "@cf/meta/llama@3"
    assert load_study("laptop") == parse(Study, load_study("laptop").model_dump(mode="json"), "laptop")


# ---------------------------------------------------------------- one limiter for all actors


SHARING = """
import asyncio
import json
import ray
from pipeline.llm.limiter import Observation, Report, limiter_for
from pipeline.runtime import Runtime
from pipeline.stages.workers import ensure_ray

where = Runtime(endpoint_url="http://127.0.0.1:1/v1")
ensure_ray(where)
limiters = [limiter_for("openai-compatible/small", where) for _ in range(2)]

@ray.remote(num_cpus=0)
def taken(limiter, told, wanted, timeout_s):
    async def one():
        permit = await limiter.acquire(1)
        limiter.report(Report(permit, 1, observed=told))
        return permit.granted

    async def main():
        tasks = [asyncio.ensure_future(one()) for _ in range(wanted)]
        done, waiting = await asyncio.wait(tasks, timeout=timeout_s)
        for task in waiting:
            task.cancel()
        await asyncio.sleep(0.1)
        return [task.result() for task in done]

    return asyncio.run(main())

print(ray.get(taken.remote(limiters[0], (Observation("requests", "minute", 60, None, None),), 1, 60))[0])
print(json.dumps(sum(ray.get([taken.remote(limiter, (), 50, 5) for limiter in limiters]), [])))
ray.shutdown()
"""
"""When actors get their permits, by the desk's clock, once one of them was told of a limit of one a second."""


def test_actors_of_a_run_share_one_limit(ray_address: str, tmp_path: Path):
    command = [sys.executable, "-c", SHARING]
    run = subprocess.run(command, cwd=ROOT, env=environment(tmp_path, RAY_ADDRESS=ray_address), capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    first, shared = map(json.loads, run.stdout.splitlines())
    assert len(shared) >= 3
    assert peak(sorted([first, *shared]), 3.0) <= 5


def test_requests_of_one_process_stay_within_the_limit_that_the_first_answer_told():
    async def main() -> list[Completion]:
        opened = open_model("openai-compatible/small", runtime(server), "float32")
        return await asyncio.gather(*(opened.complete(request(seed=seed)) for seed in range(4)))

    with EndpointServer(requests_per_minute=200) as server:
        assert [answer.status for answer in asyncio.run(main())] == ["ok"] * 4
        times = [record.at for record in server.requests]
        assert server.violations() == 0
    assert times[-1] - times[1] >= 2 * 60 / 200 * 0.9
