"""A study on a Kubernetes cluster: apply, watch, explain. The only importer of the kubernetes client.

Two programs use it: the user's, which sets a cluster up and submits, and the launcher inside, which makes a job of each
stage in turn. What is done is known from the store alone; objects say only what is under way and why it waits.
Every request outlasts a restart of the API server and its 429; a watch is but a wake-up: what counts is read anew after it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException

from jobs.manifests import DRIVER, STAGE_LABEL, STUDY_LABEL, Object, is_template, jobs_for, object_name, render, stage_of, study_config, study_id
from pipeline.artifacts import Store, done_keys
from pipeline.errors import StageError, UserError
from pipeline.plan import STAGES, Plan

NAMESPACE = "datadose"
MANAGER = "datadose"
TEMPLATES = "templates"
"""The ConfigMap in which `setup` leaves the jobs of its overlay for the launcher."""

OUTAGE_S = 300.0
"""How long the API server may be away before a request gives up: a control plane's upgrade takes a few minutes."""
TRANSIENT = {429, 500, 502, 503, 504}
POLL_S = 15.0
"""Longest time between two looks at a job where no watch event comes."""

_PLURALS = {
    "Namespace": "namespaces", "ServiceAccount": "serviceaccounts", "ConfigMap": "configmaps", "Service": "services", "Pod": "pods", "Event": "events",
    "ResourceQuota": "resourcequotas", "PersistentVolumeClaim": "persistentvolumeclaims", "Node": "nodes", "Deployment": "deployments", "Job": "jobs",
    "Role": "roles", "RoleBinding": "rolebindings", "NetworkPolicy": "networkpolicies", "PriorityClass": "priorityclasses", "StorageClass": "storageclasses",
    "CustomResourceDefinition": "customresourcedefinitions", "RayJob": "rayjobs", "RayCluster": "rayclusters", "Secret": "secrets",
    "WorkloadPriorityClass": "workloadpriorityclasses", "ResourceFlavor": "resourceflavors", "ClusterQueue": "clusterqueues", "LocalQueue": "localqueues",
    "Workload": "workloads",
}  # fmt: skip
_CLUSTER_WIDE = {"Namespace", "Node", "PriorityClass", "StorageClass", "CustomResourceDefinition", "ResourceFlavor", "ClusterQueue", "WorkloadPriorityClass"}
RAYJOB, JOB, RAYCLUSTER, WORKLOAD = ("ray.io/v1", "RayJob"), ("batch/v1", "Job"), ("ray.io/v1", "RayCluster"), ("kueue.x-k8s.io/v1beta2", "Workload")
POD, EVENT, CONFIGMAP = ("v1", "Pod"), ("v1", "Event"), ("v1", "ConfigMap")
Kind = tuple[str, str]
"""apiVersion and kind."""

Say = Callable[[str], None]


class RefusedError(UserError):
    """The API server answers and does not do it. status: of HTTP."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class DeletedError(UserError):
    """Somebody has deleted a stage's job: the study is to stop."""


class State(NamedTuple):
    phase: Literal["absent", "waiting", "running", "succeeded", "failed"]
    reason: str = ""

    @property
    def ended(self) -> bool:
        return self.phase in ("succeeded", "failed")


