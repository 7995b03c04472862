"""What runs in pods, run in their place: the command of a pod, with its environment, in a process on this machine.

As a kubelet it resolves what the environment refers to (ConfigMaps and Secrets), lays the study where the command looks for it,
kills a process whose pod is deleted, and writes the end into the pod's status. For a RayJob the submitter's pod stands for
the whole cluster: its entrypoint runs with the head's environment, and the dashboard tells KubeRay's operator how it went.
"""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from jobs.cluster import CONFIGMAP, JOB, POD, RAYJOB, RefusedError
from jobs.manifests import STAGE_LABEL
from tests.k8s.control_plane import ControlPlane
from tests.runs import ROOT

SECRET = ("v1", "Secret")


class Pods:
    """Plays the pods of the stages in `playing` until it is closed; a stage that is taken out of it has pods that run and do nothing."""

    def __init__(self, plane: ControlPlane, ray_address: str = "", playing: set[str] | None = None) -> None:
        self.plane, self.playing = plane, playing if playing is not None else set[str]()
        self.started: list[tuple[str, str]] = []
        """Stage and pod, in the order in which their commands were begun."""
        self.fail: set[str] = set()
        """Stages whose command is not run and fails."""
        self.fail_first: set[str] = set()
        """Stages whose first attempt Ray gives up at once while its process lives on, and works beside the second."""
        self.overlapped: set[str] = set()
        """Stages of which two processes were seen at work at once."""
        self.output = plane.folder / "output" / secrets.token_hex(4)
        self.output.mkdir(parents=True)
        self._ray_address = ray_address
        self._cluster = plane.cluster()
        self._running: dict[str, tuple[subprocess.Popen[bytes], dict[str, Any], str | None]] = {}
        self._known: set[str] = set()
        self._zombies: list[tuple[subprocess.Popen[bytes], str]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def close(self) -> None:
        died = not self._thread.is_alive()
        self._stop.set()
        self._thread.join(30)
        for process in (*(each[0] for each in self._running.values()), *(each[0] for each in self._zombies)):
            process.kill()
            process.wait()
        assert not died, "the player of the pods has died; its traceback is above"

    def woken(self) -> dict[str, int]:
        """Stages whose given up attempts came to their end after all, and with which code."""
        return {stage: process.wait(60) for process, stage in self._zombies}

    def printed(self, stage: str) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.output.glob(f"*-{stage}-*.txt")))

    def _loop(self) -> None:
        while not self._stop.wait(0.3):
            pods = {pod["metadata"]["uid"]: pod for pod in self._cluster.items(POD, STAGE_LABEL)}
            for uid, pod in pods.items():
                metadata, role = pod["metadata"], pod["spec"]["containers"][0]["name"]
                runs = pod.get("status", {}).get("phase") == "Running" and "deletionTimestamp" not in metadata
                if runs and uid not in self._known and role in ("job", "submitter") and metadata["labels"][STAGE_LABEL] in self.playing:
                    self._known.add(uid)
                    self._begin(pod)
            for uid, (process, pod, submission) in list(self._running.items()):
                if uid not in pods or "deletionTimestamp" in pods[uid]["metadata"]:
                    self._running.pop(uid)
                    process.terminate()
                    process.wait()
                elif process.poll() is not None:
                    self._running.pop(uid)
                    self._end(pod, process.returncode, submission)

    def _begin(self, pod: dict[str, Any]) -> None:
        name, stage = pod["metadata"]["name"], pod["metadata"]["labels"][STAGE_LABEL]
        container, submission = pod["spec"]["containers"][0], None
        command = container.get("command", [])
        if container["name"] == "submitter":
            submission = next(item["value"] for item in container["env"] if item["name"] == "RAY_JOB_SUBMISSION_ID")
            job = self._cluster.get(RAYJOB, pod["metadata"]["labels"]["job-name"]) or self._owner_of(pod)
            command = shlex.split(job["spec"]["entrypoint"])
            pod_spec = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
            container = pod_spec["containers"][0]
        else:
            pod_spec = pod["spec"]
        studies = [item["configMap"]["name"] for item in pod_spec["volumes"] if item["name"] == "study"]
        folder = self._study(studies[0]) if studies else self.plane.folder
        command = [sys.executable if part == "python" else part.replace("/study/", f"{folder}/") for part in command]
        environment = {key: os.environ[key] for key in ("PATH", "HOME", "PYTHONPATH") if key in os.environ} | self._environment(pod, container)
        environment |= {"DATADOSE_CACHE": str(self.plane.folder / "cache"), "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": self._ray_address}
        if pod["spec"].get("automountServiceAccountToken"):
            environment["KUBECONFIG"] = str(self.plane.account_kubeconfig(pod["spec"]["serviceAccountName"]))
        if submission:
            self.plane.dashboard.say(submission, "RUNNING")
        if stage in self.fail:
            command = [sys.executable, "-c", "raise SystemExit('the stage failed as the test wanted')"]
        with (self.output / f"{len(self.started):03d}-{stage}-{name}.txt").open("wb") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        for zombie, of in self._zombies:
            if of == stage and zombie.poll() is None:
                zombie.send_signal(signal.SIGCONT)
                self.overlapped.add(stage)
        if submission and stage in self.fail_first and stage not in {begun for begun, _ in self.started}:
            process.send_signal(signal.SIGSTOP)  # its node cannot be reached to kill it; it wakes up when the second attempt is at work
            self._zombies.append((process, stage))
            self.plane.dashboard.say(submission, "FAILED", "the test gives this attempt up")
            self._status(pod, 0, "")
        else:
            self._running[pod["metadata"]["uid"]] = process, pod, submission
        self.started.append((stage, name))

    def _owner_of(self, pod: dict[str, Any]) -> dict[str, Any]:
        job = self._cluster.get(JOB, next(item["name"] for item in pod["metadata"]["ownerReferences"] if item["kind"] == "Job"))
        assert job is not None
        owner = self._cluster.get(RAYJOB, next(item["name"] for item in job["metadata"]["ownerReferences"] if item["kind"] == "RayJob"))
        assert owner is not None
        return owner

    def _study(self, name: str) -> Path:
        config = self._cluster.get(CONFIGMAP, name)
        assert config is not None, f"no ConfigMap {name}: a kubelet would not start the pod"
        folder = self.plane.folder / "studies" / name
        folder.mkdir(parents=True, exist_ok=True)
        for key, text in config.get("data", {}).items():
            (folder / key).write_text(text)
        for key, data in config.get("binaryData", {}).items():
            (folder / key).write_bytes(base64.b64decode(data))
        return folder

    def _environment(self, pod: dict[str, Any], container: dict[str, Any]) -> dict[str, str]:
        found: dict[str, str] = {}
        for source in container.get("envFrom", ()):
            reference = source.get("configMapRef") or source["secretRef"]
            item = self._cluster.get(CONFIGMAP if "configMapRef" in source else SECRET, reference["name"])
            assert item is not None or reference.get("optional"), f"{reference['name']} is missing: a kubelet would not start the pod"
            data = (item or {}).get("data") or {}
            found |= data if "configMapRef" in source else {key: base64.b64decode(value).decode() for key, value in data.items()}
        for item in container.get("env", ()):
            if "value" in item:
                found[item["name"]] = item["value"]
            elif item["valueFrom"].get("fieldRef", {}).get("fieldPath") == "metadata.namespace":
                found[item["name"]] = pod["metadata"]["namespace"]
        return found

    def _end(self, pod: dict[str, Any], code: int, submission: str | None) -> None:
        (output,) = self.output.glob(f"*-{pod['metadata']['name']}.txt")
        tail = output.read_text(errors="replace")[-2000:]
        if submission:
            self.plane.dashboard.say(submission, "FAILED" if code else "SUCCEEDED", tail if code else "")
        # A submitter follows the logs and ends well, however its job ended.
        self._status(pod, 0 if submission else code, "" if submission else tail)

    def _status(self, pod: dict[str, Any], code: int, message: str) -> None:
        container = pod["spec"]["containers"][0]
        ended = {"exitCode": code, "reason": "Error" if code else "Completed", "message": message if code else ""}
        state = {"name": container["name"], "image": container["image"], "imageID": "", "ready": False, "restartCount": 0, "state": {"terminated": ended}}
        status = {"phase": "Failed" if code else "Succeeded", "containerStatuses": [state]}
        path = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}/status"
        with contextlib.suppress(RefusedError):  # it was deleted meanwhile
            self._cluster.request("PATCH", path, body={"status": status}, content="application/merge-patch+json")
