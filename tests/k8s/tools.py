"""A Kubernetes control plane for tests, built from Go modules. `python -m tests.k8s.tools` (`make k8s-tools`) builds what is missing.

All programs but one are built in one module (tools/main), so that what they share is compiled once; KubeRay's operator needs
older libraries and has a module of its own. Every download is checked against go.sum. kubernetes itself replaces its staging
modules by their published twins of the same version.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from tests.tools import MissingToolError, tools_folder

MODULES = Path(__file__).parent / "tools"


class Program(NamedTuple):
    module: str
    """A folder of tools/ with go.mod and go.sum."""
    package: str


PROGRAMS = {
    "kustomize": Program("main", "sigs.k8s.io/kustomize/kustomize/v5"),
    "kube-apiserver": Program("main", "k8s.io/kubernetes/cmd/kube-apiserver"),
    "etcd": Program("main", "go.etcd.io/etcd/server/v3"),
    "kueue": Program("main", "sigs.k8s.io/kueue/cmd/kueue"),
    "kwok": Program("main", "sigs.k8s.io/kwok/cmd/kwok"),
    "kube-controller-manager": Program("main", "k8s.io/kubernetes/cmd/kube-controller-manager"),
    "kube-scheduler": Program("main", "k8s.io/kubernetes/cmd/kube-scheduler"),
    "kuberay": Program("kuberay", "github.com/ray-project/kuberay/ray-operator"),
}


def folder() -> Path:
    """Of the programs: one for each state of the modules."""
    pins = hashlib.sha256(b"".join((MODULES / name / "go.mod").read_bytes() for name in ("main", "kuberay")))
    return tools_folder() / f"k8s-{pins.hexdigest()[:12]}"


def version_of(dependency: str, module: str = "main") -> str:
    found = re.search(rf"^(?:require)?\s*{re.escape(dependency)} (v\S+)", (MODULES / module / "go.mod").read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"{module}/go.mod requires no {dependency}"
    return found[1]


def program(name: str) -> Path:
    """A built program. kube-apiserver and etcd may also lie where KUBEBUILDER_ASSETS points. Raises MissingToolError."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    for place in (folder(), *([Path(assets)] if assets else [])):
        if (place / name).is_file():
            return place / name
    raise MissingToolError(f"{name} is not in {folder()}; `make k8s-tools` builds the control plane there, once (a quarter of an hour on two cores)")


def sources(dependency: str, module: str = "main") -> Path:
    """The folder of a dependency: custom resource definitions and webhooks lie in it. Raises MissingToolError."""
    command = [_go(), "mod", "download", "-json", f"{dependency}@{version_of(dependency, module)}"]
    done = subprocess.run(command, cwd=MODULES / module, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingToolError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return Path(json.loads(done.stdout)["Dir"])


def build(name: str) -> Path:
    """The program, built if it is not there. Raises MissingToolError."""
    target = folder() / name
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    kubernetes, stamp = version_of("k8s.io/kubernetes"), "k8s.io/component-base/version.git"
    major, minor, _ = kubernetes.removeprefix("v").split(".")
    flags = f"-s -w -X {stamp}Version={kubernetes} -X {stamp}Major={major} -X {stamp}Minor={minor}"  # without debug information links twice as fast
    environment = {"CGO_ENABLED": "0", "GOMEMLIMIT": "3GiB", "GOFLAGS": "-p=2"} | os.environ
    command = [_go(), "build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", flags, "-o", f"{target}.new", PROGRAMS[name].package]
    done = subprocess.run(command, cwd=MODULES / PROGRAMS[name].module, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingToolError(f"{name} cannot be built:\n{done.stderr[-3000:]}")
    Path(f"{target}.new").replace(target)
    return target


def _go() -> str:
    if found := shutil.which("go") or shutil.which("go", path="/usr/local/go/bin"):
        return found
    raise MissingToolError("there is no go to build the control plane with; wanted 1.26 or newer on the PATH")


if __name__ == "__main__":
    for each in PROGRAMS:
        started = time.monotonic()
        print(build(each), f"{time.monotonic() - started:.0f} s", flush=True)
