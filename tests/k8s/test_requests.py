"""What a request to the API server outlasts, and what it does not, with a server that answers as the test says."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from kubernetes import client

from jobs.cluster import CONFIGMAP, JOB, Cluster, RefusedError

pytestmark = pytest.mark.fast


class Server:
    """Answers with what is in `script`, one entry a request: a status with headers and a body, or nothing and a closed connection."""

    def __init__(self) -> None:
        self.script: list[tuple[int, dict[str, str], dict[str, Any]] | None] = []
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # http.server's name
                server.asked.append(self.path)
                answer = server.script.pop(0)
                if answer is None:
                    self.connection.close()
                    return
                status, headers, body = answer
                data = json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

            def handle(self) -> None:
                with contextlib.suppress(OSError, ValueError):
                    super().handle()

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def cluster(self, outage_s: float) -> Cluster:
        configuration = client.Configuration()
        configuration.host, configuration.retries = f"http://127.0.0.1:{self.http.server_port}", False
        return Cluster(client.ApiClient(configuration), "datadose", outage_s)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


FOUND = (200, {}, {"metadata": {"name": "settings"}, "data": {}})


def refusal(status: int, message: str, **headers: str) -> tuple[int, dict[str, str], dict[str, Any]]:
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, {"kind": "Status", "message": message}


def test_too_many_requests_a_restart_and_a_closed_connection_are_outlasted(server: Server):
    server.script = [refusal(429, "too many requests", Retry_After="1"), refusal(503, "starting"), refusal(500, "etcd leader changed"), None, FOUND]
    assert server.cluster(60).get(CONFIGMAP, "settings") == FOUND[2]
    assert len(server.asked) == 5


@pytest.mark.parametrize("status", [400, 401, 403, 409, 422])
def test_a_refusal_is_not_asked_again(server: Server, status: int):
    server.script = [refusal(status, "no, because")]
    with pytest.raises(RefusedError, match="no, because") as caught:
        server.cluster(60).get(CONFIGMAP, "settings")
    assert caught.value.status == status


def test_a_server_that_has_not_read_its_roles_yet_is_outlasted(server: Server):
    server.script = [FOUND, refusal(403, "User launcher cannot get resource configmaps"), FOUND]
    cluster = server.cluster(60)
    assert cluster.get(CONFIGMAP, "settings") == cluster.get(CONFIGMAP, "settings") == FOUND[2]


def test_what_is_not_there_is_none(server: Server):
    server.script = [refusal(404, "not found")]
    assert server.cluster(60).get(CONFIGMAP, "settings") is None


def test_an_outage_that_lasts_names_the_server(server: Server):
    server.script = [refusal(503, "shutting down")] * 9
    with pytest.raises(RefusedError, match="shutting down"):
        server.cluster(1).get(CONFIGMAP, "settings")
    gone = server.cluster(0)
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(RefusedError, match=r"API server at http://127\.0\.0\.1:\d+ does not answer"):
        gone.get(CONFIGMAP, "settings")


@pytest.mark.parametrize("trouble", [refusal(410, "too old resource version"), refusal(429, "too many requests"), None])
def test_every_trouble_of_a_watch_is_a_wake_up(server: Server, trouble: Any):
    server.script = [trouble]
    server.cluster(0).changed(JOB, "", "1", timeout_s=5)
    assert "watch=true" in server.asked[0]
