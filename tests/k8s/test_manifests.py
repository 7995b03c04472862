"""What kustomize renders, checked for what no server checks: entry points, versions, images, operator-only rules, the network."""

from __future__ import annotations

import importlib.util
import ipaddress
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.manifests import (
    STAGE_LABEL,
    STUDY_FOLDER,
    instantiate,
    is_template,
    jobs_for,
    known_overlays,
    object_name,
    pod_templates,
    render,
    stage_of,
    study_files,
)
from pipeline.network import OFFLINE
from pipeline.plan import STAGES, make_plan
from pipeline.runtime import Runtime
from pipeline.study import load_study
from tests.runs import ROOT

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("kustomize")]

Object = dict[str, Any]
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
OVERLAYS = ("gpu", "kueue", "laptop", "onprem")
LOCKS = sorted((ROOT / "images" / "locks").glob("*.txt"))


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest, kustomize: None) -> tuple[str, list[Object]]:
    return request.param, render(request.param)


def jobs_of(items: list[Object]) -> list[Object]:
    return [item for item in items if is_template(item)]


def pods_of(items: list[Object]) -> Iterator[tuple[str, Object]]:
    for item in items:
        if "spec" in item and item["kind"] in ("Job", "RayJob", "Deployment"):
            for template in pod_templates(item):
                yield item["metadata"]["name"], template


def containers_of(pod: Object) -> list[Object]:
    return [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]


def test_all_overlays_render_within_five_seconds():
    assert tuple(known_overlays()) == OVERLAYS
    started = time.monotonic()
    for name in OVERLAYS:
        assert render(name)
    assert time.monotonic() - started < 5


def test_each_stage_has_one_job_and_its_entry_point_imports(overlay):
    _, items = overlay
    jobs = {stage_of(item): item for item in jobs_of(items)}
    assert set(jobs) == {*STAGES, "grid"}
    for stage, item in jobs.items():
        command = item["spec"].get("entrypoint", "").split() or item["spec"]["template"]["spec"]["containers"][0]["command"]
        assert command == ["python", "-m", f"jobs.{stage}", f"{STUDY_FOLDER}/study.toml"]
        assert importlib.util.find_spec(command[2]) is not None
        assert item["kind"] == ("RayJob" if stage in ("synthesize", "train", "generate", "judge") else "Job")


def test_the_study_that_an_overlay_is_for_plans(overlay):
    _, items = overlay
    (namespace,) = (item for item in items if item["kind"] == "Namespace")
    assert make_plan(load_study(namespace["metadata"]["annotations"]["datadose/study"])).steps


def test_settings_are_runtime(overlay):
    _, items = overlay
    (settings,) = (item["data"] for item in items if item["kind"] == "ConfigMap" and item["metadata"]["name"] == "settings")
    for name, value in settings.items():
        assert isinstance(value, str)
        if name.startswith("DATADOSE_"):
            assert name.removeprefix("DATADOSE_").lower() in Runtime.model_fields


def test_ray_is_the_locks_and_the_images_of_a_job_agree(overlay):
    name, items = overlay
    locked = {path.stem: found[1] for path in LOCKS if (found := re.search(r"^ray(?:\[\w+\])?==(\S+)", path.read_text(), re.MULTILINE))}
    assert locked
    for item in jobs_of(items):
        images = {container["image"] for pod in pod_templates(item) for container in containers_of(pod)}
        assert len(images) == 1, f"{name}/{stage_of(item)}: Ray wants one image on head, workers and submitter"
        if item["kind"] == "RayJob":
            (image,) = images
            world = re.fullmatch(r"\S+/datadose/(\w+)[:@]\S+", image)
            assert world is not None
            assert item["spec"]["rayClusterSpec"]["rayVersion"] == locked[world[1]]


def test_every_image_is_pinned(overlay):
    _, items = overlay
    for where, pod in pods_of(items):
        for container in containers_of(pod):
            tag = re.fullmatch(r"[\w.:-]+(?:/[\w.-]+)+(?::([\w.-]+)|@sha256:[0-9a-f]{64})", container["image"])
            assert tag is not None, f"{where}: {container['image']} has neither tag nor digest"
            assert tag[1] != "latest"


def test_rayjobs_keep_the_rules_that_only_operators_check(overlay):
    _, items = overlay
    for item in jobs_of(items):
        if item["kind"] != "RayJob":
            continue
        spec, cluster = item["spec"], item["spec"]["rayClusterSpec"]
        assert spec["shutdownAfterJobFinishes"]  # Kueue
        assert "deletionStrategy" not in spec
        assert "suspend" not in spec  # Kueue's own
        assert spec["submissionMode"] == "K8sJobMode"
        assert spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]
        assert cluster["authOptions"] == {"mode": "token"}
        assert not cluster["enableInTreeAutoscaling"]
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
            volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
            assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        for pod in pod_templates(item):
            assert not any("livenessProbe" in container or "readinessProbe" in container for container in pod["spec"]["containers"])