class Cluster:
    """One namespace of one cluster, as one user."""

    def __init__(self, api: client.ApiClient, namespace: str, outage_s: float) -> None:
        self._api = api
        self.namespace = namespace
        self._outage_s = outage_s
        self._allowed: set[tuple[str, str]] = set()
        """Method and path of what has succeeded: an API server that has just started refuses it until it has read its roles."""

    # ------------------------------------------------------------ requests

    def _path(self, kind: Kind, name: str | None = None, part: str | None = None) -> str:
        version, plural = kind[0], _PLURALS[kind[1]]
        path = f"/api/{version}" if "/" not in version else f"/apis/{version}"
        path += f"/{plural}" if kind[1] in _CLUSTER_WIDE else f"/namespaces/{self.namespace}/{plural}"
        return "/".join(filter(None, (path, name, part)))

    def _send(
        self, method: str, path: str, query: dict[str, str] | None = None, body: Any = None, content: str = "application/json", timeout: float = 30
    ) -> Any:
        """The answer, unread. Raises RefusedError for a status that time does not mend, and where it did not within the outage allowed."""
        headers = {"Accept": "application/json", "Content-Type": content}
        until = time.monotonic() + self._outage_s
        wait = 0.2
        while True:
            request = self._api.param_serialize(
                method, path, query_params=list((query or {}).items()), header_params=dict(headers), body=body, auth_settings=["BearerToken"]
            )
            try:
                answer = self._api.call_api(*request, _request_timeout=(5, timeout))
                if answer.status < 300:
                    self._allowed.add((method, path))
                    return answer
                problem = RefusedError(answer.status, _message(answer.read()))
                # A field that no schema knows is a 500 under server-side apply, and no time mends it.
                forgotten = answer.status == 403 and "cannot" in str(problem) and (method, path) in self._allowed
                if not forgotten and (answer.status not in TRANSIENT or "failed to create typed patch object" in str(problem)):
                    raise problem
                wait = max(wait, _seconds(answer.headers.get("Retry-After")))
            except (urllib3.exceptions.HTTPError, ApiException, OSError) as error:
                problem = RefusedError(0, f"the API server at {self._api.configuration.host} does not answer ({error})")
            if time.monotonic() + wait > until:
                raise problem
            time.sleep(wait)
            wait = min(2 * wait, 5.0)

    def request(self, method: str, path: str, query: dict[str, str] | None = None, body: Any = None, content: str = "application/json") -> Any:
        return json.loads(self._send(method, path, query, body, content).read() or b"{}")

    def get(self, kind: Kind, name: str) -> Object | None:
        try:
            found: Object = self.request("GET", self._path(kind, name))
        except RefusedError as error:
            if error.status == 404:
                return None
            raise
        return found

    def items(self, kind: Kind, labels: str = "", fields: str = "") -> list[Object]:
        query = {key: value for key, value in (("labelSelector", labels), ("fieldSelector", fields)) if value}
        # A list leaves its items without the kind that they have.
        return [{"apiVersion": kind[0], "kind": kind[1]} | item for item in self.request("GET", self._path(kind), query)["items"]]

    def apply(self, item: Object, dry_run: bool = False) -> Object:
        """Server-side apply with strict field validation."""
        kind = (item["apiVersion"], item["kind"])
        query = {"fieldManager": MANAGER, "force": "true", "fieldValidation": "Strict"} | ({"dryRun": "All"} if dry_run else {})
        path = self._path(kind, item["metadata"]["name"])
        try:
            made: Object = self.request("PATCH", path, query, item, "application/apply-patch+yaml")
        except RefusedError as error:
            raise RefusedError(error.status, f"{item['kind']} {item['metadata']['name']}: {error}") from error
        return made

    def delete(self, kind: Kind, name: str) -> None:
        """With all that it owns. What is gone already is fine."""
        try:
            self.request("DELETE", self._path(kind, name), {"propagationPolicy": "Background"})
        except RefusedError as error:
            if error.status != 404:
                raise

    def logs(self, pod: str, container: str, follow: bool = False) -> Iterator[str]:
        answer = self._send("GET", self._path(POD, pod, "log"), {"container": container, "follow": str(follow).lower()}, timeout=86400 if follow else 60)
        try:
            with answer.response as body:
                for line in body:
                    yield line.decode(errors="replace").rstrip("\n")
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise RefusedError(0, f"the log of pod {pod} broke off ({error}); what runs there goes on, and the same command shows it again") from error

    def changed(self, kind: Kind, labels: str, version: str, timeout_s: float = POLL_S) -> None:
        """Return at the first change after resourceVersion `version`, at the latest after the timeout. Every trouble of a watch is a change:
        whoever waits lists again, so a version that is gone (410), a 429 and a server that restarts need nothing more."""
        query = {"watch": "true", "labelSelector": labels, "resourceVersion": version, "timeoutSeconds": str(max(1, round(timeout_s)))}
        request = self._api.param_serialize("GET", self._path(kind), query_params=list(query.items()), header_params={}, auth_settings=["BearerToken"])
        try:
            answer = self._api.call_api(*request, _request_timeout=(5, timeout_s + 5))
            with answer.response as body:
                if answer.status == 200:
                    next(iter(body), None)
                    return
        except (urllib3.exceptions.HTTPError, ApiException, OSError):
            pass
        time.sleep(1)

    # ------------------------------------------------------------ what an object says

    def state(self, item: Object) -> State:
        """Of a Job or a RayJob as it was last read."""
        status = item.get("status", {})
        if item["kind"] == "Job":
            for condition in status.get("conditions", ()):
                if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
                    failed = condition["type"] == "Failed"
                    return State("failed", f"{condition.get('reason', '')}: {condition.get('message', '')}") if failed else State("succeeded")
            return State("running" if status.get("ready") else "waiting")
        phase, reason = status.get("jobDeploymentStatus", ""), ": ".join(filter(None, (status.get("reason"), status.get("message"))))
        if phase == "ValidationFailed":  # terminal, though the operator's own helper does not say so
            return State("failed", f"KubeRay's operator refuses it: {status.get('message', '')}")
        if phase == "Complete" and status.get("jobStatus") in ("SUCCEEDED", ""):
            return State("succeeded")
        if phase in ("Complete", "Failed"):
            return State("failed", reason or f"Ray says {status.get('jobStatus')}")
        return State("running" if phase == "Running" else "waiting")

    def explain(self, item: Object) -> str:
        """Why a job does not run or has failed, with the event that says so; empty where nothing speaks against waiting on."""
        if self.state(item).phase in ("running", "succeeded"):
            return ""
        labels = f"{STUDY_LABEL}={item['metadata']['labels'].get(STUDY_LABEL)},{STAGE_LABEL}={stage_of(item)}"
        pods = self.items(POD, labels)
        events = self._events(item, pods)
        return _queued(self._workloads(item)) or next(filter(None, (_pod_problem(pod, events) for pod in pods)), "") or _warning(events, pods)

    def _workloads(self, item: Object) -> list[Object]:
        if "kueue.x-k8s.io/queue-name" not in item["metadata"]["labels"]:
            return []
        owner = item["metadata"]["uid"]
        try:
            return [load for load in self.items(WORKLOAD) if any(reference["uid"] == owner for reference in load["metadata"].get("ownerReferences", ()))]
        except RefusedError as error:
            if error.status == 404:  # a cluster without Kueue
                return [{"status": {"conditions": [{"type": "QuotaReserved", "status": "False", "message": "Kueue is not installed, so nothing admits it"}]}}]
            raise

    def _events(self, item: Object, pods: list[Object]) -> list[Object]:
        """Warnings about the job, its Ray cluster and its pods, the newest first; not those about an earlier job of this name."""
        names = {item["metadata"]["name"], *(pod["metadata"]["name"] for pod in pods)}
        prefix = f"{item['metadata']['name']}-"
        found = [
            event for event in self.items(EVENT, fields="type=Warning")
            if (event["involvedObject"].get("name") in names or str(event["involvedObject"].get("name")).startswith(prefix))
            and _when(event) >= item["metadata"]["creationTimestamp"][:19]
        ]  # fmt: skip
        return sorted(found, key=_when, reverse=True)

    # ------------------------------------------------------------ one stage

    def run_stage(self, item: Object, say: Say) -> str | None:
        """Make a stage's job, or find it, and stay until it ends. None if it ended well, else a sentence why not."""
        kind, name, stage = (item["apiVersion"], item["kind"]), item["metadata"]["name"], stage_of(item)
        found = self.get(kind, name)
        if found is not None and (self.state(found).ended or "deletionTimestamp" in found["metadata"]):
            self._remove(kind, name)
            found = None
        told = ""
        while found is None:
            try:
                found = self.apply(item)
            except RefusedError as error:
                if not any(words in str(error) for words in ("exceeded quota", "status unknown for quota")):
                    raise
                told = _tell(say, f"{stage} waits: {error}", told)
                time.sleep(POLL_S)
        say(f"{stage}: {kind[1]} {name}")
        return self._watch(found, say, told)

    def _watch(self, item: Object, say: Say, told: str) -> str | None:
        kind, name, stage = (item["apiVersion"], item["kind"]), item["metadata"]["name"], stage_of(item)
        uid, phase, since = item["metadata"]["uid"], "", time.monotonic()
        while True:
            found = self.get(kind, name)
            if found is None or found["metadata"]["uid"] != uid or "deletionTimestamp" in found["metadata"]:
                raise DeletedError(f"{kind[1]} {name} was deleted while it ran; what it had committed stays, and another submit goes on from there")
            state = self.state(found)
            if state.phase == "succeeded":
                return None
            if state.phase == "failed":
                return _sentence(state.reason, self.explain(found))
            if state.phase != phase:
                phase, since = state.phase, time.monotonic()
                say(f"{stage}: {phase}")
            if phase == "waiting" and time.monotonic() - since > 3 and (why := self.explain(found)):
                told = _tell(say, f"{stage} waits: {why}", told)
            self.changed(kind, f"{STUDY_LABEL}={found['metadata']['labels'][STUDY_LABEL]}", found["metadata"]["resourceVersion"])

    def _remove(self, kind: Kind, name: str) -> None:
        self.delete(kind, name)
        while self.get(kind, name) is not None:
            time.sleep(1)

    def templates(self) -> dict[str, Object]:
        """Stage -> its job, as `setup` left them. Raises UserError where it did not."""
        found = self.get(CONFIGMAP, TEMPLATES)
        if found is None:
            raise UserError(f"namespace {self.namespace} is not set up; run `datadose setup OVERLAY --context CONTEXT` first")
        return {name.removesuffix(".json"): json.loads(text) for name, text in found["data"].items()}


