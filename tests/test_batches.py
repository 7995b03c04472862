"""The Batch API: whatever becomes of a batch or of us, every row is answered or has a reason, and no question is in two batches at once."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.artifacts import FolderStore, Step
from pipeline.budget import NO_LIMIT, Tally
from pipeline.errors import EndpointStopped
from pipeline.journal import Journal
from pipeline.llm import Completion, Request, open_model
from pipeline.llm.asking import Asker
from pipeline.llm.batches import ROUNDS, batches_for
from pipeline.llm.endpoint import EndpointModel
from pipeline.runtime import Runtime
from pipeline.study import Budget, Sampling, load_study
from tests.endpoint_server import BATCH_FAULTS, EndpointServer, answer_text
from tests.runs import ROOT, SMALL, datadose, start
from tests.test_leaks import holding, written

NAME = "openai-compatible/small"
KEY = "sk-canary-77f2ab01c9"
STEP = Step("synthesize", "train-0000of0001", {"teacher": NAME})
ROWS = 12


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch, EndpointServer() as running:
        patch.setenv("OPENAI_API_KEY", KEY)
        yield running


def questions(about: str = "kettles", count: int = ROWS, **fields: Any) -> list[Request]:
    return [
        Request([{"role": "user", "content": f"Please write a post about {about} number {number}"}], Sampling(max_tokens=64), 7, **fields)
        for number in range(count)
    ]


def ask(url: str, folder: Path, asked: Sequence[Request], budget: Budget | None = None, **settings: Any) -> list[Completion]:
    """As a stage asks the questions of one step."""
    study = load_study("laptop").model_copy(update={"budget": budget or Budget()})
    runtime = Runtime(endpoint_url=url, endpoint_batch=True, **{"endpoint_poll_s": 0.02, "endpoint_backoff_s": 0.01, "endpoint_timeout_s": 5.0, **settings})
    tally = Tally(NO_LIMIT, 0, Counter())

    async def tell(done: int, used: Any) -> Any:
        return tally.use(used)

    async def run() -> list[Completion]:
        model, journal = open_model(NAME, runtime, "float32"), Journal(FolderStore(str(folder)), STEP)
        asker = Asker(model, NAME, study, {}, 4, tell, batches_for(model, runtime))
        try:
            return (await asker.ask(asked, journal, journal.load())).completions
        finally:
            model.close()

    return asyncio.run(run())


def all_right(asked: Sequence[Request], answers: Sequence[Completion]) -> bool:
    return [(answer.status, answer.text) for answer in answers] == [("ok", answer_text(request.conversation)) for request in asked]


# ---------------------------------------------------------------- what becomes of a batch


def test_questions_go_in_one_batch_after_the_first_of_them(server, tmp_path):
    server.restart(key=KEY, batch_s=0.1)
    asked = questions()
    answers = ask(server.url, tmp_path, asked)
    assert all_right(asked, answers)
    assert [len(batch) for batch in server.batches] == [ROWS - 1]
    assert {answer.attempts for answer in answers} == {1}
    assert [answer.total_s is None for answer in answers] == [False] + [True] * (ROWS - 1)
    assert Journal(FolderStore(str(tmp_path)), STEP).load().keys() != set()
    assert all_right(asked, ask(server.url, tmp_path, asked))
    assert len(server.requests) == ROWS, "asked again although all was journaled"


@pytest.mark.parametrize(("fault", "batches"), [
    ("upload_503", 1), ("create_503", 1), ("create_lost", 1), ("status_503", 1), ("download_reset", 1), ("messy", 1),
    ("full", 2), ("expired", 2), ("cancelled", 2), ("missing", 2),
])  # fmt: skip
def test_batch_that_met_a_fault_leaves_no_row_without_its_answer_and_asks_for_none_twice(server, tmp_path, fault, batches):
    server.restart(key=KEY, batch_script=[fault], batch_page=1)
    asked = questions(fault)
    assert all_right(asked, ask(server.url, tmp_path, asked))
    assert len(server.batches) == batches
    assert server.asked_after_delivery() == []
    assert max(server.delivered().values()) == 1


def test_line_that_the_endpoint_cannot_take_is_quarantined_alone(server, tmp_path):
    server.restart(key=KEY, batch_script=["bad_line"])
    asked = questions()
    answers = ask(server.url, tmp_path, asked)
    assert [answer.status for answer in answers] == ["ok", "ok", "error", *["ok"] * (ROWS - 3)]  # the first went by itself
    assert "not like this" in str(answers[2].reason)


def test_file_that_is_refused_stops_the_stage_and_goes_again_once_mended(server, tmp_path):
    server.restart(key=KEY, batch_script=["failed"])
    asked = questions()
    with pytest.raises(EndpointStopped, match="the file cannot be read"):
        ask(server.url, tmp_path, asked)
    assert all_right(asked, ask(server.url, tmp_path, asked))
    assert len(server.requests) == ROWS


def test_row_that_no_batch_answers_is_given_up_with_a_reason(server, tmp_path):
    server.restart(key=KEY, batch_script=["cancelled"] * 9)
    answers = ask(server.url, tmp_path, questions())
    assert [answer.status for answer in answers] == ["ok", *["error"] * (ROWS - 1)]
    assert {answer.attempts for answer in answers[1:]} == {ROUNDS}
    assert f"batch {ROUNDS}, the last" in str(answers[1].reason)
    assert len(server.batches) == ROUNDS


@pytest.mark.parametrize(
    ("fault", "status"), [("429", "ok"), ("500", "ok"), ("hang", "ok"), ("malformed", "ok"), ("error_in_200", "ok"), ("length", "truncated"), ("400", "error")]
)
def test_row_that_met_a_fault_in_its_batch_has_the_status_that_it_has_by_itself(server, tmp_path, fault, status):
    server.restart(key=KEY, script=[None, fault])
    answers = ask(server.url, tmp_path, questions())
    assert [answer.status for answer in answers] == ["ok", status, *["ok"] * (ROWS - 2)]
    assert len(server.batches) == 1 + (status == "ok")
    assert server.asked_after_delivery() == []


def test_key_withdrawn_in_the_middle_of_a_batch_keeps_what_came(server, tmp_path):
    server.restart(key=KEY, since={"401": 5})
    asked = questions()
    with pytest.raises(EndpointStopped, match="refuses the key"):
        ask(server.url, tmp_path, asked)
    server.configure(since={})
    assert all_right(asked, ask(server.url, tmp_path, asked))
    assert server.asked_after_delivery() == []


def test_form_that_the_endpoint_refuses_is_learned_before_the_batch(server, tmp_path):
    server.restart(key=KEY, refuses=["structured_outputs", "top_k"])
    answers = ask(server.url, tmp_path, questions(choices=("A", "B")))
    assert {answer.text for answer in answers} <= {"A", "B"}
    assert len(server.batches) == 1


def test_endpoint_without_a_batch_api_is_told_with_the_switch(server, tmp_path):
    server.restart(key=KEY, batches=False)
    with pytest.raises(EndpointStopped, match="unset DATADOSE_ENDPOINT_BATCH"):
        ask(server.url, tmp_path, questions())


def test_batch_that_the_budget_has_no_room_for_is_not_sent(server, tmp_path):
    server.restart(key=KEY)
    with pytest.raises(EndpointStopped, match=r"budget\.requests"):
        ask(server.url, tmp_path, questions(), Budget(requests=ROWS - 1))
    assert server.batches == []
    ask(server.url, tmp_path, questions(), Budget(requests=ROWS + 1))
    assert [len(batch) for batch in server.batches] == [ROWS - 2]  # each run's first question goes by itself


# ---------------------------------------------------------------- kills


def killed_at_every_edge(url: str, folder: str) -> None:
    """In a process of its own, which forks: a run that dies at its n-th edge, and one that goes on after it, for every n."""
    for edge in itertools.count():
        store, asked = Path(folder) / str(edge), questions(f"edge {edge}")
        first = _forked(lambda: _die_at(edge), url, store, asked)  # noqa: B023  # called at once
        second = _forked(lambda: None, url, store, asked)
        assert second == 0, edge
        if first == 0:
            print(edge)
            return
        assert first == -signal.SIGKILL


def _forked(prepare: Any, url: str, store: Path, asked: Sequence[Request]) -> int:
    pid = os.fork()
    if pid == 0:
        prepare()
        os._exit(0 if all_right(asked, ask(url, store, asked)) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _die_at(edge: int) -> None:
    """Edges are before and after every call to the endpoint and every write of the store."""
    edges = itertools.count()
    call, replace = EndpointModel.call, FolderStore.replace

    def passed() -> None:
        if next(edges) == edge:
            os.kill(os.getpid(), signal.SIGKILL)

    async def calling(*arguments: Any) -> Any:
        passed()
        reply = await call(*arguments)
        passed()
        return reply

    def replacing(*arguments: Any) -> None:
        passed()
        replace(*arguments)
        passed()

    EndpointModel.call, FolderStore.replace = calling, replacing  # type: ignore[method-assign]


@pytest.mark.timeout(600)
def test_run_killed_at_any_moment_makes_no_second_batch(server, tmp_path):
    server.restart(key=KEY, batch_s=0.05)
    code = "import sys; from tests.test_batches import killed_at_every_edge; killed_at_every_edge(*sys.argv[1:])"
    ran = subprocess.run(
        [sys.executable, "-c", code, server.url, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    edges = int(ran.stdout)
    assert edges >= 20
    assert len(server.batches) == edges + 1
    in_batches = Counter(itertools.chain.from_iterable(server.batches))
    assert set(in_batches.values()) == {1}
    twice = Counter(record.question for record in server.requests)
    assert sum(count - 1 for count in twice.values()) <= 2  # killed with the one question under way that goes by itself


@pytest.mark.long
@pytest.mark.timeout(600)
def test_study_killed_while_its_batches_wait_collects_them_and_ends_and_its_key_is_nowhere(server, tmp_path, monkeypatch):
    server.restart(key=KEY, batch_s=4.0)
    monkeypatch.delenv("OPENAI_API_KEY")
    study, store = tmp_path / "small.toml", tmp_path / "store"
    study.write_text(SMALL.replace("scripted/writer", NAME, 2).replace(f'base = "{NAME}"', 'base = "scripted/writer"').replace("scripted/longest", NAME))
    (tmp_path / "key").write_text(f"{KEY}\n")
    session = tempfile.mkdtemp(prefix="ray")  # Ray's sockets lie below it, and their names have at most 107 bytes
    setting = {
        "DATADOSE_ENDPOINT_URL": server.url, "DATADOSE_ENDPOINT_BATCH": "1", "DATADOSE_ENDPOINT_POLL_S": "0.2",
        "DATADOSE_ENDPOINT_KEY_FILE": str(tmp_path / "key"), "RAY_TMPDIR": session,
    }  # fmt: skip
    process = start("run", study, store=store, **setting)
    while not server.batches:
        assert process.poll() is None, process.wait().stderr
        psutil.Process(process.pid).cpu_percent(0.1)  # waits for another program
    family = [*process.family(), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=60)
    server.configure(batch_s=0.0)
    ended = datadose("run", study, store=store, **setting)
    assert ended.returncode == 0, ended.stderr
    assert set(Counter(itertools.chain.from_iterable(server.batches)).values()) == {1}
    assert server.asked_after_delivery() == [record for record in server.requests if '"max_tokens": 1,' in record.body][1:]  # the preflight's
    assert holding(written(store) | written(Path(session)) | {"stdout": ended.stdout, "stderr": ended.stderr}, KEY) == []
    shutil.rmtree(session, ignore_errors=True)


@pytest.mark.fast
def test_every_fault_of_a_batch_has_a_test():
    text = Path(__file__).read_text()
    assert [fault for fault in BATCH_FAULTS if f'"{fault}"' not in text] == []
