"""What can be known before the first step: each check says what it found, what was wanted and what to do."""

from __future__ import annotations

import ctypes
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import psutil

from pipeline.artifacts import Store, done_keys, open_store
from pipeline.errors import EndpointStopped, UserError, nearest
from pipeline.ledger import require_budget
from pipeline.models import package_file
from pipeline.network import enforce
from pipeline.plan import Plan
from pipeline.runtime import Runtime
from pipeline.study import ModelName, Sampling

NEEDED = {"ray": "2.60", "pyarrow": "20", "transformers": "5", "peft": "0.21", "bitsandbytes": "0.50"}
"""Packages that a real study needs in this environment, with the oldest version that is known to work."""
PROBES = 3
"""Attempts at an endpoint before the start: enough to outlast one bad moment."""
DISK_GIB = 2.0
"""Converted model, adapters and tables of a small study, with room to spare."""


class Check(NamedTuple):
    name: str
    passed: bool
    found: str
    remedy: str


def preflight(plan: Plan, runtime: Runtime) -> None:
    """The cheap checks that decide whether to start. Raises UserError for the first that fails; nothing is built."""
    enforce(runtime)
    store = open_store(runtime.store)
    done = done_keys(store)
    if all(step.key in done for step in plan.steps):
        return
    require_budget(plan, store)
    for check in _needed(plan, runtime, store, done):
        if not check.passed:
            raise UserError(f"{check.name}: {check.found}. {check.remedy}")


def _needed(plan: Plan, runtime: Runtime, store: Store, done: set[str]) -> Iterator[Check]:
    yield writable(store)
    if not plan.study.simulated:
        yield from models(plan)
        yield from libraries(plan, runtime)
        yield memory(runtime)
    yield from endpoints(plan, runtime, done)


def diagnose(plan: Plan, runtime: Runtime) -> Iterator[Check]:
    """All checks, for `datadose doctor`."""
    enforce(runtime)
    yield from store_checks(open_store(runtime.store))
    yield from models(plan)
    yield from libraries(plan, runtime)
    yield from endpoints(plan, runtime, set())
    yield memory(runtime)
    yield disk(runtime)
    yield amx(plan)
    yield ports()
    yield from versions()


def store_checks(store: Store) -> Iterator[Check]:
    yield writable(store)
    yield conditional_writes(store)


def writable(store: Store) -> Check:
    remedy = "Set DATADOSE_STORE to a folder that you may write to or to s3://bucket/prefix, and check keys and endpoint"
    key = f"doctor/{secrets.token_hex(6)}"
    try:
        store.replace(key, b"x")
        store.delete(key)
    except Exception as error:  # noqa: BLE001  # whatever a store raises is the finding
        return Check("store", False, f"{store.uri} cannot be written ({error})", remedy)
    return Check("store", True, f"{store.uri} can be written", remedy)


def conditional_writes(store: Store) -> Check:
    """A second create of one key must be refused, or two runs could both think that they have committed."""
    key = f"doctor/{secrets.token_hex(6)}"
    try:
        first, second = store.create(key, b"first"), store.create(key, b"second")
        kept = store.read(key) == b"first"
        store.delete(key)
    except Exception as error:  # noqa: BLE001  # whatever a store raises is the finding
        return Check("conditional writes", False, f"could not be tried ({error})", "Mend the store first")
    honoured = first and not second and kept
    found = "honoured" if honoured else "this store lets the second writer win (it ignores If-None-Match)"
    return Check("conditional writes", honoured, found, "Use another store, or never run one study twice at once on this one")


def models(plan: Plan) -> Iterator[Check]:
    study = plan.study
    for name in dict.fromkeys(filter(None, (study.base, study.synthesis.teacher, *study.judging.judges))):
        model = ModelName.parse(name)
        if model.behind_endpoint:
            continue
        if model.simulated:
            yield Check("model", True, f"{name} is scripted: a study with it measures nothing", "")
        elif model.name.startswith("package:"):
            try:
                path = package_file(model)
                with path.open("rb") as file:
                    good = file.read(4) == b"GGUF"
                yield Check("model", good, f"{name} {'is there' if good else f'is no GGUF file: {path}'}", "Reinstall the package: make clean-env, make")
            except (UserError, OSError) as error:
                yield Check("model", False, f"{name} cannot be read ({error})", "Reinstall the package: make clean-env, make")
        elif Path(model.name).is_absolute():
            good = (Path(model.name) / "config.json").is_file()
            found = "is there" if good else "has no config.json"
            yield Check("model", good, f"{name} {found}", "Name a folder as save_pretrained writes it")
        else:
            yield Check("model", True, f"{name} comes from the hub when it is first needed", "")