# ---------------------------------------------------------------- what the user does


def connect(context: str | None = None, namespace: str = NAMESPACE, outage_s: float = OUTAGE_S) -> Cluster:
    """By a context of the kubeconfig; without one, as the pod that this runs in. Raises UserError with the contexts that there are."""
    try:
        if context is None and "KUBECONFIG" not in os.environ:
            config.load_incluster_config(found := client.Configuration())
        else:
            # Named, because the client reads the variable once only, when it is imported.
            config.load_kube_config(os.environ.get("KUBECONFIG"), context=context, client_configuration=(found := client.Configuration()))
    except (ConfigException, OSError) as error:
        raise UserError(f"no cluster: {error}. {_contexts()}") from error
    found.retries = False  # one retry layer: _send
    return Cluster(client.ApiClient(found), namespace, outage_s)


def _contexts() -> str:
    try:
        return f"Contexts here: {', '.join(item['name'] for item in config.list_kube_config_contexts(os.environ.get('KUBECONFIG'))[0])}"
    except (ConfigException, OSError):
        return "There is no kubeconfig here; KUBECONFIG names one"


def setup(cluster: Cluster, overlay: str, say: Say) -> None:
    """What a cluster needs once: all of an overlay but its jobs, which are left as templates for the launcher."""
    items = render(overlay)
    for item in items:
        if not is_template(item):
            cluster.apply(item)
            say(f"{item['kind']} {item['metadata']['name']}")
    data = {f"{stage_of(item)}.json": json.dumps(item) for item in items if is_template(item)}
    metadata = {"name": TEMPLATES, "namespace": cluster.namespace, "annotations": {"datadose/overlay": overlay}}
    cluster.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    say(f"ConfigMap {TEMPLATES}: {', '.join(sorted(data))}")


