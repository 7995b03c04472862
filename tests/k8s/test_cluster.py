"""Studies on a real control plane (see control_plane.py for what is simulated: nodes, and Ray's dashboard)."""

from __future__ import annotations

import copy
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from kubernetes.config import incluster_config

from jobs.cluster import CONFIGMAP, EVENT, JOB, POD, RAYJOB, WORKLOAD, Cluster, RefusedError, cancel, connect, drive, setup, submit, under_way
from jobs.cluster_doctor import diagnose
from jobs.manifests import (
    STAGE_LABEL,
    STUDY_LABEL,
    image_of,
    instantiate,
    is_template,
    jobs_for,
    object_name,
    pod_templates,
    render,
    stage_of,
    study_config,
    study_id,
)
from jobs.session import plan_of
from pipeline.artifacts import Store, done_keys, read_manifest
from pipeline.errors import UserError
from pipeline.plan import STAGES, Plan
from tests.conftest import S3Server
from tests.k8s.conftest import CANARIES, clear, settle_store
from tests.k8s.control_plane import ControlPlane
from tests.k8s.pods import Pods
from tests.runs import ROOT, tables

pytestmark = [pytest.mark.k8s, pytest.mark.timeout(600)]

Object = dict[str, Any]
RAY_STAGES = {"synthesize", "train", "generate", "judge"}


@pytest.fixture(scope="session")
def small(small_study: Path) -> Plan:
    return plan_of(str(small_study))


@pytest.fixture
def sa_cluster(plane: ControlPlane, laptop: Cluster) -> Cluster:
    """The cluster as the launcher inside sees it."""
    return plane.as_account("launcher")


def wait_for(plane: ControlPlane, found: Callable[[], Any], what: str, timeout_s: float = 180) -> Any:
    return plane.wait_for(found, what, timeout_s)


def ended(cluster: Cluster, plan: Plan, stage: str = "grid") -> str | None:
    found = cluster.get(JOB, object_name(plan, stage))
    state = cluster.state(found) if found else None
    return state.phase if state and state.ended else None