@pytest.mark.parametrize("name", ["9-lives", "x" * 40, "a", "twenty-two-characters--", "laptop"])
def test_names_of_objects_are_what_kuberay_takes(name, tmp_path):
    path = tmp_path / "study.toml"
    path.write_text((ROOT / "tests" / "rehearsal.toml").read_text().replace('name = "rehearsal"', f'name = "{name.rstrip("-")}"'))
    plan = make_plan(load_study(path))
    for item in jobs_of(render("laptop")):
        made = instantiate(item, plan)["metadata"]["name"]
        assert len(made) <= 47
        assert DNS_1035.fullmatch(made)


@pytest.mark.parametrize("name", ["laptop", "laptop-extract", "paper"])
def test_a_study_carried_to_a_cluster_has_the_same_steps(name, tmp_path):
    plan = make_plan(load_study(name))
    text, files = study_files(plan.study)
    (tmp_path / "study.toml").write_text(text)
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    carried = make_plan(load_study(tmp_path / "study.toml"))
    assert [step.key for step in carried.steps] == [step.key for step in plan.steps]
    assert object_name(carried) == object_name(plan)


def test_a_study_with_a_table_takes_it_along(tmp_path):
    companies = tmp_path / "home" / "mine.toml"
    companies.parent.mkdir()
    companies.write_text("\n".join((ROOT / "pipeline/tasks/posts/companies" / f"{name}.toml").read_text() for name in ("penrook",)))
    rehearsal = (ROOT / "tests" / "rehearsal.toml").read_text()
    table = re.sub(r"(?m)^name = \"posts\"$", 'name = "posts"\ncompanies_file = "mine.toml"', rehearsal)
    (companies.parent / "study.toml").write_text(table)
    study = load_study(companies.parent / "study.toml")
    text, files = study_files(study)
    assert files == {"mine.toml": companies.read_bytes()}
    assert str(companies.parent) not in text