def submit(cluster: Cluster, plan: Plan, say: Say) -> str:
    """Start the study's launcher, or find it. The name of its Job."""
    item = jobs_for(cluster.templates(), plan)[DRIVER]
    name = str(item["metadata"]["name"])
    found = cluster.get(JOB, name)
    if found is not None:
        state = cluster.state(found)
        if not state.ended:
            say(f"{plan.study.name} is under way already: Job {name} ({state.phase})")
            return name
        cluster._remove(JOB, name)
    cluster.apply(study_config(plan, cluster.namespace))
    cluster.apply(item)
    say(f"{plan.study.name} is submitted: Job {name}")
    return name


def cancel(cluster: Cluster, plan: Plan, say: Say) -> None:
    """Delete the study's objects, the launcher first. What is committed stays."""
    labels = f"{STUDY_LABEL}={study_id(plan)}"
    names = [(JOB, object_name(plan, DRIVER))] if cluster.get(JOB, object_name(plan, DRIVER)) else []
    for kind in (RAYJOB, JOB):
        # Only what the launcher made: KubeRay's own jobs and Ray clusters go with the RayJob that owns them.
        found = [item["metadata"] for item in cluster.items(kind, labels) if not item["metadata"].get("ownerReferences")]
        names += [(kind, item["name"]) for item in found if (kind, item["name"]) not in names]
    if cluster.get(CONFIGMAP, object_name(plan)):
        names.append((CONFIGMAP, object_name(plan)))
    for kind, name in names:
        cluster.delete(kind, name)
        say(f"deleted {kind[1]} {name}")
    say(f"{plan.study.name}: what it has committed stays, and a submit goes on from there" if names else f"{plan.study.name} is not on this cluster")


