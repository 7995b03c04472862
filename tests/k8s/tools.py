"""A Kubernetes control plane for tests, built from Go modules. `python -m tests.k8s.tools` (`make k8s-tools`) builds what is missing.

All programs are built in one module (tools/go.mod), so that what they share is compiled once and every download is checked
against tools/go.sum. kubernetes itself replaces its staging modules by their published twins of the same version.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from tests.tools import MissingToolError, tools_folder

MODULE = Path(__file__).parent / "tools"

PROGRAMS = {
    "kustomize": "sigs.k8s.io/kustomize/kustomize/v5",
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "etcd": "go.etcd.io/etcd/server/v3",
    "kuberay": "github.com/ray-project/kuberay/ray-operator",
    "kueue": "sigs.k8s.io/kueue/cmd/kueue",
    "kwok": "sigs.k8s.io/kwok/cmd/kwok",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "kube-scheduler": "k8s.io/kubernetes/cmd/kube-scheduler",
}


def folder() -> Path:
    """Of the programs: one for each state of go.mod."""
    pin = hashlib.sha256((MODULE / "go.mod").read_bytes()).hexdigest()[:12]
    return tools_folder() / f"k8s-{pin}"


def version_of(module: str) -> str:
    found = re.search(rf"^\s*{re.escape(module)} (v\S+)", (MODULE / "go.mod").read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"go.mod requires no {module}"
    return found[1]


def program(name: str) -> Path:
    """A built program. kube-apiserver and etcd may also lie where KUBEBUILDER_ASSETS points. Raises MissingToolError."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    for place in (folder(), *([Path(assets)] if assets else [])):
        if (place / name).is_file():
            return place / name
    raise MissingToolError(f"{name} is not in {folder()}; `make k8s-tools` builds the control plane (about half an hour on two cores, once)")


def module_folder(module: str) -> Path:
    """The sources of a module that go.mod requires: the custom resource definitions and webhooks lie in them."""
    done = subprocess.run([_go(), "mod", "download", "-json", f"{module}@{version_of(module)}"], cwd=MODULE, capture_output=True, text=True, check=False)
    found = re.search(r'"Dir": "(.*)"', done.stdout)
    if found is None:
        raise MissingToolError(f"{module} cannot be had:\n{done.stdout}{done.stderr}")
    return Path(found[1])


def build(name: str) -> Path:
    target = folder() / name
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    kubernetes = version_of("k8s.io/kubernetes")
    stamp = "k8s.io/component-base/version.git"
    major, minor, _ = kubernetes.removeprefix("v").split(".")
    flags = f"-s -w -X {stamp}Version={kubernetes} -X {stamp}Major={major} -X {stamp}Minor={minor}"  # without debug information: linking is half as long
    environment = {"CGO_ENABLED": "0", "GOMEMLIMIT": "3GiB", "GOFLAGS": os.environ.get("GOFLAGS", "-p=2")} | os.environ
    command = [_go(), "build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", flags, "-o", f"{target}.new", PROGRAMS[name]]
    done = subprocess.run(command, cwd=MODULE, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingToolError(f"{name} cannot be built:\n{done.stderr[-3000:]}")
    Path(f"{target}.new").replace(target)
    return target


def _go() -> str:
    found = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if found is None:
        raise MissingToolError(f"there is no go to build with; wanted {re.search(r'^go (.*)$', (MODULE / 'go.mod').read_text(), re.MULTILINE)[1]} or newer")  # type: ignore[index]
    return found


if __name__ == "__main__":
    for name in PROGRAMS:
        started = time.monotonic()
        print(build(name), f"{time.monotonic() - started:.0f} s", flush=True)
