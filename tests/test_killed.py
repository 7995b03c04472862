"""A killed worker is replaced, and a killed driver takes its whole family with it."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import psutil

from tests.runs import datadose, start, tables


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