def datadose(plane: ControlPlane, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line as a user types it, with a kubeconfig of the cluster."""
    environment = {**os.environ, "KUBECONFIG": str(plane.kubeconfig), "DATADOSE_CACHE": str(plane.folder / "cache")}
    return subprocess.run([sys.executable, "-m", "jobs.cli", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)


# ---------------------------------------------------------------- what the server admits


@pytest.mark.parametrize("overlay", ["laptop", "gpu", "kueue", "onprem"])
def test_every_object_of_an_overlay_and_every_pod_is_admitted(plane: ControlPlane, small: Plan, overlay: str):
    cluster = plane.cluster()
    setup(cluster, overlay, lambda _: None)
    cluster.apply(study_config(small, cluster.namespace))
    try:
        for item in render(overlay):
            if is_template(item):
                made = cluster.apply(instantiate(item, small), dry_run=True)
                for index, template in enumerate(pod_templates(made)):
                    # As a bare pod, since only pods meet the restricted standard, quotas and priority classes.
                    metadata = {"name": f"{stage_of(item)}-{index}", "namespace": "datadose"}
                    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {**template["spec"], "restartPolicy": "Never"}}
                    cluster.apply(pod, dry_run=True)
        if overlay == "onprem":
            servers = wait_for(plane, lambda: len(found := running(cluster, "datadose/server")) == 2 and found, "the servers' pods")
            assert sorted(gpus(pod) for pod in servers) == [1, 4]
    finally:
        clear(plane, cluster)


NEWER_CRDS = Path(os.environ.get("KUBERAY_CRDS", ROOT.parent / "shared" / "crds")) / "kuberay-v1.7.0" / "ray.io_rayjobs.yaml"


@pytest.mark.skipif(not NEWER_CRDS.is_file(), reason="KubeRay 1.7's definitions are not beside this folder (KUBERAY_CRDS names another place)")
def test_the_rayjobs_of_all_overlays_fit_the_schema_of_kuberay_17(plane: ControlPlane, small: Plan):
    """The operator of 1.7 cannot be had as a Go module; its definition can be tried, under a name of its own beside the one of 1.6."""
    cluster = plane.cluster()
    definition = yaml.load(NEWER_CRDS.read_text(), yaml.CSafeLoader)
    definition["metadata"]["name"] = "newerrayjobs.ray.io"
    definition["spec"]["names"] = {"kind": "NewerRayJob", "listKind": "NewerRayJobList", "plural": "newerrayjobs", "singular": "newerrayjob"}
    cluster.apply(definition)
    plane.wait_for(lambda: _known(cluster, "/apis/ray.io/v1/namespaces/datadose/newerrayjobs"), "the definition in force")
    setup(cluster, "laptop", lambda _: None)
    for overlay in ("laptop", "gpu", "kueue", "onprem"):
        for item in render(overlay):
            if item["kind"] == "RayJob":
                made = {**instantiate(item, small), "kind": "NewerRayJob"}
                path = f"/apis/ray.io/v1/namespaces/datadose/newerrayjobs/{made['metadata']['name']}"
                query = {"fieldManager": "test", "fieldValidation": "Strict", "dryRun": "All"}
                cluster.request("PATCH", path, query, made, "application/apply-patch+yaml")
    cluster.delete(("apiextensions.k8s.io/v1", "CustomResourceDefinition"), "newerrayjobs.ray.io")


def _known(cluster: Cluster, path: str) -> bool:
    try:
        return bool(cluster.request("GET", path))
    except RefusedError:
        return False


def running(cluster: Cluster, labels: str) -> list[Object]:
    return [pod for pod in cluster.items(POD, labels) if pod.get("status", {}).get("phase") == "Running"]


def gpus(pod: Object) -> int:
    return sum(int(container["resources"].get("limits", {}).get("nvidia.com/gpu", 0)) for container in pod["spec"]["containers"])


def test_a_pod_that_the_restricted_standard_forbids_is_refused(laptop: Cluster):
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "root", "namespace": "datadose"}}
    with pytest.raises(RefusedError, match="violates PodSecurity"):
        laptop.apply({**pod, "spec": {"containers": [{"name": "root", "image": "datadose/core:0"}]}}, dry_run=True)


def test_a_field_that_no_schema_knows_is_refused(laptop: Cluster, small: Plan):
    template = instantiate(laptop.templates()["train"], small)
    template["spec"]["preRunningDeadlineSecond"] = 5
    with pytest.raises(RefusedError, match="preRunningDeadlineSecond"):
        laptop.apply(template, dry_run=True)


@pytest.mark.parametrize(("overlay", "study"), [("gpu", "paper"), ("onprem", "onprem")])
def test_the_operator_makes_the_pods_that_we_meant(plane: ControlPlane, overlay: str, study: str):
    cluster, plan = plane.cluster(), plan_of(study)
    setup(cluster, overlay, lambda _: None)
    cluster.apply(study_config(plan, cluster.namespace))
    jobs = jobs_for(cluster.templates(), plan)
    try:
        for stage in RAY_STAGES:
            cluster.apply(jobs[stage])
        for stage in RAY_STAGES:
            labels = f"{STUDY_LABEL},{STAGE_LABEL}={stage}"
            pods = wait_for(plane, lambda labels=labels: len(found := running(cluster, labels)) == 6 and found, f"head, workers and submitter of {stage}")
            item = cluster.get(RAYJOB, object_name(plan, stage))
            assert item is not None
            assert cluster.state(item).phase == "running", item["status"]
            kinds = sorted(pod["metadata"]["labels"].get("ray.io/node-type", "submitter") for pod in pods)
            assert kinds == ["head", "submitter", "worker", "worker", "worker", "worker"]
            asks = overlay == "onprem" and stage in ("synthesize", "judge")  # the servers, which have GPUs of their own
            for pod in pods:
                kind, container = pod["metadata"]["labels"].get("ray.io/node-type", "submitter"), pod["spec"]["containers"][0]
                assert {each["image"] for each in (*pod["spec"]["containers"], *pod["spec"].get("initContainers", ()))} == {image_of(jobs[stage])}
                assert gpus(pod) == (kind == "worker" and not asks)
                assert pod["spec"]["serviceAccountName"] == "stage"
                assert pod["spec"]["priorityClassName"] == "datadose"
                assert not any(volume["name"].startswith("kube-api-access") for volume in pod["spec"].get("volumes", ()))
                (token,) = (entry for entry in container["env"] if entry["name"] == "RAY_AUTH_TOKEN")
                assert "secretKeyRef" in token["valueFrom"]  # Ray's own token, by reference
                assert pod["spec"]["nodeName"].startswith("gpu" if gpus(pod) else "cpu")
    finally:
        clear(plane, cluster)


# ---------------------------------------------------------------- whole studies


def test_a_whole_study_runs_as_jobs_in_order_and_leaves_no_secret_anywhere(
    plane: ControlPlane, laptop: Cluster, pods: Pods, store: Store, bucket: str, tmp_path: Path
):
    plan = plan_of("laptop", rehearse=True)
    pods.playing |= {"grid", *STAGES}
    first = datadose(plane, "submit", "laptop", "--rehearse", "--context", "test")
    assert first.returncode == 0, first.stderr
    wait_for(plane, lambda: laptop.get(RAYJOB, object_name(plan, "synthesize")), "the first stage's job")
    second = datadose(plane, "submit", "laptop", "--rehearse", "--context", "test")
    assert "under way already" in second.stdout
    assert len(laptop.items(JOB, f"{STAGE_LABEL}=grid")) == 1
    phase = wait_for(plane, lambda: ended(laptop, plan), "the study's end", 400)
    assert phase == "succeeded", pods.printed("grid")
    assert [stage for stage, _ in pods.started] == ["grid", *STAGES]
    assert done_keys(store) == {step.key for step in plan.steps}

    status = datadose(plane, "status", "laptop", "--rehearse", "--context", "test")
    assert f"train       {len(plan.stage('train'))}/{len(plan.stage('train'))} steps done" in status.stdout
    assert "launcher    succeeded" in status.stdout
    assert status.stdout.count("(RayJob ") == len(RAY_STAGES)
    assert status.stdout.count("(Job ") == 3
    report = datadose(plane, "report", "laptop", "--rehearse", "--context", "test", "--out", str(tmp_path / "report"))
    assert report.returncode == 0, report.stderr
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
    logs = datadose(plane, "logs", "laptop", "--rehearse", "--context", "test")
    assert logs.stdout == "a line of a pod's log\n"  # kwok's pods print this

    again = datadose(plane, "submit", "laptop", "--rehearse", "--context", "test")
    assert "is submitted" in again.stdout
    wait_for(plane, lambda: len(pods.started) == len(STAGES) + 2 and ended(laptop, plan), "the second run's end")
    assert pods.started[-1][0] == "grid"  # and no stage: all was done

    _no_canaries(plane, laptop, pods, store)
    datadose(plane, "cancel", "laptop", "--rehearse", "--context", "test")
    wait_for(plane, lambda: not laptop.items(RAYJOB) and not laptop.items(JOB), "an empty namespace")
    assert "nothing of laptop-rehearsal is on this cluster" in datadose(plane, "status", "laptop", "--rehearse", "--context", "test").stdout


def _no_canaries(plane: ControlPlane, cluster: Cluster, pods: Pods, store: Store) -> None:
    kinds = (JOB, RAYJOB, POD, EVENT, CONFIGMAP, ("ray.io/v1", "RayCluster"), ("v1", "Service"))
    places = {str(kind): json.dumps(cluster.items(kind)) for kind in kinds}
    places |= {path.name: path.read_text(errors="replace") for path in (*plane.folder.glob("*.log"), *pods.output.iterdir())}
    places |= {key: store.read(key).decode(errors="replace") for key in store.list("")}
    assert len(places) > 50
    for place, text in places.items():
        for canary in CANARIES.values():
            assert canary not in text, f"a secret is in {place}"


def make(plane: ControlPlane, *arguments: str) -> str:
    """A target of the Makefile as a user types it, in the environment that the tests run in."""
    command = ["make", *arguments, "CONTEXT=test", f"BIN={Path(sys.executable).parent}", "--old-file=env"]
    environment = {**os.environ, "KUBECONFIG": str(plane.kubeconfig), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_make_grid_submits_its_log_is_followed_and_a_cancelled_study_goes_on_where_it_was(
    plane: ControlPlane, laptop: Cluster, pods: Pods, store: Store, bucket: str, s3_server: S3Server, small: Plan, small_study: Path
):
    pods.playing |= {"grid", "synthesize", "subset"}
    assert "ConfigMap templates: generate, grid, judge, report" in make(plane, "cluster", "OVERLAY=laptop").replace(".json", "")
    settle_store(laptop, bucket, s3_server)
    assert f"small is submitted: Job {object_name(small, 'grid')}" in make(plane, "grid", f"STUDY={small_study}")
    wait_for(plane, lambda: running(laptop, f"{STAGE_LABEL}=train"), "pods of the training")
    _follow_the_log(plane, small_study)
    cancel(laptop, small, lambda _: None)
    wait_for(plane, lambda: not any(laptop.items(kind) for kind in (JOB, RAYJOB, POD)), "an empty namespace")
    kept = done_keys(store)
    assert {key.partition("/")[0] for key in kept} == {"synthesize", "subset"}

    before = len(pods.started)
    pods.playing |= set(STAGES)
    submit(laptop, small, lambda _: None)
    assert wait_for(plane, lambda: ended(laptop, small), "the study's end", 300) == "succeeded", pods.printed("grid")
    assert [stage for stage, _ in pods.started[before:]] == ["grid", "train", "generate", "judge", "report"]
    assert kept < done_keys(store)


def _follow_the_log(plane: ControlPlane, study: Path) -> None:
    log, kept = plane.folder / "pod.log", (plane.folder / "pod.log").read_text()
    command = [sys.executable, "-m", "jobs.cli", "logs", str(study), "--context", "test", "-f"]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "KUBECONFIG": str(plane.kubeconfig)}, stdout=subprocess.PIPE, text=True) as following:
        try:
            assert following.stdout is not None
            assert following.stdout.readline() == "a line of a pod's log\n"
            with log.open("a") as file:
                file.write(kept.replace("a line", "another line"))
            assert following.stdout.readline() == "another line of a pod's log\n"
        finally:
            following.terminate()
            log.write_text(kept)


def test_a_rayjob_deleted_by_hand_ends_the_study_and_says_so_also_where_the_store_is_out_of_reach(
    plane: ControlPlane, laptop: Cluster, pods: Pods, small: Plan, small_study: Path, monkeypatch: pytest.MonkeyPatch
):
    pods.playing |= {"grid", "synthesize", "subset"}
    submit(laptop, small, lambda _: None)
    wait_for(plane, lambda: running(laptop, f"{STAGE_LABEL}=train"), "pods of the training")
    laptop.delete(RAYJOB, object_name(small, "train"))
    assert wait_for(plane, lambda: ended(laptop, small), "the launcher's end") == "failed"
    (line,) = [line for line in under_way(laptop, small) if line.startswith("launcher")]
    assert f"RayJob {object_name(small, 'train')} was deleted while it ran" in line
    assert "another submit goes on from there" in line
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    far = datadose(plane, "status", str(small_study), "--context", "test")
    assert far.returncode == 0
    assert "cannot be used from here" in far.stdout
    assert "was deleted while it ran" in far.stdout
    assert datadose(plane, "report", str(small_study), "--context", "test").stderr.startswith("the store s3://")


def test_a_restart_of_the_api_server_and_a_launcher_that_moves_are_outlasted(plane: ControlPlane, laptop: Cluster, pods: Pods, small: Plan):
    pods.playing |= {"grid", "synthesize", "subset"}
    submit(laptop, small, lambda _: None)
    wait_for(plane, lambda: running(laptop, f"{STAGE_LABEL}=train"), "pods of the training")
    plane.stop("kube-apiserver")
    plane.start_api()
    (launcher,) = running(laptop, f"{STAGE_LABEL}=grid")
    laptop.delete(POD, launcher["metadata"]["name"])  # as a node that is drained does
    pods.playing |= set(STAGES)
    assert wait_for(plane, lambda: ended(laptop, small), "the study's end", 300) == "succeeded", pods.printed("grid")
    assert sorted(stage for stage, _ in pods.started) == sorted(["grid", "grid", *STAGES])  # each stage once


def test_attempts_that_overlap_leave_one_result(
    plane: ControlPlane, laptop: Cluster, pods: Pods, store: Store, small: Plan, undisturbed: dict[str, object], s3_server: S3Server, tmp_path: Path
):
    """KubeRay gives a RayJob up whose process lives on, and starts it anew: two of them commit into one store."""
    pods.playing |= {"grid", *STAGES}
    pods.fail_first = {"synthesize", "train"}
    submit(laptop, small, lambda _: None)
    assert wait_for(plane, lambda: ended(laptop, small), "the study's end", 400) == "succeeded", pods.printed("grid")
    assert [stage for stage, _ in pods.started] == ["grid", "synthesize", "synthesize", "subset", "train", "train", "generate", "judge", "report"]
    assert pods.overlapped == {"synthesize", "train"}
    assert pods.woken() == {"synthesize": 0, "train": 0}  # each has found its steps committed, by itself or by the other
    for key in store.list(""):
        target = tmp_path / "copy" / key
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(store.read(key))
    found = tables(tmp_path / "copy")
    assert found.keys() == undisturbed.keys()
    assert found == undisturbed
    for step in small.steps:
        assert read_manifest(store, step) is not None


# ---------------------------------------------------------------- what goes wrong, and the sentence that says it


def said(plane: ControlPlane, cluster: Cluster, plan: Plan, template: Object, words: str) -> str:
    """The line about a stage's job once it holds these words."""
    item = cluster.apply(instantiate(template, plan))
    kind, name = (item["apiVersion"], item["kind"]), item["metadata"]["name"]

    def look() -> str | None:
        found = cluster.get(kind, name)
        assert found is not None
        state = cluster.state(found)
        text = f"{state.phase}: {state.reason} {cluster.explain(found)}"
        return text if words in text else None

    return str(wait_for(plane, look, f"{words!r} about {name}"))


@pytest.fixture
def train(laptop: Cluster) -> Object:
    return copy.deepcopy(laptop.templates()["train"])


def test_a_rayjob_that_the_operator_refuses_has_failed(plane: ControlPlane, sa_cluster: Cluster, small: Plan, train: Object):
    train["spec"]["rayClusterSpec"]["rayVersion"] = "2.40.0"
    text = said(plane, sa_cluster, small, train, "refuses it")
    assert text.startswith("failed: KubeRay's operator refuses it")
    assert "minimum Ray version is 2.52.0" in text
    reason = sa_cluster.run_stage(instantiate({**train, "spec": train["spec"] | {"activeDeadlineSeconds": 9000}}, small), lambda _: None)
    assert reason is not None
    assert "minimum Ray version is 2.52.0" in reason


def test_gpus_that_no_node_has_are_named(plane: ControlPlane, sa_cluster: Cluster, small: Plan, train: Object):
    container = train["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    for part in ("requests", "limits"):
        container["resources"][part]["nvidia.com/gpu"] = "9"
    text = said(plane, sa_cluster, small, train, "Insufficient nvidia.com/gpu")
    assert text.startswith("waiting")
    assert "has no node" in text
    assert "event FailedScheduling" in text


def test_an_image_that_does_not_exist_is_named(plane: ControlPlane, sa_cluster: Cluster, small: Plan, train: Object):
    for pod in pod_templates(train):
        pod["spec"]["containers"][0]["image"] = "registry.example/datadose/no-such-image:1"
    text = said(plane, sa_cluster, small, train, "ImagePullBackOff")
    assert text.startswith("waiting")
    assert "registry.example/datadose/no-such-image:1" in text
    assert "event Failed" in text


def test_a_quota_that_stops_a_rayjobs_pods_is_named(plane: ControlPlane, laptop: Cluster, sa_cluster: Cluster, small: Plan, train: Object):
    with quota(plane, laptop, pods="0"):
        text = said(plane, sa_cluster, small, train, "exceeded quota")
    assert text.startswith("waiting")
    assert "tight" in text


def test_a_quota_that_stops_a_job_is_named_and_the_stage_starts_once_it_is_raised(plane: ControlPlane, laptop: Cluster, pods: Pods, small: Plan):
    pods.playing |= {"grid", *STAGES}
    with quota(plane, laptop, **{"count/rayjobs.ray.io": "0"}):
        submit(laptop, small, lambda _: None)
        wait_for(plane, lambda: "exceeded quota: tight" in pods.printed("grid"), "the launcher's word about the quota")
        assert laptop.get(RAYJOB, object_name(small, "synthesize")) is None
    wait_for(plane, lambda: laptop.get(RAYJOB, object_name(small, "synthesize")), "the stage's job")


class quota:  # noqa: N801  # read as a word of the test
    def __init__(self, plane: ControlPlane, cluster: Cluster, **hard: str) -> None:
        self._plane, self._cluster, self._hard = plane, cluster, hard

    def __enter__(self) -> None:
        metadata = {"name": "tight", "namespace": self._cluster.namespace}
        self._cluster.apply({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata, "spec": {"hard": self._hard}})
        self._plane.wait_for(lambda: (self._cluster.get(("v1", "ResourceQuota"), "tight") or {}).get("status", {}).get("hard"), "the quota in force")

    def __exit__(self, *_: object) -> None:
        self._cluster.delete(("v1", "ResourceQuota"), "tight")


def test_the_launcher_ends_with_what_its_stage_said(plane: ControlPlane, laptop: Cluster, pods: Pods, small: Plan, store: Store):
    """A study whose stage fails: the other stages that can run do, and the launcher's Job says what is missing and why."""
    pods.playing |= {"grid", *STAGES}
    pods.fail = {"train"}
    submit(laptop, small, lambda _: None)
    assert wait_for(plane, lambda: ended(laptop, small), "the launcher's end", 300) == "failed"
    (line,) = [line for line in under_way(laptop, small) if line.startswith("launcher")]
    assert "train/" in line
    assert "a rerun builds only these" in line
    assert any(key.startswith("generate/base") for key in done_keys(store))  # what depends on no adapter


# ---------------------------------------------------------------- doctor


def test_doctor_finds_a_cluster_in_order(plane: ControlPlane, laptop: Cluster, pods: Pods):
    pods.playing |= {"doctor"}
    checked = datadose(plane, "doctor", "laptop", "--context", "test")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    for words in ("v1.36", "serves RayJob v1", "with the overlay laptop", "this user may submit", "leaves room", "pods of train: are admitted"):
        assert words in checked.stdout
    assert "the store can be written from there, one writer at a time" in checked.stdout.replace("\n", " ")
    assert not laptop.items(JOB)


def test_doctor_names_what_is_missing(plane: ControlPlane, laptop: Cluster, pods: Pods):
    templates = laptop.templates()
    for template in templates.values():
        for pod in pod_templates(template):
            pod["spec"]["containers"][0]["image"] = "registry.example/datadose/no-such-image:1"
    templates["train"]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] = "9"
    templates["judge"]["spec"]["submitterPodTemplate"]["spec"].pop("securityContext")
    data = {f"{stage}.json": json.dumps(item) for stage, item in templates.items()}
    laptop.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "templates", "namespace": "datadose"}, "data": data})
    with quota(plane, laptop, pods="3"):
        checks = {check.name: check for check in diagnose(laptop, plan_of("laptop"))}
    assert not checks["GPU nodes"].passed
    assert "9 on one node" in checks["GPU nodes"].found
    assert not checks["quota"].passed
    assert "tight leaves 3 of pods" in checks["quota"].found
    assert not checks["pods of judge"].passed
    assert "PodSecurity" in checks["pods of judge"].found
    image = checks["store, from inside"]
    assert not image.passed
    assert "cannot start registry.example/datadose/no-such-image:1 (ImagePullBackOff" in image.found
    assert all(check.remedy for check in checks.values() if not check.passed)


