"""What tests share: stores (a folder, S3 in this process, a real S3 server), a Ray cluster, a browser."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import psutil
import pytest
from filelock import FileLock
from hypothesis import settings

from pipeline.artifacts import Store, open_store
from tests.runs import ROOT, SMALL, datadose, environment, tables
from tests.tools import MissingToolError, versitygw

# The same examples on every machine, however slow it is; no folder of past failures in the tree.
settings.register_profile("datadose", max_examples=50, deadline=None, derandomize=True, database=None)
settings.load_profile("datadose")

LONG_FIRST = (
    "test_crash.py", "test_studies.py", "test_endpoint_runs.py", "test_training_shared.py", "test_leaks.py", "test_report_page.py",
    "test_rehearsal.py", "test_batches.py", "test_verdict_statistics.py", "test_trainers.py", "test_budget.py", "test_engines.py", "test_bench.py",
)  # fmt: skip
REGION = "us-east-1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: two processes share the files, and neither shall begin a long one when the other is done."""
    place = {name: index for index, name in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@dataclass(frozen=True)
class S3Server:
    endpoint_url: str
    access_key: str
    secret_key: str


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server on a loopback port with an empty folder behind it."""
    try:
        program = versitygw()
    except MissingToolError as error:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(str(error))
    folder = tmp_path_factory.mktemp("versitygw")
    for part in ("buckets", "metadata"):
        (folder / part).mkdir()
    port = _free_port()
    server = S3Server(f"http://127.0.0.1:{port}", secrets.token_hex(10).upper(), secrets.token_hex(20))
    environment = os.environ | {"ROOT_ACCESS_KEY": server.access_key, "ROOT_SECRET_KEY": server.secret_key}
    # Metadata beside the objects: not every file system that holds a temporary folder has extended attributes.
    command = [program, "--quiet", "--port", f"127.0.0.1:{port}", "--region", REGION, "posix", "--sidecar", folder / "metadata", folder / "buckets"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        _await_answer(process, port, folder / "log")
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_answer(process: subprocess.Popen[bytes], port: int, log: Path, tries: int = 300) -> None:
    for _ in range(tries):
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/")
            connection.getresponse().read()
            return
        except (OSError, HTTPException):
            try:
                process.wait(0.1)  # the pause between two tries, which the server's end cuts short
            except subprocess.TimeoutExpired:
                continue
            break
        finally:
            connection.close()
    pytest.fail(f"versitygw does not answer on port {port}:\n{log.read_text(encoding='utf-8', errors='replace')[-2000:]}")


def _use_s3(monkeypatch: pytest.MonkeyPatch, access_key: str, secret_key: str, endpoint_url: str | None) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret_key)
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    if endpoint_url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint_url)


def _bucket() -> str:
    import boto3

    name = f"test-{secrets.token_hex(6)}"
    boto3.client("s3").create_bucket(Bucket=name)
    return name


FOLDER = pytest.param("folder", marks=pytest.mark.fast)
MOTO = pytest.param("moto", marks=pytest.mark.fast)
VERSITYGW = pytest.param("versitygw")


@pytest.fixture(params=[FOLDER, MOTO, VERSITYGW])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An empty store; a test that is not for all kinds parametrizes it indirectly."""
    if request.param == "folder":
        yield open_store(str(tmp_path / "store"))
    elif request.param == "moto":
        from moto import mock_aws

        _use_s3(monkeypatch, "testing", "testing", None)
        with mock_aws():
            yield open_store(f"s3://{_bucket()}/runs")
    else:
        server: S3Server = request.getfixturevalue("s3_server")
        _use_s3(monkeypatch, server.access_key, server.secret_key, server.endpoint_url)
        yield open_store(f"s3://{_bucket()}/runs")


@dataclass(frozen=True)
class RayCluster:
    """address: to attach to. crash: environment of a run that is to die where the file `control` says (tests/crash)."""

    address: str
    control: Path
    crash: dict[str, str]
    pid: int

    def settled(self) -> None:
        """Wait until the workers of runs that were killed are gone: one that Ray had started anew would go on for a moment."""
        while workers := [child for child in psutil.Process(self.pid).children(recursive=True) if "Worker" in _name(child)]:
            psutil.wait_procs(workers, timeout=60)


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A Ray cluster of the tests' own: runs attach to it in a second instead of starting one each."""
    folder = tmp_path_factory.mktemp("ray")
    crash = {"PYTHONPATH": str(ROOT / "tests" / "crash"), "CRASH_CONTROL": str(folder / "control")}
    with started_ray(folder, **crash) as (address, pid):
        yield RayCluster(address, folder / "control", crash, pid)


@contextlib.contextmanager
def started_ray(folder: Path, **extra: str) -> Iterator[tuple[str, int]]:
    """Address and process of a Ray cluster whose workers have this environment.

    Without tokens, which embedded ones turn on: whether to send one is read when Ray is imported, before the runs are forked.
    """
    code = (
        "import ray, sys; context = ray.init(num_cpus=4, include_dashboard=False, object_store_memory=128 * 2**20, log_to_driver=False,"
        "_node_ip_address='127.0.0.1'); print(context.address_info['gcs_address'], flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment(folder, RAY_AUTH_MODE="disabled", **extra)
        )
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process.pid
        process.communicate("")


@pytest.fixture(scope="session")
def ray_address(ray_cluster: RayCluster) -> str:
    return ray_cluster.address


@pytest.fixture(scope="session")
def small_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, small_study: Path, ray_address: str) -> Path:
    """The store of the small study after a run that nothing befell: one for all processes of the tests, to look at or to copy."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    store, done = folder / "finished", folder / "finished.done"
    with FileLock(folder / "finished.lock"):
        if not done.exists():
            assert datadose("run", small_study, store=store, RAY_ADDRESS=ray_address).returncode == 0
            done.touch()
    return store


@pytest.fixture(scope="session")
def undisturbed(finished: Path) -> dict[str, object]:
    """Every table of the small study after a run that nothing befell."""
    return tables(finished)


@pytest.fixture(scope="session")
def chromium() -> str:
    """A browser for the report."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no chromium on the PATH: install it to look at the report as a user would")
    return str(found)
