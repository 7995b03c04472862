"""What can be known of a cluster before a study is submitted: each check says what it found, what was wanted and what to do.

The last checks run inside: a job for each image shows that it can be pulled and admitted, and the one of `core` that the store
can be reached from there and honours conditional writes.
"""

from __future__ import annotations

import copy
import re
import secrets
import time
from collections.abc import Iterator
from typing import Any

from jobs.cluster import CONFIGMAP, JOB, TEMPLATES, Cluster, RefusedError
from jobs.manifests import STAGE_LABEL, STUDY_LABEL, Object, image_of, jobs_for, pod_templates
from pipeline.plan import Plan
from pipeline.preflight import Check

PROBE_S = 180.0
"""How long a probe may take: a large image takes minutes to be pulled for the first time."""
GPU = "nvidia.com/gpu"
CRD = ("apiextensions.k8s.io/v1", "CustomResourceDefinition")
NEEDED_RIGHTS = (("batch", "jobs"), ("ray.io", "rayjobs"), ("", "configmaps"))


def diagnose(cluster: Cluster, plan: Plan) -> Iterator[Check]:
    version = cluster.request("GET", "/version")
    yield Check("API server", True, f"{version['gitVersion']} answers", "")
    yield _kuberay(cluster)
    found = cluster.get(CONFIGMAP, TEMPLATES)
    if found is None:
        yield Check("set up", False, f"namespace {cluster.namespace} has no templates", "Run `datadose setup OVERLAY --context CONTEXT`")
        return
    yield Check("set up", True, f"with the overlay {found['metadata'].get('annotations', {}).get('datadose/overlay')}", "")
    jobs = jobs_for(cluster.templates(), plan)
    yield _rights(cluster)
    yield from _gpus(cluster, jobs)
    yield _quota(cluster, jobs)
    if any("kueue.x-k8s.io/queue-name" in item["metadata"]["labels"] for item in jobs.values()):
        yield from _queue(cluster, jobs)
    yield from _volumes(cluster)
    for stage, item in jobs.items():
        yield _admitted(cluster, stage, item)
    yield from _inside(cluster, jobs)


def _kuberay(cluster: Cluster) -> Check:
    """The definitions carry no version, so a field tells: preRunningDeadlineSeconds came with 1.6."""
    remedy = "Install KubeRay 1.6 or newer: k8s/README.md says how"
    try:
        found = cluster.get(CRD, "rayjobs.ray.io")
    except RefusedError as error:
        return Check("KubeRay", True, f"could not be looked at ({error})", "")
    if found is None:
        return Check("KubeRay", False, "RayJobs are not known here", remedy)
    served = {version["name"]: version for version in found["spec"]["versions"] if version["served"]}
    fields = served.get("v1", {}).get("schema", {}).get("openAPIV3Schema", {}).get("properties", {}).get("spec", {}).get("properties", {})
    good = "preRunningDeadlineSeconds" in fields
    return Check("KubeRay", good, f"serves RayJob {', '.join(served)}{'' if good else ', of a version before 1.6'}", remedy)


