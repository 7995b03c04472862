"""The objects of a study on a cluster: what kustomize renders of k8s/, and the same under the names of one study.

No client and no cluster here. A name carries the study's fingerprint, so a second submit of one study finds the first.
`python -m jobs.manifests FOLDER` renders every overlay into a file.
"""

from __future__ import annotations

import base64
import copy
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomlkit
import yaml

from pipeline.errors import UserError, nearest
from pipeline.plan import Plan
from pipeline.study import ModelName, Study

Object = dict[str, Any]
"""A Kubernetes object as JSON types, of a kind that the API server knows: it is applied with strict field validation."""

OVERLAYS = Path(__file__).resolve().parent.parent / "k8s" / "overlays"
STUDY_LABEL, STAGE_LABEL = "datadose/study", "datadose/stage"
DRIVER = "grid"
"""The stage label of the job that drives the stages."""

STUDY_FOLDER = "/study"
CONFIG_BYTES = 900 * 1024
"""What of a study fits into a ConfigMap: etcd takes 1 MiB an object, base64 and the rest of it included."""


def known_overlays() -> list[str]:
    return sorted(path.parent.name for path in OVERLAYS.glob("*/kustomization.yaml"))


def render(overlay: str) -> list[Object]:
    """The objects of an overlay, in kustomize's order. Raises UserError without such an overlay or without kustomize."""
    folder = OVERLAYS / overlay
    if not (folder / "kustomization.yaml").is_file():
        raise UserError(f"no overlay {overlay!r} in k8s/overlays: {nearest(overlay, known_overlays())}")
    if program := shutil.which("kustomize"):
        command = [program, "build", str(folder)]
    elif program := shutil.which("kubectl"):
        command = [program, "kustomize", str(folder)]
    else:
        raise UserError("neither kustomize nor kubectl is on the PATH; install kubectl, or run `make k8s-tools` and put its folder on the PATH")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"overlay {overlay}: {done.stderr.strip()}")
    return [item for item in yaml.load_all(done.stdout, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if item]


def is_template(item: Object) -> bool:
    """Whether the object is one of a study's jobs, which the launcher makes; everything else is made once for a cluster."""
    return item["kind"] in ("Job", "RayJob")


def stage_of(item: Object) -> str:
    return str(item["metadata"]["labels"][STAGE_LABEL])


def study_id(plan: Plan) -> str:
    """Ten hex digits of the fingerprint of all that decides the study's results."""
    return plan.stage("report")[0].fingerprint[:10]


def object_name(plan: Plan, stage: str = "study") -> str:
    """At most 47 characters and first a letter: KubeRay takes no other name of a RayJob."""
    return f"dd-{plan.study.name[:22].rstrip('-')}-{study_id(plan)}-{stage}"


def instantiate(template: Object, plan: Plan) -> Object:
    """The template as the job of this study."""
    made = copy.deepcopy(template)
    labels = {STUDY_LABEL: study_id(plan), STAGE_LABEL: stage_of(template)}
    made["metadata"] |= {"name": object_name(plan, stage_of(template)), "labels": made["metadata"]["labels"] | labels}
    for pod in pod_templates(made):
        metadata = pod.setdefault("metadata", {})
        metadata["labels"] = metadata.get("labels", {}) | labels
        for volume in pod["spec"].get("volumes", ()):
            if volume["name"] == "study":
                volume["configMap"]["name"] = object_name(plan)
    return made


ASKING = {"requests": {"cpu": "2", "memory": "8Gi"}, "limits": {"memory": "8Gi"}}
"""Of a worker that asks endpoints: what base/ gives one without a GPU."""


def jobs_for(templates: Mapping[str, Object], plan: Plan) -> dict[str, Object]:
    """Stage -> its job for this study. A stage whose models all answer elsewhere holds no GPU, and runs in the small image."""
    made = {stage: instantiate(template, plan) for stage, template in templates.items()}
    study = plan.study
    asked = {"synthesize": [study.synthesis.teacher] if study.synthesis.teacher else [], "judge": study.judging.judges}
    for stage, models in asked.items():
        if not any(ModelName.parse(name).has_engine for name in models):
            _without_engines(made[stage], image_of(templates["subset"]))
    return made


def _without_engines(rayjob: Object, image: str) -> None:
    for pod in pod_templates(rayjob):
        for container in pod["spec"]["containers"]:
            container["image"] = image
    for group in rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        group["template"]["spec"].pop("tolerations", None)
        group["template"]["spec"]["containers"][0]["resources"] = copy.deepcopy(ASKING)


def image_of(item: Object) -> str:
    return str(next(pod_templates(item))["spec"]["containers"][0]["image"])


def pod_templates(item: Object) -> Iterator[Object]:
    spec = item["spec"]
    if item["kind"] == "RayJob":
        cluster = spec["rayClusterSpec"]
        yield cluster["headGroupSpec"]["template"]
        yield from (group["template"] for group in cluster["workerGroupSpecs"])
        yield spec["submitterPodTemplate"]
    elif "template" in spec:
        yield spec["template"]


def study_config(plan: Plan, namespace: str) -> Object:
    """The ConfigMap that carries the study, with the files that it names, to every pod. Raises UserError if that is too large."""
    text, files = study_files(plan.study)
    size = len(text) + sum(len(data) for data in files.values())
    if size > CONFIG_BYTES:
        raise UserError(f"study {plan.study.name}: it and the files that it names have {size:,} bytes, and {CONFIG_BYTES:,} fit; put the files into the image")
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": object_name(plan), "namespace": namespace, "labels": {STUDY_LABEL: study_id(plan), "app.kubernetes.io/part-of": "datadose"}},
        "data": {"study.toml": text},
        "binaryData": {name: base64.b64encode(data).decode() for name, data in files.items()},
    }


def study_files(study: Study) -> tuple[str, Mapping[str, bytes]]:
    """The study as TOML with its files beside it, and those files: a plan made of them has the same fingerprints."""
    raw = study.model_dump(mode="json", exclude_none=True)
    files = {}
    for key, value in raw["task"].items():
        if isinstance(value, dict) and value.keys() == {"path", "sha256"}:
            path = Path(value["path"])
            files[path.name] = path.read_bytes()
            raw["task"][key] = path.name
    return tomlkit.dumps(raw), files


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for name in known_overlays():
        (target / f"{name}.yaml").write_text(
            yaml.dump_all(render(name), Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False), encoding="utf-8"
        )
        print(target / f"{name}.yaml")
