"""A study whose teacher and judge are behind an endpoint, run as a user runs it: its key stays where it was put, and a closed network stays closed."""

from __future__ import annotations

import socket
import tempfile
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.endpoint_server import EndpointServer
from tests.runs import SMALL, datadose

CANARY = "sk-canary-4e07c9d15b2a"
BEHIND_ENDPOINT = SMALL.replace('teacher = "scripted/writer"', 'teacher = "openai-compatible/small"').replace(
    'judges = ["scripted/longest"]', 'judges = ["openai-compatible/small"]'
)
BAD_WEATHER = {"429_seconds": 0.05, "500": 0.05, "reset_midbody": 0.05, "malformed": 0.05, "400": 0.02}


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "behind-endpoint.toml"
    path.write_text(BEHIND_ENDPOINT)
    return path


@pytest.fixture
def server():
    with EndpointServer(key=CANARY, chances=BAD_WEATHER, retry_after_s=0.05) as running:
        yield running


def written(folder: Path) -> dict[str, str]:
    """All that lies in a folder as text, tables unpacked."""
    texts = {}
    for path in folder.rglob("*"):
        if path.is_file():
            texts[str(path)] = str(pq.read_table(path).to_pylist()) if path.suffix == ".parquet" else path.read_bytes().decode("latin-1")
    return texts


def holding(texts: dict[str, str], secret: str) -> list[str]:
    return [name for name, text in texts.items() if secret in text]


def test_key_of_an_endpoint_is_in_no_file_no_output_and_no_log_of_the_run(tmp_path, study, server):
    store = tmp_path / "store"
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as session:  # Ray's sockets lie below it, and their names have at most 107 bytes
        run = datadose("run", study, store=store, DATADOSE_ENDPOINT_URL=server.url, RAY_TMPDIR=session, OPENAI_API_KEY=CANARY)
        logs = written(Path(session))
    assert run.returncode == 0, run.stdout + run.stderr
    requests = server.requests
    assert len(requests) > 24
    assert all(request.key_present for request in requests)
    kept = written(store)
    assert any(name.endswith(".jsonl") for name in kept)  # the events are among them
    assert len(logs) > 5
    assert holding(kept | logs | {"stdout": run.stdout, "stderr": run.stderr}, CANARY) == []
    assert server.asked_after_delivery() == []


def test_wrong_key_ends_the_run_with_a_sentence_that_does_not_show_it(tmp_path, study, server):
    run = datadose("run", study, store=tmp_path / "store", DATADOSE_ENDPOINT_URL=server.url, OPENAI_API_KEY=f"{CANARY}-mistyped")
    assert run.returncode in (1, 2)
    assert "OPENAI_API_KEY" in run.stderr
    assert holding(written(tmp_path / "store") | {"stdout": run.stdout, "stderr": run.stderr}, CANARY) == []
    assert len(server.requests) <= 1


@pytest.mark.parametrize("network", ["open", "closed"])
def test_study_that_names_a_foreign_endpoint_sends_a_byte_only_where_the_network_is_open(tmp_path, study, network):
    study.write_text(BEHIND_ENDPOINT.replace("openai-compatible/small", "groq/llama-3.1-8b-instant"))
    with socket.create_server(("127.0.0.1", 0)) as way_out:  # what leaves the machine goes through this proxy
        proxy = f"http://127.0.0.1:{way_out.getsockname()[1]}"
        outside = {"HTTPS_PROXY": proxy, "HTTP_PROXY": proxy, "NO_PROXY": "", "no_proxy": "", "https_proxy": proxy, "http_proxy": proxy}
        answering = threading.Thread(target=_refuse, args=(way_out, heard := []), daemon=True)
        answering.start()
        run = datadose("run", study, store=tmp_path / "store", DATADOSE_NETWORK=network, GROQ_API_KEY=CANARY, **outside)
        way_out.shutdown(socket.SHUT_RDWR)
        answering.join(10)
    assert run.returncode == 2, run.stdout + run.stderr
    assert bool(heard) == (network == "open")
    assert "groq" in run.stderr
    assert (network == "open") or "DATADOSE_ALLOWED_HOSTS" in run.stderr
    assert holding({"stdout": run.stdout, "stderr": run.stderr}, CANARY) == []
    assert not any("manifests" in name for name in written(tmp_path / "store"))


def _refuse(listener, heard):
    """Notes who connects, and hangs up."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        heard.append(connection.recv(100))
        connection.close()