def under_way(cluster: Cluster, plan: Plan) -> list[str]:
    """A line for each of the study's jobs on the cluster, in the order of the stages, with the reason why one waits or has failed."""
    lines = []
    for stage in (DRIVER, *STAGES):
        for kind in (JOB, RAYJOB):
            found = cluster.get(kind, object_name(plan, stage))
            if found is not None and "ownerReferences" not in found["metadata"]:  # KubeRay's submitter has the name of its RayJob
                state = cluster.state(found)
                why = _sentence(state.reason, cluster.explain(found))
                lines.append(f"{'launcher' if stage == DRIVER else stage:<11} {state.phase}{': ' + why if why else ''} ({kind[1]} {found['metadata']['name']})")
    return lines


def log_lines(cluster: Cluster, plan: Plan, stage: str, follow: bool) -> Iterator[str]:
    """What a stage has printed: the job's own pod, or for a RayJob the submitter's, which prints what Ray prints. Raises UserError without a pod."""
    pods = cluster.items(POD, f"{STUDY_LABEL}={study_id(plan)},{STAGE_LABEL}={stage},!ray.io/node-type")
    if not pods:
        raise UserError(f"{plan.study.name} has no pod of stage {stage!r} on this cluster; `datadose status` with the same --context says what there is")
    newest = max(pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))
    return cluster.logs(newest["metadata"]["name"], newest["spec"]["containers"][0]["name"], follow)


def settings(cluster: Cluster) -> dict[str, str]:
    found = cluster.get(CONFIGMAP, "settings")
    return dict(found["data"]) if found else {}


# ---------------------------------------------------------------- what the launcher does