def test_gpus_are_limited_as_requested_and_settings_use_them_all(overlay):
    _, items = overlay
    (settings,) = (item["data"] for item in items if item["kind"] == "ConfigMap" and item["metadata"]["name"] == "settings")
    for item in jobs_of(items):
        for pod in pod_templates(item):
            for container in pod["spec"]["containers"]:
                resources = container["resources"]
                assert resources["requests"]["memory"] == resources["limits"]["memory"]
                gpus = resources["requests"].get("nvidia.com/gpu")
                assert gpus == resources["limits"].get("nvidia.com/gpu")
                if gpus:
                    assert gpus == settings["DATADOSE_GPUS_PER_WORKER"]
                    assert pod["spec"]["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        if item["kind"] == "RayJob":
            (group,) = item["spec"]["rayClusterSpec"]["workerGroupSpecs"]
            if "nvidia.com/gpu" in group["template"]["spec"]["containers"][0]["resources"]["limits"]:
                workers = settings["DATADOSE_TRAIN_WORKERS" if stage_of(item) == "train" else "DATADOSE_ANSWER_WORKERS"]
                assert group["replicas"] == int(workers)


@pytest.mark.parametrize(("overlay_name", "study", "without"), [("gpu", "paper", set()), ("onprem", "onprem", {"synthesize", "judge"})])
def test_a_stage_that_endpoints_answer_holds_no_gpu_and_runs_in_the_small_image(overlay_name, study, without):
    jobs = jobs_for({stage_of(item): item for item in jobs_of(render(overlay_name))}, make_plan(load_study(study)))
    for stage in ("synthesize", "train", "generate", "judge"):
        (group,) = jobs[stage]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        pod = group["template"]["spec"]
        assert ("nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]) == (stage not in without)
        assert ("tolerations" in pod) == (stage not in without)
        images = {container["image"].rpartition("/")[2].partition(":")[0] for each in pod_templates(jobs[stage]) for container in containers_of(each)}
        assert images == {"core" if stage in without else "train" if stage == "train" else "serve"}
        assert group["replicas"] == 4


def test_secrets_are_referred_to_and_never_written(overlay):
    _, items = overlay
    assert not any(item["kind"] == "Secret" for item in items)
    for _, pod in pods_of(items):
        for container in containers_of(pod):
            literal = [entry["name"] for entry in container.get("env", ()) if "value" in entry]
            assert not any(re.search("KEY|TOKEN|SECRET|PASSWORD", name) for name in literal)


def test_no_pod_but_the_launchers_has_a_token(overlay):
    _, items = overlay
    for where, pod in pods_of(items):
        assert pod["spec"]["automountServiceAccountToken"] is (where == "grid")
        assert pod["spec"]["serviceAccountName"] == ("launcher" if where == "grid" else "stage")


def test_kueue_queues_the_stages_and_not_the_launcher():
    for item in jobs_of(render("kueue")):
        assert item["metadata"]["labels"].get("kueue.x-k8s.io/queue-name") == (None if stage_of(item) == "grid" else "datadose")
        assert "suspend" not in item["spec"]


# ---------------------------------------------------------------- the network


def _selects(selector: Object, labels: dict[str, str]) -> bool:
    assert "matchExpressions" not in selector
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def _egress(items: list[Object], labels: dict[str, str]) -> list[tuple[Object, list[Object]]]:
    """Everything that policies let a pod with these labels reach: peers and ports."""
    policies = [item["spec"] for item in items if item["kind"] == "NetworkPolicy" and _selects(item["spec"]["podSelector"], labels)]
    assert any("Egress" in policy["policyTypes"] for policy in policies), "without a policy a pod may reach anything"
    assert any("Ingress" in policy["policyTypes"] for policy in policies)
    return [(peer, rule.get("ports", [])) for policy in policies for rule in policy.get("egress", ()) for peer in rule["to"]]


def test_onprem_reaches_only_the_namespace_dns_and_the_store():
    items = render("onprem")
    pods = [template.get("metadata", {}).get("labels", {}) for _, template in pods_of(items)]
    assert len(pods) > 10
    for labels in pods:
        for peer, ports in _egress(items, labels):
            namespace = peer.get("namespaceSelector", {}).get("matchLabels", {}).get("kubernetes.io/metadata.name")
            if "ipBlock" in peer:  # the API server, for the launcher alone
                assert labels[STAGE_LABEL] == "grid"
                assert ipaddress.ip_network(peer["ipBlock"]["cidr"]).is_private
                assert {port["port"] for port in ports} == {443, 6443}
            elif namespace == "kube-system":
                assert {port["port"] for port in ports} == {53}
            elif namespace == "storage":
                assert {port["port"] for port in ports} == {443, 9000}
            else:
                assert set(peer) == {"podSelector"}, f"{labels} may leave the namespace: {peer}"


def test_nothing_comes_in_but_from_the_namespace_and_kuberay(overlay):
    _, items = overlay
    for item in items:
        if item["kind"] != "NetworkPolicy":
            continue
        for rule in item["spec"].get("ingress", ()):
            for peer in rule["from"]:
                if "namespaceSelector" in peer:
                    (operator,) = peer["podSelector"]["matchExpressions"]
                    assert operator == {"key": "app.kubernetes.io/name", "operator": "In", "values": ["kuberay-operator", "kuberay"]}
                    assert rule["ports"] == [{"protocol": "TCP", "port": 8265}]
                else:
                    assert peer == {"podSelector": {}}


def test_onprem_is_closed_for_python_and_every_librarys_telemetry_is_off_in_every_image():
    (settings,) = (item["data"] for item in render("onprem") if item["kind"] == "ConfigMap" and item["metadata"]["name"] == "settings")
    assert settings["DATADOSE_NETWORK"] == "closed"
    image = dict(re.findall(r"(\w+)=(\S+)", (ROOT / "images" / "Dockerfile").read_text().partition("ENV PATH=")[2]))
    assert image | OFFLINE == image
    assert not settings.keys() & OFFLINE.keys()


def test_onprem_checks_the_models_that_it_serves_and_trains():
    items = render("onprem")
    models = {item["metadata"]["name"]: item for item in items if item["kind"] == "Deployment"}
    assert set(models) == {"teacher", "judge"}
    for item in models.values():
        pod = item["spec"]["template"]["spec"]
        (check,) = pod["initContainers"]
        assert "sha256sum --check --strict" in check["command"][-1]
        served = pod["containers"][0]["command"]
        assert served[:2] == ["vllm", "serve"]
        assert Path(served[2]).parent == Path("/models")
        assert f"' ./{Path(served[2]).name}/'" in check["command"][-1]
    base = Path(load_study("onprem").base)
    for item in jobs_of(items):
        if stage_of(item) in ("train", "generate"):  # they run the base themselves
            (group,) = item["spec"]["rayClusterSpec"]["workerGroupSpecs"]
            (check,) = group["template"]["spec"]["initContainers"]
            assert f"' ./{base.name}/' | sha256sum --check --strict" in check["command"][-1]
            assert base.parent == Path(check["volumeMounts"][0]["mountPath"])
    judge = models["judge"]["spec"]["template"]["spec"]["containers"][0]
    assert judge["command"][judge["command"].index("--tensor-parallel-size") + 1] == judge["resources"]["limits"]["nvidia.com/gpu"]
