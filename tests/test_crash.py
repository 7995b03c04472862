"""Kill -9 of the driver, of a worker, of both at every commit: the runs after it finish the same study, and no process stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import psutil
import pytest

from tests.runs import contents, datadose, start, tables


@pytest.mark.timeout(1200)
def test_study_killed_before_and_after_every_commit_ends_as_an_undisturbed_one(tmp_path, small_study, undisturbed, ray_cluster):
    store = tmp_path / "store"
    kills = 0
    while True:
        committed = {name: entry for name, entry in (contents(store) if store.exists() else {}).items() if name.startswith("manifests/")}
        process = start("run", small_study, store=store, RAY_ADDRESS=ray_cluster.address, **ray_cluster.crash)
        ray_cluster.control.write_text(f"{('before', 'after')[kills % 2]} {process.pid}")
        ended = process.wait(timeout=300)
        ray_cluster.settled()
        after = contents(store)
        assert {name: after[name] for name in committed} == committed, "a committed step was built again"
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        kills += 1
    ray_cluster.control.unlink(missing_ok=True)
    commits = sum(name.startswith("manifests/") and name.endswith(".json") for name in contents(store))
    assert commits == 12
    assert kills == 2 * commits
    assert tables(store) == undisturbed


def test_killed_worker_is_replaced_and_the_study_ends(tmp_path, small_study, undisturbed):
    store = tmp_path / "store"
    process = start("run", small_study, store=store)
    killed = False
    while process.poll() is None:
        for child in process.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                if not killed and "MapWorker" in child.name():
                    child.kill()
                    killed = True
        time.sleep(0.05)  # polls another program's processes, which tell nobody when they start
    ended = process.wait()
    assert killed
    if ended.returncode != 0:  # the death came where Ray does not retry: the next run goes on
        assert ended.returncode in (1, 3), ended.stderr
        assert datadose("run", small_study, store=store).returncode == 0
    assert tables(store) == undisturbed


def test_killed_driver_leaves_no_process_behind(tmp_path, small_study):
    process = start("run", small_study, store=tmp_path / "store")
    family: dict[int, psutil.Process] = {}
    while process.poll() is None and not any("MapWorker" in child.name() for child in family.values() if child.is_running()):
        family |= {child.pid: child for child in process.family()}
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(list(family.values()), timeout=180)
    assert not alive
