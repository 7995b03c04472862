"""Ray: the session, and the board on which workers write how far they are.

`ray.init` attaches to a cluster where RAY_ADDRESS names one and starts an embedded one where it does not; nothing
else differs.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import ray

from pipeline.budget import Tally
from pipeline.errors import UserError
from pipeline.network import enforce, worker_hook
from pipeline.runtime import Runtime
from pipeline.stages import Context

POLL_EVERY_S = 1.0


def ensure_ray(runtime: Runtime) -> None:
    """Start or attach, once per process; workers have the same network as this process."""
    enforce(runtime)
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # the environment is made already
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # workers' stderr is kept in the session's folder all the same
    embedded = not os.environ.get("RAY_ADDRESS")
    if embedded:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process more for what happens to rented machines
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # so late at most is it seen that a stage is done
    hook = worker_hook(runtime)
    ray.init(
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1" if embedded else None,  # nobody but this machine has a part in it
        log_to_driver=False,
        include_dashboard=False if embedded else None,
        object_store_memory=256 * 2**20 if embedded else None,  # rows travel through the store, not through Ray
        runtime_env={"worker_process_setup_hook": hook} if hook else None,
        num_cpus=max(2, os.cpu_count() or 2) if embedded else None,  # a worker and a reader must fit at once
    )
    logging.getLogger("ray.train").setLevel(logging.ERROR)


def worker_environment(engine: Mapping[str, str], workers: int) -> dict[str, Any]:
    """runtime_env of a worker. Ray would give it as many OpenMP threads as Ray CPUs, which is one."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {"env_vars": {"OMP_NUM_THREADS": str(threads), **quiet, **engine}}


class Board:
    """Counts of finished work, keys of committed steps, reasons of failed ones, and the stage's tally where it has one."""

    def __init__(self) -> None:
        self.begin(None)

    def begin(self, tally: Tally | None) -> None:
        """A new stage, about which nothing is known."""
        self._joined = 0
        self._done = 0
        self._finished: list[str] = []
        self._failed: dict[str, str] = {}
        self._refused: UserError | None = None
        self._tally = tally

    def join(self) -> int:
        """How many workers joined before."""
        self._joined += 1
        return self._joined - 1

    def add(self, count: int) -> None:
        self._done += count

    def finish(self, step: str) -> None:
        self._finished.append(step)

    def fail(self, step: str, reason: str) -> None:
        self._failed[step] = reason

    def read(self) -> tuple[int, list[str]]:
        return self._done, self._finished

    def failures(self) -> dict[str, str]:
        return self._failed

    def refuse(self, error: UserError) -> None:
        """Why nothing of the stage can be done as it was asked for."""
        self._refused = error

    def refused(self) -> UserError | None:
        return self._refused

    def tally(self, call: str, *arguments: Any) -> Any:
        """What the method of this name of the tally returns."""
        return getattr(self._tally, call)(*arguments)


@functools.cache
def _board_of(job: str) -> Any:
    """One for all stages of a driver: a process takes a second to start."""
    return ray.remote(num_cpus=0)(Board).remote()


@contextlib.contextmanager
def board(context: Context, stage: str, total: int, unit: str, tally: Tally | None = None) -> Iterator[Any]:
    """A board whose news are emitted as events while the block runs."""
    actor = _board_of(ray.get_runtime_context().get_job_id())
    ray.get(actor.begin.remote(tally))
    stop = threading.Event()

    def poll() -> None:
        last, told = -1, 0
        while True:
            ended = stop.wait(POLL_EVERY_S)
            count, finished = ray.get(actor.read.remote())
            for key in finished[told:]:
                context.committed(context.plan.by_key[key])
            told = len(finished)
            if count != last:
                context.events.emit("progress", stage=stage, done=count, total=total, unit=unit)
                last = count
            if ended:
                return

    context.events.emit("progress", stage=stage, done=0, total=total, unit=unit)
    thread = threading.Thread(target=poll, name="progress", daemon=True)
    thread.start()
    try:
        yield actor
    finally:
        stop.set()
        thread.join(timeout=10)


def root_cause(error: BaseException) -> BaseException:
    """The exception that a worker raised, out of what Ray wrapped around it."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        inner = getattr(error, "cause", None) or error.__cause__
        if not isinstance(inner, BaseException):
            break
        error = inner
    return error