# ---------------------------------------------------------------- who may do what


def test_the_launchers_account_is_refused_what_it_does_not_need(plane: ControlPlane, laptop: Cluster, sa_cluster: Cluster):
    elsewhere = plane.as_account("launcher")
    elsewhere.namespace = "default"
    refused: list[Callable[[], Any]] = [
        lambda: sa_cluster.get(("v1", "Secret"), "store"),
        lambda: sa_cluster.items(("v1", "Secret")),
        lambda: elsewhere.items(POD),
        lambda: elsewhere.items(JOB),
        lambda: sa_cluster.items(("v1", "Node")),
        lambda: sa_cluster.delete(("v1", "Namespace"), "datadose"),
        lambda: sa_cluster.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", "namespace": "datadose"}, "spec": {"containers": []}}),
        lambda: sa_cluster.request("POST", "/api/v1/namespaces/datadose/serviceaccounts/launcher/token", body={"spec": {}}),
        lambda: sa_cluster.delete(("rbac.authorization.k8s.io/v1", "Role"), "launcher"),
        lambda: sa_cluster.request("POST", "/api/v1/namespaces/datadose/pods/x/exec"),
    ]
    for attempt in refused:
        with pytest.raises(RefusedError) as caught:
            attempt()
        assert caught.value.status == 403


