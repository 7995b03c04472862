"""The client of OpenAI-compatible endpoints against `vllm serve` itself, on this machine's CPU with SmolLM2-135M. A minute or two."""

from __future__ import annotations

import pytest

from pipeline import judging, tasks
from pipeline.errors import EndpointStopped
from pipeline.llm import Completion, Request, open_model
from pipeline.runtime import Runtime
from pipeline.study import Sampling
from tests.asking import answers
from tests.vllm_server import CONTEXT_TOKENS, KEY, NAME, serving

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

GREEDY = Sampling(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("vllm") / "log") as server:
        yield server


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
    sampling = protocol.sampling.model_copy(update={"max_tokens": min(protocol.sampling.max_tokens, 64)})  # a long explanation tells no more
    completions = ask(*(Request(conversation, sampling, seed=0, choices=protocol.choices) for _, conversation in shown))
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