def _rights(cluster: Cluster) -> Check:
    refused = []
    for group, resource in NEEDED_RIGHTS:
        attributes = {"namespace": cluster.namespace, "verb": "patch", "group": group, "resource": resource}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": attributes}}
        if not cluster.request("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body=review)["status"]["allowed"]:
            refused.append(resource)
    found = f"this user may not change {', '.join(refused)}" if refused else "this user may submit"
    return Check("rights", not refused, found, f"Have the Role launcher of namespace {cluster.namespace} bound to this user")


def needs(item: Object) -> tuple[int, int]:
    """GPUs that a job wants at once, and on one node."""
    pods: list[tuple[int, Object]] = [(1, pod) for pod in pod_templates(item)]
    if item["kind"] == "RayJob":
        pods = [(group["replicas"], group["template"]) for group in item["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
    each = [(count, sum(int(container["resources"].get("limits", {}).get(GPU, 0)) for container in pod["spec"]["containers"])) for count, pod in pods]
    return sum(count * gpus for count, gpus in each), max(gpus for _, gpus in each)


def _gpus(cluster: Cluster, jobs: dict[str, Object]) -> Iterator[Check]:
    together, on_one = (max(values) for values in zip(*map(needs, jobs.values()), strict=True))
    if not together:
        return
    try:
        nodes = [int(node.get("status", {}).get("allocatable", {}).get(GPU, 0)) for node in cluster.items(("v1", "Node"))]
    except RefusedError as error:
        yield Check("GPU nodes", True, f"could not be looked at ({error})", "")
        return
    good = sum(nodes) >= together and max(nodes, default=0) >= on_one
    found = f"{sum(nodes)} GPUs on {sum(gpus > 0 for gpus in nodes)} nodes; a stage wants {together}, {on_one} on one node"
    yield Check("GPU nodes", good, found, "Add nodes with NVIDIA's device plugin, or lower replicas in k8s/components/gpus")


def _quota(cluster: Cluster, jobs: dict[str, Object]) -> Check:
    wanted = max(needs(item)[0] for item in jobs.values())
    tight = []
    for item in cluster.items(("v1", "ResourceQuota")):
        hard, used = item["spec"].get("hard", {}), item.get("status", {}).get("used", {})
        for name, need in ((f"requests.{GPU}", wanted), ("pods", 8), ("count/rayjobs.ray.io", 1), ("count/jobs.batch", 2)):
            if name in hard and (left := _number(hard[name]) - _number(used.get(name, "0"))) < need:
                tight.append(f"{item['metadata']['name']} leaves {left:g} of {name}, {need} are needed")
    return Check("quota", not tight, "; ".join(tight) or "leaves room for a stage", "Have the quota raised, or cancel what holds it")


def _number(quantity: str) -> float:
    return float(quantity) if re.fullmatch(r"[0-9.]+", quantity) else float("inf")


def _queue(cluster: Cluster, jobs: dict[str, Object]) -> Iterator[Check]:
    name = next(item["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] for item in jobs.values() if "kueue.x-k8s.io/queue-name" in item["metadata"]["labels"])
    found = cluster.get(("kueue.x-k8s.io/v1beta2", "LocalQueue"), name)
    active = [each for each in (found or {}).get("status", {}).get("conditions", ()) if each["type"] == "Active"]
    good = bool(active) and active[0]["status"] == "True"
    what = "is active" if good else active[0].get("message", "is not active") if active else "is not there, or Kueue is not running"
    yield Check("queue", good, f"LocalQueue {name} {what}", "Install Kueue, and check the ClusterQueue and ResourceFlavor in k8s/overlays/kueue/queues.yaml")


def _volumes(cluster: Cluster) -> Iterator[Check]:
    claims = [item for item in cluster.items(("v1", "PersistentVolumeClaim")) if item.get("status", {}).get("phase") != "Bound"]
    for item in claims:
        name, wanted = item["metadata"]["name"], item["spec"].get("storageClassName")
        try:
            classes = cluster.items(("storage.k8s.io/v1", "StorageClass"))
        except RefusedError as error:
            yield Check("storage class", True, f"for claim {name} could not be looked at ({error})", "")
            continue
        names = [each["metadata"]["name"] for each in classes]
        default = [each for each in classes if each["metadata"].get("annotations", {}).get("storageclass.kubernetes.io/is-default-class") == "true"]
        good = wanted in names if wanted else bool(default)
        found = f"claim {name} wants {wanted or 'the default class'}; there are: {', '.join(names) or 'none'}"
        yield Check("storage class", good, found, "Make the volume yourself, or name a storage class in the overlay")


def _admitted(cluster: Cluster, stage: str, item: Object) -> Check:
    """Pods alone meet pod security, quotas and priority classes, so each pod of a job is tried, without being made."""
    try:
        for template in pod_templates(item):
            spec = {**template["spec"], "restartPolicy": "Never"}
            name = f"doctor-{secrets.token_hex(4)}"
            cluster.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": cluster.namespace}, "spec": spec}, dry_run=True)
    except RefusedError as error:
        if error.status == 403 and "cannot patch resource" in str(error):
            return Check(f"pods of {stage}", True, "could not be tried: this user may not make pods; the launcher's job shows it", "")
        return Check(f"pods of {stage}", False, f"are refused: {error}", "Mend the overlay, or ask who sets the namespace's policies")
    return Check(f"pods of {stage}", True, "are admitted", "")


def _inside(cluster: Cluster, jobs: dict[str, Object]) -> Iterator[Check]:
    for image in dict.fromkeys(map(image_of, jobs.values())):
        command = ["python", "-m", "jobs.cli", "doctor", "--store"] if image == image_of(jobs["subset"]) else ["python", "-c", "import jobs.cli"]
        yield from _probe(cluster, jobs["subset"], image, command)


def _probe(cluster: Cluster, template: Object, image: str, command: list[str]) -> Iterator[Check]:
    probe = copy.deepcopy(template)
    name = f"dd-doctor-{secrets.token_hex(4)}"
    probe["metadata"]["name"] = name
    probe["metadata"]["labels"].pop("kueue.x-k8s.io/queue-name", None)
    probe["spec"] |= {"backoffLimit": 0, "activeDeadlineSeconds": round(PROBE_S), "ttlSecondsAfterFinished": 60}
    labels = {STUDY_LABEL: name, STAGE_LABEL: "doctor"}
    pod: dict[str, Any] = probe["spec"]["template"]
    probe["metadata"]["labels"] |= labels
    pod["metadata"]["labels"] |= labels
    container = pod["spec"]["containers"][0]
    container |= {"image": image, "command": command, "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "512Mi"}}}
    pod["spec"]["volumes"] = [volume for volume in pod["spec"]["volumes"] if volume["name"] != "study"]
    container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] != "study"]
    what = "store, from inside" if "--store" in command else "image"
    remedy = "Check DATADOSE_STORE and AWS_ENDPOINT_URL_S3 in the ConfigMap settings, the Secret store, and the NetworkPolicies" if "--store" in command else (
        "Push it with `make images REGISTRY=... TAG=...`, set the cluster up again, and see that its nodes may pull from there"
    )  # fmt: skip
    try:
        found = cluster.apply(probe)
        until, why = time.monotonic() + PROBE_S, ""
        while not cluster.state(found).ended and time.monotonic() < until:
            cluster.changed(JOB, f"{STUDY_LABEL}={name}", found["metadata"]["resourceVersion"], 5)
            found = cluster.get(JOB, name) or found
            why = cluster.explain(found) if cluster.state(found).phase == "waiting" else why
            if "ImagePullBackOff" in why or "InvalidImageName" in why:
                break
        state = cluster.state(found)
        if state.phase == "succeeded":
            yield Check(what, True, f"{image} runs" + (" and the store can be written from there, one writer at a time" if "--store" in command else ""), "")
        else:
            yield Check(what, False, f"{image}: {why or cluster.explain(found) or state.reason or 'the probe did not end in time'}", remedy)
    except RefusedError as error:
        yield Check(what, False, f"the probe is refused: {error}", remedy)
    finally:
        cluster.delete(JOB, name)