def libraries(plan: Plan, runtime: Runtime) -> Iterator[Check]:
    """What no Python package brings along: vLLM on a CPU is linked against libnuma."""
    models = (plan.study.base, plan.study.synthesis.teacher, *plan.study.judging.judges)
    if runtime.gpus_per_worker or not any(ModelName.parse(name).has_engine for name in models if name):
        return
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError as error:
        yield Check(
            "libnuma", False, f"cannot be loaded ({error})", "Install it, vLLM needs it on a CPU: apt-get install libnuma1, or dnf install numactl-libs"
        )
    else:
        yield Check("libnuma", True, "is there", "")


def endpoints(plan: Plan, runtime: Runtime, done: set[str]) -> Iterator[Check]:
    """Each endpoint that steps not in `done` will ask: its list of models, and one real request for one token."""
    study = plan.study
    asked: dict[str, Sampling] = {}
    if study.synthesis.teacher and any(step.key not in done for step in plan.stage("synthesize")):
        asked[study.synthesis.teacher] = study.synthesis.sampling
    for judge in study.judging.judges:
        if any(step.key not in done for step in plan.stage("judge") if step.config["judge"] == judge):
            asked.setdefault(judge, Sampling(temperature=0))
    for name, sampling in asked.items():
        if ModelName.parse(name).behind_endpoint:
            yield endpoint(name, sampling, runtime)


def endpoint(name: str, sampling: Sampling, runtime: Runtime) -> Check:
    """Whether the model answers, and what its endpoint lists that is near if it does not."""
    import asyncio

    from pipeline.llm import Completion, Request
    from pipeline.llm.endpoint import EndpointModel
    from pipeline.llm.limiter import LocalLimiter

    remedy, hint = "Mend that first: every row would meet it", ""
    model = ModelName.parse(name)

    async def ask() -> Completion:
        nonlocal hint
        client = EndpointModel(model, runtime.model_copy(update={"endpoint_attempts": PROBES}), LocalLimiter())
        listed = await client.list_models()
        hint = f"; it lists others, {nearest(model.name, listed)}" if listed and model.name not in listed else ""
        return await client.complete(Request([{"role": "user", "content": "Say yes."}], sampling.model_copy(update={"max_tokens": 1}), seed=0))

    try:
        answer = asyncio.run(ask())
    except EndpointStopped as error:
        return Check("endpoint", False, f"{error}{hint}", remedy)
    except UserError as error:
        return Check("endpoint", False, str(error), remedy)
    if answer.status == "error":
        return Check("endpoint", False, f"{name} answered with an error ({answer.reason}){hint}", remedy)
    return Check("endpoint", True, f"{name} answers" + (f" as {answer.served_model}" if answer.served_model else ""), "")


def memory(runtime: Runtime) -> Check:
    free = psutil.virtual_memory().available / 2**30
    remedy = "Close something, or set DATADOSE_MEMORY_GIB if you know that the study needs less"
    return Check("memory", free >= runtime.memory_gib, f"{free:.1f} GiB are free, {runtime.memory_gib:.1f} GiB are needed", remedy)


def disk(runtime: Runtime) -> Check:
    folder = runtime.cache_dir
    while not folder.exists():
        folder = folder.parent
    free = psutil.disk_usage(str(folder)).free / 2**30
    return Check("disk", free >= DISK_GIB, f"{free:.1f} GiB are free in {folder}, {DISK_GIB} are needed", "Free some space or set DATADOSE_CACHE")


def amx(plan: Plan) -> Check:
    """Some virtual machines announce AMX and fault on its first instruction, which kills any bfloat16 work on the CPU."""
    if plan.study.precision != "bfloat16":
        return Check("bfloat16 on this CPU", True, "the study uses float32", "")
    probe = "import torch; x = torch.ones(256, 576).bfloat16(); torch.nn.functional.linear(x, x)"
    ended = subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode
    found = "works" if ended == 0 else f"a matrix product ends the process ({ended})"
    return Check("bfloat16 on this CPU", ended == 0, found, "Set precision = 'float32' in the study")


def ports() -> Check:
    """Ray's processes talk over loopback."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
            return Check("loopback ports", True, "can be opened and reached", "")
    except OSError as error:
        return Check("loopback ports", False, f"cannot be used ({error})", "Allow connections on 127.0.0.1, which Ray needs")


def versions() -> Iterator[Check]:
    for package, oldest in NEEDED.items():
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield Check(package, False, "is not installed", "Run `make` again, it installs images/locks/laptop.txt")
            continue
        good = [int(part) for part in found.split(".")[:2]] >= [int(part) for part in f"{oldest}.0".split(".")[:2]]
        yield Check(package, good, f"{found}, wanted {oldest} or newer", "Run `make` again, it installs images/locks/laptop.txt")
