"""A closed network lets nothing out of a process, nor out of its workers, but to where Runtime allows it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from jobs.session import runtime_from
from pipeline.errors import UserError
from pipeline.network import OFFLINE, address_of, allowed
from pipeline.runtime import Runtime
from pipeline.study import ModelName, parse
from tests.runs import ROOT

FOREIGN = "198.51.100.7"
"""An address that belongs to nobody (RFC 5737)."""


def closed(code: str, **settings: str) -> str:
    """What `code` prints in a process of its own whose network is closed; `refused(call)` there prints whether the guard stopped it."""
    given = {"DATADOSE_NETWORK": "closed", **{f"DATADOSE_{name.upper()}": value for name, value in settings.items()}}
    head = """
        import os, socket
        from jobs.session import runtime_from
        from pipeline.network import NetworkClosedError, enforce

        def refused(call, *arguments):
            try:
                call(*arguments)
            except NetworkClosedError as error:
                print("refused", error)
            except OSError as error:
                print("tried", type(error).__name__)
            else:
                print("reached")

        runtime = runtime_from(os.environ)
        enforce(runtime)
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DATADOSE_")}
    command = [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code)]
    run = subprocess.run(command, cwd=ROOT, env={**kept, "RAY_ADDRESS": "", **given}, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.fast
def test_foreign_address_and_name_are_refused_before_a_byte_is_sent_and_loopback_is_not():
    out = closed(f"""
        refused(socket.create_connection, ("{FOREIGN}", 80), 1)
        refused(socket.create_connection, ("example.invalid", 80), 1)
        refused(socket.gethostbyname, "example.invalid")
        refused(socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto, b"x", ("{FOREIGN}", 53))
        refused(socket.socket(socket.AF_INET6).connect, ("::ffff:{FOREIGN}", 80))
        with socket.create_server(("127.0.0.1", 0)) as server:
            refused(socket.create_connection, server.getsockname(), 5)
            refused(socket.create_connection, ("localhost", server.getsockname()[1]), 5)
    """).splitlines()
    assert [line.split()[0] for line in out] == ["refused"] * 5 + ["reached"] * 2
    assert FOREIGN in out[0]
    assert "DATADOSE_ALLOWED_HOSTS" in out[0]


@pytest.mark.fast
def test_endpoint_of_runtime_and_allowed_hosts_and_networks_are_let_through():
    out = closed(
        """
        for host in ("127.1.2.3", "10.9.8.7", "198.51.100.7", "10.10.0.1"):
            connection = socket.socket()
            connection.settimeout(0.01)
            refused(connection.connect, (host, 9))
        """,
        allowed_hosts="10.9.0.0/16, example.org",
        endpoint_url=f"http://{FOREIGN}:8000/v1",
    ).splitlines()
    assert [line.split()[0] == "refused" for line in out] == [False, False, False, True]


@pytest.mark.fast
def test_http_library_of_a_closed_process_is_told_and_not_let_out():
    out = closed("""
        import aiohttp, asyncio
        async def main():
            async with aiohttp.ClientSession() as client:
                try:
                    await client.get("http://example.invalid/")
                except aiohttp.ClientConnectorError as error:
                    print("DATADOSE_NETWORK=closed" in str(error.os_error))
        asyncio.run(main())
    """)
    assert out.strip() == "True"


@pytest.mark.fast
def test_every_offline_switch_is_set_in_a_closed_process_and_none_in_an_open_one():
    shown = "print(*sorted(name for name, value in __import__('pipeline.network').network.OFFLINE.items() if os.environ.get(name) == value))"
    assert closed(shown).split() == sorted(OFFLINE)
    before = {name: os.environ.get(name) for name in OFFLINE}
    from pipeline.network import enforce

    enforce(Runtime())
    assert {name: os.environ.get(name) for name in OFFLINE} == before


def test_worker_of_a_closed_run_is_closed_too():
    out = closed(f"""
        import ray
        from pipeline.stages.workers import ensure_ray, worker_environment

        ensure_ray(runtime)

        @ray.remote
        def reach():
            try:
                socket.create_connection(("{FOREIGN}", 80), 1)
            except OSError as error:
                return str(error), os.environ.get("HF_HUB_OFFLINE")

        print(*ray.get(reach.options(runtime_env=worker_environment({{}}, 1)).remote()))
        ray.shutdown()
    """)
    assert "outside the closed network" in out
    assert out.split()[-1] == "1"


@pytest.mark.fast
def test_endpoint_that_only_a_study_names_must_be_allowed_in_a_closed_network():
    groq, own = ModelName.parse("groq/any"), ModelName.parse("openai-compatible/any")
    runtime = Runtime(network="closed", endpoint_url="https://models.example.org/v1")
    assert allowed(own, runtime)
    assert not allowed(groq, runtime)
    assert allowed(groq, runtime.model_copy(update={"allowed_hosts": ("api.groq.com",)}))
    assert allowed(groq, Runtime())


@pytest.mark.fast
def test_model_behind_an_endpoint_without_an_address_raises_user_error():
    with pytest.raises(UserError, match="DATADOSE_ENDPOINT_URL"):
        address_of(ModelName.parse("openai-compatible/any"), Runtime())
    assert address_of(ModelName.parse("groq/any"), Runtime()) == "https://api.groq.com/openai/v1"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("endpoint_url", "models.example.org", "https://host/v1"),
        ("endpoint_url", "ftp://models.example.org/v1", "https://host/v1"),
        ("allowed_hosts", "http://models.example.org", "no scheme"),
        ("network", "shut", "'open' or 'closed'"),
        ("endpoint_attempts", "0", "greater than 0"),
    ],
)
def test_setting_that_cannot_be_meant_raises_user_error_that_shows_it(field: str, value: str, wanted: str):
    with pytest.raises(UserError, match=wanted) as error:
        parse(Runtime, {field: value}, "environment")
    assert value in str(error.value)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DATADOSE_ENDPOINT_URL", "https://me:sk-canary-123@host/v1"),
        ("DATADOSE_ENDPOINT_URL", "https://host/v1?key=sk-canary-123"),
        ("DATADOSE_ENDPOINT_KEY_NAME", "sk-canary-123"),
        ("DATADOSE_ENDPOINT_KEY_NAME", "gsk_canary123"),
    ],
)
def test_key_put_where_none_belongs_is_refused_without_being_shown(variable: str, value: str):
    with pytest.raises(UserError) as error:
        runtime_from({variable: value})
    assert "canary" not in str(error.value)


@pytest.mark.fast
def test_allowed_hosts_are_a_list_with_commas():
    assert runtime_from({"DATADOSE_ALLOWED_HOSTS": "a.example, 10.0.0.0/8,"}).allowed_hosts == ("a.example", "10.0.0.0/8")
