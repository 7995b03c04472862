"""Kill -9 of the driver and of the committing worker at every commit: the runs after it finish the same study."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests.runs import ROOT, SMALL, contents, datadose, environment


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, study, ray_address):
    store = tmp_path_factory.mktemp("undisturbed")
    assert datadose("run", study, store=store, RAY_ADDRESS=ray_address).returncode == 0
    return tables(store)


def tables(store: Path) -> dict[str, object]:
    """Content of every committed table and adapter, by step; clocks left out."""
    found: dict[str, object] = {}
    for path in sorted((store / "manifests").rglob("*.json")):
        manifest = json.loads(path.read_text())
        for name, item in manifest["objects"].items():
            data = store / item["key"]
            if name.endswith(".parquet"):
                table = pq.read_table(data)
                found[f"{manifest['step']}/{name}"] = table.drop_columns([column for column in ("seconds",) if column in table.column_names]).to_pylist()
            elif "adapter" in name:
                found[f"{manifest['step']}/{name}"] = data.read_bytes()
    return found


def start(study: Path, store: Path, **extra: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.cli", "run", str(study)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(store, **extra), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.timeout(1200)
def test_study_killed_before_and_after_every_commit_ends_as_an_undisturbed_one(tmp_path, study, undisturbed, ray_cluster):
    store = tmp_path / "store"
    kills = 0
    while True:
        committed = {name: entry for name, entry in (contents(store) if store.exists() else {}).items() if name.startswith("manifests/")}
        process = start(study, store, RAY_ADDRESS=ray_cluster.address, **ray_cluster.crash)
        ray_cluster.control.write_text(f"{('before', 'after')[kills % 2]} {process.pid}")
        _, err = process.communicate(timeout=300)
        after = contents(store)
        assert {name: after[name] for name in committed} == committed, "a committed step was built again"
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err
        kills += 1
    ray_cluster.control.unlink(missing_ok=True)
    commits = sum(name.startswith("manifests/") for name in contents(store))
    assert commits == 12
    assert kills == 2 * commits
    assert tables(store) == undisturbed


def test_killed_worker_is_replaced_and_the_study_ends(tmp_path, study, undisturbed):
    store = tmp_path / "store"
    process = start(study, store)
    killed = False
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            if not killed and child.is_running() and "MapWorker" in child.name():
                os.kill(child.pid, signal.SIGKILL)
                killed = True
        time.sleep(0.05)  # polls another program's processes, which tell nobody when they start
    _, err = process.communicate()
    assert killed
    if process.returncode != 0:  # the death came where Ray does not retry: the next run goes on
        assert process.returncode in (1, 3), err
        assert datadose("run", study, store=store).returncode == 0
    assert tables(store) == undisturbed


def test_killed_driver_leaves_no_process_behind(tmp_path, study):
    process = start(study, tmp_path / "store")
    family: dict[int, psutil.Process] = {}
    while process.poll() is None and not any("MapWorker" in child.name() for child in family.values() if child.is_running()):
        family |= {child.pid: child for child in psutil.Process(process.pid).children(recursive=True)}
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(list(family.values()), timeout=180)
    assert not alive
