"""One control plane for all tests here; without its programs they are skipped on a laptop and fail in CI."""

from __future__ import annotations

import base64
import os
import secrets
from collections.abc import Iterator

import pytest

from jobs.cluster import JOB, RAYJOB, Cluster, setup
from pipeline.artifacts import Store, open_store
from tests.conftest import REGION, S3Server, started_ray
from tests.k8s.control_plane import ControlPlane, running
from tests.k8s.pods import Pods
from tests.k8s.tools import PROGRAMS, folder, program
from tests.tools import MissingToolError

CANARIES = {"store": f"canary-{secrets.token_hex(12)}", "endpoints": f"sk-canary-{secrets.token_hex(12)}"}
"""Secrets that must not be found anywhere but in Secrets."""


@pytest.fixture(scope="session")
def kustomize() -> None:
    """kustomize, or kubectl, on the PATH."""
    try:
        os.environ["PATH"] = f"{program('kustomize').parent}:{os.environ['PATH']}"
    except MissingToolError:
        from shutil import which

        if not which("kubectl"):
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("neither kubectl nor kustomize is here; `make k8s-tools` builds the latter")


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory, kustomize: None) -> Iterator[ControlPlane]:
    try:
        for name in PROGRAMS:
            program(name)
    except MissingToolError as error:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(str(error))
    assert folder()
    with running(tmp_path_factory.mktemp("plane")) as started:
        yield started


def secret(cluster: Cluster, name: str, **data: str) -> None:
    encoded = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}
    path = f"/api/v1/namespaces/{cluster.namespace}/secrets/{name}"
    body = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": cluster.namespace}, "data": encoded}

    cluster.request("PATCH", path, {"fieldManager": "test", "force": "true"}, body, "application/apply-patch+yaml")


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty store's address on a real S3 server; this process has its keys."""
    import boto3

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server.endpoint_url)
    name = f"test-{secrets.token_hex(6)}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}/runs"


@pytest.fixture
def store(bucket: str) -> Store:
    return open_store(bucket)


@pytest.fixture
def laptop(plane: ControlPlane, bucket: str, s3_server: S3Server) -> Iterator[Cluster]:
    """A cluster that is set up with the overlay `laptop`, an empty store and the store's keys; empty again afterwards."""
    yield from _set_up(plane, "laptop", bucket, s3_server)


@pytest.fixture
def queued(plane: ControlPlane, bucket: str, s3_server: S3Server) -> Iterator[Cluster]:
    """The same with the overlay `kueue`."""
    yield from _set_up(plane, "kueue", bucket, s3_server)


def settle_store(cluster: Cluster, bucket: str, server: S3Server) -> None:
    """What a user writes into settings.yaml."""
    here = {"DATADOSE_STORE": bucket, "AWS_ENDPOINT_URL_S3": server.endpoint_url, "AWS_DEFAULT_REGION": REGION}
    path = "/api/v1/namespaces/datadose/configmaps/settings"
    cluster.request("PATCH", path, body={"data": here}, content="application/merge-patch+json")


def _set_up(plane: ControlPlane, overlay: str, bucket: str, server: S3Server) -> Iterator[Cluster]:
    cluster = plane.cluster()
    setup(cluster, overlay, lambda _: None)
    settle_store(cluster, bucket, server)
    secret(cluster, "store", AWS_ACCESS_KEY_ID=server.access_key, AWS_SECRET_ACCESS_KEY=server.secret_key, CANARY=CANARIES["store"])
    secret(cluster, "endpoints", OPENAI_API_KEY=CANARIES["endpoints"])
    yield cluster
    clear(plane, cluster)


def clear(plane: ControlPlane, cluster: Cluster) -> None:
    for kind in (JOB, RAYJOB, ("apps/v1", "Deployment")):
        for item in cluster.items(kind):
            cluster.delete(kind, item["metadata"]["name"])
    plane.wait_for(lambda: not cluster.items(RAYJOB) and not cluster.items(JOB) and not cluster.items(("v1", "Pod")), "an empty namespace")


@pytest.fixture(scope="session")
def pods_ray(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray cluster whose workers have the store's keys, as KubeRay's pods have them."""
    keys = {"AWS_ACCESS_KEY_ID": s3_server.access_key, "AWS_SECRET_ACCESS_KEY": s3_server.secret_key}
    with started_ray(tmp_path_factory.mktemp("ray"), **keys, AWS_DEFAULT_REGION=REGION, AWS_ENDPOINT_URL_S3=s3_server.endpoint_url) as (address, _):
        yield address


@pytest.fixture
def pods(plane: ControlPlane, laptop: Cluster, pods_ray: str) -> Iterator[Pods]:
    """The player of the pods; a test says which stages it plays."""
    played = Pods(plane, pods_ray)
    yield played
    played.close()
