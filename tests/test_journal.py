"""Answers are in the store before they count: kills, torn objects, several attempts at once, and no write for each answer."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifacts import Step, Store, open_store
from pipeline.budget import NO_LIMIT, Tally
from pipeline.errors import EndpointStopped, UserError
from pipeline.journal import Journal, journaled_steps, keys_of
from pipeline.llm import Completion, Request
from pipeline.llm.asking import Answered, Asker, still_known
from pipeline.study import Sampling, load_study
from tests.runs import ROOT

fast = pytest.mark.fast
unraisable = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # boto3 leaves its sockets to the garbage collector

STEP = Step("synthesize", "train-0000of0001", {"teacher": "openai-compatible/small"})
OTHER = Step("synthesize", "train-0001of0002", {"teacher": "openai-compatible/small"})


def completion(text: str = "Größe 5 – “ok” 🎉", **fields: Any) -> Completion:
    return Completion(text, "stop", (1, 2, 3), 4, **fields)


def lost(reason: str = "503 eight times") -> Completion:
    return Completion("", "error", (), 0, outcome="error", reason=reason, attempts=8)


def request(number: int = 0, **fields: Any) -> Request:
    return Request([{"role": "user", "content": f"question {number}"}], Sampling(), **{"seed": number, **fields})


def put_all(journal: Journal, *answers: tuple[str, Completion]) -> None:
    async def run() -> None:
        await asyncio.gather(*(journal.put(key, answer) for key, answer in answers))
        await journal.close()

    asyncio.run(run())


class Edge:
    """A store around a store: writes wait at a gate or fail, and it is known how many were under way at once."""

    def __init__(self, store: Store) -> None:
        self.uri, self._store = store.uri, store
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Semaphore(0)
        self.error: Exception | None = None
        self.under_way = self.most = 0

    def replace(self, key: str, data: bytes | Path) -> None:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        self.arrived.release()
        try:
            self.gate.wait(30)
            if self.error:
                raise self.error
            self._store.replace(key, data)
        finally:
            self.under_way -= 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


# ---------------------------------------------------------------- what is kept


@unraisable
def test_journaled_answers_come_back_as_they_were_to_a_later_attempt(store: Store):
    answers = {
        "a": completion(),
        "b": completion(served_model="small-0613", attempts=3, first_byte_s=0.125, total_s=0.5),
        "c": lost(),
        "d": completion("", outcome="refused", reason="content filter"),
        "e": Completion("\ud800 half a character\n", "length", (), 7, prompt_logprobs=(-0.5, -1.5)),
    }
    put_all(Journal(store, STEP), *answers.items())
    assert Journal(store, STEP).load() == answers
    assert Journal(store, OTHER).load() == {}
    assert journaled_steps(store) == {STEP.key}


@unraisable
def test_two_attempts_at_once_keep_all_that_either_was_told(store: Store):
    one, other = Journal(store, STEP), Journal(store, STEP)

    async def run() -> None:
        mine = (one.put(f"one-{number}", completion(f"one {number}")) for number in range(20))
        theirs = (other.put(f"other-{number}", completion(f"other {number}")) for number in range(20))
        await asyncio.gather(*mine, *theirs)

    asyncio.run(run())
    wanted = {f"{name}-{number}": completion(f"{name} {number}") for name in ("one", "other") for number in range(20)}
    assert Journal(store, STEP).load() == wanted


@unraisable
def test_answer_that_two_attempts_got_is_one_and_the_same_for_every_reader(store: Store):
    for text in ("first", "second"):
        put_all(Journal(store, STEP), ("a", completion(text)))
    found = [Journal(store, STEP).load() for _ in range(3)]
    assert found[0]["a"].text in ("first", "second")
    assert found[0] == found[1] == found[2]


@fast
@pytest.mark.parametrize("answers", [(lost(), completion("it came")), (completion("it came"), lost())], ids=["later", "earlier"])
def test_answer_counts_before_a_failure_in_whatever_attempt_it_is(tmp_path, answers):
    store = open_store(str(tmp_path))
    for answer in answers:
        put_all(Journal(store, STEP), ("a", answer))
    assert Journal(store, STEP).load() == {"a": completion("it came")}


@unraisable
def test_object_torn_at_any_byte_keeps_the_lines_before_the_tear(store: Store):
    answers = [(key, completion(f"answer {key}")) for key in "abc"]
    put_all(Journal(store, STEP), *answers)
    (name,) = store.list("journal/")
    whole = store.read(name)
    ends = [index for index, byte in enumerate(whole, 1) if byte == ord("\n")]
    for size in (0, 1, ends[0] - 1, ends[0], ends[0] + 1, ends[1], len(whole) - 1, len(whole)):
        store.replace(name, whole[:size])
        assert Journal(store, STEP).load() == dict(answers[: sum(end <= size for end in ends)])


@fast
@pytest.mark.parametrize("line", [b"{", b"[]", b'{"text": "no key"}', b'{"key": "a", "text": "half"}', b'{"key": "a", "unheard_of": 1}', b"\xff"])
def test_line_that_is_no_answer_raises_user_error_that_names_the_object(tmp_path, line):
    store = open_store(str(tmp_path))
    store.replace(f"journal/{STEP.key}/0badc0de/00000000.jsonl", line + b"\n")
    with pytest.raises(UserError, match=r"line 1 of journal/.*0badc0de.*delete that object"):
        Journal(store, STEP).load()


@unraisable
def test_discarded_journal_is_gone_with_those_of_other_attempts_and_other_steps_stay(store: Store):
    for step in (STEP, STEP, OTHER):
        put_all(Journal(store, step), ("a", completion()))
    Journal(store, STEP).discard()
    assert journaled_steps(store) == {OTHER.key}


# ---------------------------------------------------------------- keys


@fast
def test_requests_that_differ_in_anything_have_keys_of_their_own():
    asked = [
        request(), request(1), request(seed=7), request(choices=("A", "B")), request(choices=("B", "A")),
        Request(request().conversation, Sampling(temperature=0), 0), Request([{"role": "system", "content": "question 0"}], Sampling(), 0),
    ]  # fmt: skip
    assert len(set(keys_of(asked))) == len(asked)


@fast
@given(st.lists(st.integers(0, 3), max_size=12))
def test_same_question_asked_again_has_a_key_of_its_own_and_the_same_one_every_time(numbers: list[int]):
    keys = keys_of([request(number) for number in numbers])
    assert len(set(keys)) == len(numbers)
    assert keys_of([request(number) for number in numbers]) == keys
    assert len({key[:64] for key in keys}) == len(set(numbers))


# ---------------------------------------------------------------- group commit


@fast
def test_answers_that_come_during_a_write_are_written_together_by_the_next(tmp_path):
    store = Edge(open_store(str(tmp_path)))
    journal = Journal(store, STEP)

    async def run() -> None:
        store.gate.clear()
        first = asyncio.ensure_future(journal.put("first", completion()))
        await asyncio.to_thread(store.arrived.acquire)
        others = [asyncio.ensure_future(journal.put(str(number), completion())) for number in range(500)]
        await asyncio.sleep(0)
        assert not any(put.done() for put in (first, *others))
        store.gate.set()
        await asyncio.gather(first, *others)

    asyncio.run(run())
    assert len(list(store.list("journal/"))) == 2
    assert len(Journal(store, STEP).load()) == 501
    assert store.most == 1


@fast
def test_put_waits_for_two_writes_at_most_however_many_come_after_it(tmp_path):
    store = Edge(open_store(str(tmp_path)))
    journal = Journal(store, STEP)

    async def run() -> Counter[int]:
        waited: Counter[int] = Counter()

        async def put(number: int) -> None:
            before = len(list(store.list("journal/")))
            await journal.put(str(number), completion())
            waited[len(list(store.list("journal/"))) - before] += 1

        puts = []
        for number in range(100):  # a new one at every turn of the loop, so that something always waits
            puts.append(asyncio.ensure_future(put(number)))
            await asyncio.sleep(0.001)
        await asyncio.gather(*puts)
        return waited

    waited = asyncio.run(run())
    assert max(waited) <= 3  # two, and one that is named before its waiters are told
    assert len(Journal(store, STEP).load()) == 100


@fast
def test_failed_write_is_told_to_all_whose_answers_it_was_to_keep_and_later_ones_are_kept(tmp_path):
    store = Edge(open_store(str(tmp_path)))
    journal = Journal(store, STEP)

    async def run() -> list[Any]:
        store.error = OSError("no space left")
        told = await asyncio.gather(*(journal.put(key, completion()) for key in "abc"), return_exceptions=True)
        store.error = None
        await journal.put("d", completion())
        return told

    assert [str(error) for error in asyncio.run(run())] == ["no space left"] * 3
    assert set(Journal(store, STEP).load()) == {"d"}


@fast
def test_put_that_is_cancelled_leaves_the_others_of_its_write_alone(tmp_path):
    store = Edge(open_store(str(tmp_path)))
    journal = Journal(store, STEP)

    async def run() -> None:
        store.gate.clear()
        puts = [asyncio.ensure_future(journal.put(key, completion())) for key in "ab"]
        await asyncio.to_thread(store.arrived.acquire)
        puts[0].cancel()
        store.gate.set()
        await puts[1]
        await journal.close()

    asyncio.run(run())
    assert set(Journal(store, STEP).load()) >= {"b"}


# ---------------------------------------------------------------- asking with a journal


class Endpoint:
    """A model as behind an endpoint: writes down what it is asked, waits a little, answers."""

    def __init__(self, wait_s: float = 0.0, log: Path | None = None, stop_at: int | None = None, bad: frozenset[int] = frozenset()) -> None:
        self.asked: list[int] = []
        self._wait_s, self._stop_at, self._bad = wait_s, stop_at, bad
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log else None
        self.under_way = self.most = 0

    async def complete(self, asked: Request) -> Completion:
        self.asked.append(asked.seed)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        if self._log is not None:
            os.write(self._log, f"{asked.seed}\n".encode())
        await asyncio.sleep(self._wait_s)
        self.under_way -= 1
        if self._stop_at is not None and len(self.asked) >= self._stop_at:
            raise EndpointStopped("the key is refused")
        if asked.seed in self._bad:
            raise ValueError(f"question {asked.seed} is too long")
        return completion(f"answer {asked.seed}")

    def close(self) -> None:
        if self._log is not None:
            os.close(self._log)


def asker(model: Endpoint, in_flight: int = 4) -> Asker:
    tally = Tally(NO_LIMIT, 0, Counter())

    async def tell(done: int, used: Any) -> Any:
        return tally.use(used)

    return Asker(model, "openai-compatible/small", load_study("laptop"), {}, in_flight, tell)


def ask(model: Endpoint, store: Store, count: int, in_flight: int = 4) -> Answered:
    async def run() -> Answered:
        journal = Journal(store, STEP)
        return await asker(model, in_flight).ask([request(number) for number in range(count)], journal, journal.load())

    return asyncio.run(run())


@fast
def test_answers_come_in_the_order_of_their_requests_and_are_all_journaled(tmp_path):
    store = open_store(str(tmp_path))
    answered = ask(Endpoint(), store, 30)
    assert [answer.text for answer in answered.completions] == [f"answer {number}" for number in range(30)]
    assert Counter(answer.text for answer in Journal(store, STEP).load().values()) == Counter(f"answer {number}" for number in range(30))


@fast
def test_journaled_answers_are_not_asked_again(tmp_path):
    store = open_store(str(tmp_path))
    first = ask(Endpoint(), store, 10)
    model = Endpoint()
    again = ask(model, store, 15)
    assert model.asked == list(range(10, 15))
    assert again.completions[:10] == first.completions


@fast
def test_slot_of_a_request_is_held_until_its_answer_is_journaled(tmp_path):
    store, model = Edge(open_store(str(tmp_path))), Endpoint()

    async def run() -> None:
        store.gate.clear()
        asking = asyncio.ensure_future(asker(model, in_flight=3).ask([request(number) for number in range(9)], Journal(store, STEP)))
        await asyncio.to_thread(store.arrived.acquire)
        await asyncio.sleep(0.05)  # time in which nothing more may be asked
        assert len(model.asked) == 3
        store.gate.set()
        await asking

    asyncio.run(run())
    assert len(model.asked) == 9
    assert model.most <= 3


@fast
def test_endpoint_that_stops_is_asked_no_more_and_what_was_under_way_is_kept(tmp_path):
    store, model = open_store(str(tmp_path)), Endpoint(wait_s=0.001, stop_at=12)
    with pytest.raises(EndpointStopped, match="the key is refused"):
        ask(model, store, 100)
    assert len(model.asked) <= 12 + 4
    assert len(Journal(store, STEP).load()) >= 12 - 4
    rest = Endpoint()
    ask(rest, store, 100)
    assert len(rest.asked) + len(model.asked) <= 100 + 2 * 4


@fast
def test_store_that_takes_no_more_answers_stops_the_asking(tmp_path):
    store, model = Edge(open_store(str(tmp_path))), Endpoint()
    store.error = OSError("no space left")
    with pytest.raises(EndpointStopped, match="no space left"):
        ask(model, store, 100)
    assert len(model.asked) <= 4


@fast
def test_request_that_fails_by_itself_is_told_once_the_others_are_answered(tmp_path):
    store, model = open_store(str(tmp_path)), Endpoint(bad=frozenset({3}))
    with pytest.raises(ValueError, match="question 3 is too long"):
        ask(model, store, 20)
    assert len(Journal(store, STEP).load()) == 19


@fast
def test_workers_time_is_shared_out_and_adds_up_to_what_went_by(tmp_path):
    async def run() -> tuple[float, list[Answered]]:
        mine, started = asker(Endpoint(wait_s=0.02), in_flight=8), time.monotonic()
        answered = await asyncio.gather(*(mine.ask([request(number) for number in range(8)]) for _ in range(2)))
        return time.monotonic() - started, list(answered)

    wall, answered = asyncio.run(run())
    assert all(part.seconds > 0 for part in answered)
    assert 0.04 <= sum(part.seconds for part in answered) <= wall


@fast
@pytest.mark.parametrize(
    ("known", "requests", "kept"),
    [
        ({"a": completion(), "b": lost()}, 9, {"a", "b"}),
        ({"a": completion(), "b": lost()}, 2, {"a"}),
        ({"a": completion(), "b": lost(), "c": lost()}, 5, {"a"}),
        ({"a": completion("", outcome="refused"), "b": completion("", outcome="unparsed")}, 2, {"a", "b"}),
        ({}, 4, set()),
    ],
    ids=["on its way", "held back", "many failed", "answers of whatever kind", "nothing"],
)
def test_rows_without_an_answer_are_asked_again_where_the_step_was_held_back_for_them(known, requests, kept):
    assert set(still_known(known, requests, share=0.3)) == kept


# ---------------------------------------------------------------- kills

ROWS, IN_FLIGHT = 300, 16


def ask_and_be_killed(uri: str, log: str) -> None:
    """What runs in a process of its own."""
    model = Endpoint(wait_s=0.02, log=Path(log))
    ask(model, open_store(uri), ROWS, IN_FLIGHT)


def lines_of(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def runs(uri: str, log: Path, kills: tuple[int, ...]) -> Iterator[int]:
    """Runs that are killed once they have asked so often, then one that is not; their exit codes."""
    program = "import sys; from tests.test_journal import ask_and_be_killed; ask_and_be_killed(*sys.argv[1:])"
    for kill_after in (*kills, None):
        before = len(lines_of(log))
        process = subprocess.Popen([sys.executable, "-c", program, uri, str(log)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        while process.poll() is None:
            if kill_after is not None and len(lines_of(log)) - before >= kill_after:
                process.kill()
            time.sleep(0.005)  # polls another program's file
        yield process.returncode


@unraisable
@pytest.mark.parametrize("store", ["folder", "versitygw"], indirect=True)
def test_run_killed_again_and_again_asks_twice_at_most_for_what_was_under_way(tmp_path, store: Store):
    log, kept = tmp_path / "asked", set[int]()
    kills = (20, 55, 40, 70)
    start = 0
    codes = []
    for code in runs(store.uri, log, kills):
        codes.append(code)
        asked = lines_of(log)[start:]
        assert not kept & set(asked), "asked again although the answer was journaled"
        assert len(set(asked)) == len(asked)
        kept = {int(answer.text.removeprefix("answer ")) for answer in Journal(store, STEP).load().values()}
        assert len(lines_of(log)) - len(kept) <= IN_FLIGHT * len(kills)
        start += len(asked)
    assert codes == [-signal.SIGKILL] * len(kills) + [0]
    assert kept == set(range(ROWS))
    assert len(lines_of(log)) <= ROWS + IN_FLIGHT * len(kills)