def test_inside_a_pod_its_own_token_is_used_and_a_newer_one_once_the_kubelet_has_written_it(
    plane: ControlPlane, laptop: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    token, now = tmp_path / "token", [datetime.datetime.now(datetime.UTC)]
    token.write_text("a-token-that-has-run-out")
    clock = SimpleNamespace(datetime=SimpleNamespace(now=lambda **_: now[0]), timedelta=datetime.timedelta)
    monkeypatch.setattr(incluster_config, "datetime", clock)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(plane.certificates.ca))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(plane.ports["api"]))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    inside = connect()
    with pytest.raises(RefusedError) as caught:
        inside.templates()
    assert caught.value.status == 401
    token.write_text(plane.account_token("launcher"))
    now[0] += datetime.timedelta(minutes=2)
    assert inside.templates().keys() == {"grid", *STAGES}
    with pytest.raises(RefusedError, match="system:serviceaccount:datadose:launcher"):
        inside.get(("v1", "Secret"), "store")


# ---------------------------------------------------------------- Kueue


@pytest.fixture
def queue(plane: ControlPlane, queued: Cluster) -> Iterator[Cluster]:
    yield queued
    clear(plane, queued)


def test_kueue_admits_suspends_preempts_and_resumes(plane: ControlPlane, queue: Cluster, small: Plan):
    queue.apply({
        "apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "WorkloadPriorityClass", "metadata": {"name": "urgent"}, "value": 100_000,
    })  # fmt: skip
    templates = queue.templates()
    queue.apply(study_config(small, queue.namespace))

    def workers(stage: str) -> int:
        return sum(pod["metadata"]["labels"].get("ray.io/node-type") == "worker" for pod in running(queue, f"{STAGE_LABEL}={stage}"))

    def about(stage: str) -> str:
        found = queue.get(RAYJOB, object_name(small, stage))
        assert found is not None
        return queue.explain(found)

    queue.apply(instantiate(templates["train"], small))
    wait_for(plane, lambda: workers("train") == 4, "the training, admitted")
    assert all(load["spec"]["queueName"] == "datadose" for load in queue.items(WORKLOAD))

    queue.apply(instantiate(templates["judge"], small))  # the queue has four GPUs
    wait_for(plane, lambda: "Kueue has not admitted it" in about("judge") and "insufficient unused quota" in about("judge"), "the queue's word")
    suspended = queue.get(RAYJOB, object_name(small, "judge"))
    assert suspended is not None
    assert suspended["spec"]["suspend"] is True
    assert workers("judge") == 0

    urgent = instantiate(templates["generate"], small)
    urgent["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] = "urgent"
    queue.apply(urgent)
    wait_for(plane, lambda: workers("generate") == 4 and workers("train") == 0, "the urgent job in place of the training")
    assert "Kueue has taken its place back (Preempted)" in about("train")

    queue.delete(RAYJOB, object_name(small, "judge"))
    queue.delete(RAYJOB, object_name(small, "generate"))
    wait_for(plane, lambda: workers("train") == 4, "the training, resumed")
    wait_for(plane, lambda: about("train") == "", "no complaint about the training")


def test_a_study_waits_in_the_queue_gives_way_and_resumes(plane: ControlPlane, queue: Cluster, pods_ray: str, small: Plan):
    """A job of somebody else's that is more urgent has all GPUs when the training's turn comes, and once more while it runs."""
    here = {"DATADOSE_GPUS_PER_WORKER": "0", "DATADOSE_TRAIN_WORKERS": "1", "DATADOSE_ANSWER_WORKERS": "1"}  # commands run on this machine
    queue.request("PATCH", "/api/v1/namespaces/datadose/configmaps/settings", body={"data": here}, content="application/merge-patch+json")
    queue.apply({
        "apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "WorkloadPriorityClass", "metadata": {"name": "urgent"}, "value": 100_000,
    })  # fmt: skip
    urgent = instantiate(queue.templates()["train"], plan_of("laptop"))  # a stage that nobody plays yet
    urgent["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] = "urgent"

    def workers(labels: str) -> int:
        return sum(pod["metadata"]["labels"].get("ray.io/node-type") == "worker" for pod in running(queue, labels))

    training, others = f"{STUDY_LABEL}={study_id(small)},{STAGE_LABEL}=train", f"{STUDY_LABEL}={study_id(plan_of('laptop'))}"
    pods = Pods(plane, pods_ray, playing={*STAGES, "grid"} - {"train"})
    try:
        queue.apply(urgent)
        wait_for(plane, lambda: workers(others) == 4, "the urgent job's GPUs")
        submit(queue, small, lambda _: None)
        wait_for(plane, lambda: "train waits: Kueue has not admitted it: " in pods.printed("grid"), "the launcher's word about the queue")
        assert workers(training) == 0
        queue.delete(RAYJOB, urgent["metadata"]["name"])
        wait_for(plane, lambda: workers(training) == 4, "the training, admitted")

        queue.apply(urgent)
        wait_for(plane, lambda: "train waits: Kueue has taken its place back (Preempted)" in pods.printed("grid"), "the launcher's word about the preemption")
        wait_for(plane, lambda: workers(others) == 4 and workers(training) == 0, "the urgent job in place of the training")
        queue.delete(RAYJOB, urgent["metadata"]["name"])
        wait_for(plane, lambda: workers(training) == 4, "the training, resumed")
        pods.playing.add("train")
        assert wait_for(plane, lambda: ended(queue, small), "the study's end", 300) == "succeeded", pods.printed("grid")
        assert [stage for stage, _ in pods.started] == ["grid", *STAGES]
    finally:
        pods.close()


# ---------------------------------------------------------------- watches


def test_a_watch_of_a_version_that_is_gone_wakes_up_and_does_not_fail(laptop: Cluster):
    laptop.changed(JOB, "", "1", timeout_s=2)


def test_a_drive_without_templates_says_what_to_do(plane: ControlPlane, small: Plan, store: Store):
    empty = plane.cluster("default")
    with pytest.raises(UserError, match="datadose setup OVERLAY --context"):
        drive(empty, small, store, lambda _: None)