def drive(cluster: Cluster, plan: Plan, store: Store, say: Say) -> int:
    """Each stage as a job, in order; a stage whose steps are all committed needs none. How many steps were built meanwhile.

    As with `jobs.session.build`, a stage that partly failed does not stop the next ones: they build what does not depend
    on the failures. Raises StageError with all that is missing in the end.
    """
    jobs = jobs_for(cluster.templates(), plan)
    before, why = done_keys(store), dict[str, str]()
    for stage in STAGES:
        done = done_keys(store)
        missing = [step for step in plan.stage(stage) if step.key not in done]
        if not missing:
            say(f"{stage}: done")
            continue
        own = {step.key for step in missing}
        if not any(all(item.key in done or item.key in own for item in step.inputs) for step in missing):
            why |= {step.key: "its inputs are not built" for step in missing}
            say(f"{stage}: its inputs are not built")
            continue
        stopped = False
        try:
            reason = cluster.run_stage(jobs[stage], say)
        except DeletedError as error:
            reason, stopped = str(error), True
        done = done_keys(store)
        left = [step.key for step in missing if step.key not in done]
        why |= dict.fromkeys(left, reason or "its job ended well and did not commit it")
        say(f"{stage}: {len(missing) - len(left)} steps built" + (f", {len(left)} are missing: {why[left[0]]}" if left else ""))
        if stopped:
            break
    done = done_keys(store)
    built = sum(step.key in done and step.key not in before for step in plan.steps)
    failed = {step.key: why.get(step.key, "not reached") for step in plan.steps if step.key not in done}
    if failed:
        raise StageError(plan.study.name, failed, built)
    return built


# ---------------------------------------------------------------- sentences


def _tell(say: Say, text: str, told: str) -> str:
    if text != told:
        say(text)
    return text


def _sentence(*parts: str) -> str:
    return "; ".join(dict.fromkeys(part.strip().rstrip(":").strip() for part in parts if part.strip(" :")))


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body).get("message") or body.decode())
    except ValueError:
        return body.decode(errors="replace")[:500]


def _seconds(text: str | None) -> float:
    return min(float(text), 30.0) if text and text.isdigit() else 0.0


def _queued(workloads: Iterable[Object]) -> str:
    """What Kueue says of a workload that it does not admit, or has thrown out again."""
    for load in workloads:
        conditions = {item["type"]: item for item in load.get("status", {}).get("conditions", ())}
        if conditions.get("Admitted", {}).get("status") == "True":
            continue
        if (gone := conditions.get("Evicted", {})).get("status") == "True":
            return f"Kueue has taken its place back ({gone.get('reason')}): {gone.get('message')}"
        reserved = conditions.get("QuotaReserved", {})
        return f"Kueue has not admitted it: {reserved.get('message') or 'it is in the queue'}"
    return ""


_PULLING = {
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "CreateContainerConfigError",
    "CreateContainerError",
    "CrashLoopBackOff",
}


def _pod_problem(pod: Object, events: list[Object]) -> str:
    name, status = pod["metadata"]["name"], pod.get("status", {})
    for condition in status.get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"pod {name} has no node (event {_event_of(name, events) or condition.get('reason')}): {condition.get('message')}"
    for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        state = container.get("state", {})
        if (waiting := state.get("waiting", {})).get("reason") in _PULLING:
            event = _event_of(name, events)
            return f"pod {name} cannot start {container['image']} ({waiting['reason']}{', event ' + event if event else ''}): {waiting.get('message', '')}"
        if (ended := state.get("terminated", {})).get("exitCode"):
            said = str(ended.get("message") or "").strip()[-1000:]
            return f"pod {name} ended with {ended['exitCode']} ({ended.get('reason')}){': ' + said if said else ''}"
    return ""


def _when(event: Object) -> str:
    """To the second: some events have microseconds."""
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"])[:19]


def _event_of(name: str, events: list[Object]) -> str:
    return next((str(event["reason"]) for event in events if event["involvedObject"].get("name") == name), "")


def _warning(events: list[Object], pods: list[Object]) -> str:
    """The newest warning that is not about a pod that has run since."""
    well = {pod["metadata"]["name"] for pod in pods if pod.get("status", {}).get("phase") in ("Running", "Succeeded")}
    for event in events:
        about = event["involvedObject"]
        if about.get("name") not in well and not str(event.get("reason")).startswith(("Unhealthy", "FailedScheduling", "FailedToDelete")):
            return f"{about.get('kind')} {about.get('name')} (event {event.get('reason')}): {event.get('message')}"
    return ""
