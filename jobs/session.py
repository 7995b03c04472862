"""What every job shares: settings from the environment, a context for the stages, progress on the terminal, exit codes."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.artifacts import done_keys, open_store
from pipeline.errors import EndpointStopped, StageError, UserError, WriteError, nearest
from pipeline.events import Events, Listener
from pipeline.ledger import require_budget
from pipeline.network import enforce
from pipeline.plan import STAGES, Plan, make_plan
from pipeline.runtime import Runtime
from pipeline.stages import Context, build_stage
from pipeline.study import load_study, parse

ALL_BUILT, FAILED, USAGE, PARTLY_BUILT = 0, 1, 2, 3
"""Exit codes. 3: some steps were built and a rerun goes on from there."""

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def runtime_from(environment: Mapping[str, str]) -> Runtime:
    """Field `store` from DATADOSE_STORE and so on. Raises UserError for a DATADOSE_ variable that is no field."""
    given = {name.removeprefix("DATADOSE_").lower(): value for name, value in environment.items() if name.startswith("DATADOSE_") and value}
    for field in given:
        if field not in Runtime.model_fields:
            raise UserError(f"unknown setting DATADOSE_{field.upper()}; {nearest(field, Runtime.model_fields)} (in capitals, after DATADOSE_)")
    runtime = parse(Runtime, given, "environment")
    # Workers have other working directories.
    return runtime if runtime.store.startswith("s3://") else runtime.model_copy(update={"store": os.path.abspath(os.path.expanduser(runtime.store))})  # noqa: PTH100, PTH111


def plan_of(study: str, rehearse: bool = False) -> Plan:
    loaded = load_study(study)
    return make_plan(loaded.rehearsed() if rehearse else loaded)


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Turn what went wrong into a message on stderr and an exit code."""
    try:
        yield
    except StageError as error:
        errors.print(f"[red]{_plain(error)}[/red]")
        sys.exit(PARTLY_BUILT if error.built else FAILED)
    except (WriteError, EndpointStopped) as error:
        errors.print(f"[red]{_plain(error)}[/red]")
        sys.exit(PARTLY_BUILT)
    except UserError as error:
        errors.print(f"[red]{_plain(error)}[/red]")
        sys.exit(USAGE)
    except KeyboardInterrupt:
        errors.print("[red]stopped; what is committed stays, the same command goes on from there[/red]")
        sys.exit(PARTLY_BUILT)
    except Exception as error:
        if (told := store_trouble(error)) is None:
            raise
        errors.print(f"[red]{_plain(told)}[/red]")
        sys.exit(USAGE)


def store_trouble(error: Exception) -> str | None:
    """What to do about an S3 store that cannot be used from here; None for any other error."""
    from botocore.exceptions import BotoCoreError, ClientError

    if not isinstance(error, (BotoCoreError, ClientError)):
        return None
    return f"the store {os.environ.get('DATADOSE_STORE')} cannot be used from here ({error}); set AWS_ENDPOINT_URL_S3 and keys so that it can"


def _plain(error: Exception | str) -> str:
    return str(error).replace("[", "\\[")


@contextlib.contextmanager
def context_of(plan: Plan, runtime: Runtime) -> Iterator[Context]:
    store = open_store(runtime.store)
    run = f"{datetime.now(UTC):%Y%m%dt%H%M%S}-{secrets.token_hex(3)}"
    with _progress() as listener:
        events = Events(store, f"events/{plan.study.name}/{run}.jsonl", (listener,))
        try:
            yield Context(plan, store, runtime, events)
        finally:
            events.flush()


def build(plan: Plan, runtime: Runtime, stages: tuple[str, ...] = STAGES, only: str | None = None) -> int:
    """Build what is missing, stage after stage; how many steps that were.

    A stage whose steps partly failed does not stop the next ones: they build what does not depend on the failures.
    Raises StageError with all that failed.
    """
    keys = plan.select(only)
    failed: dict[str, str] = {}
    built = 0
    if all(step.key in done_keys(open_store(runtime.store)) for step in plan.steps if step.key in keys and step.stage in stages):
        return 0
    with context_of(plan, runtime) as context:
        try:
            for stage in stages:
                try:
                    built += build_stage(stage, context, keys)
                except StageError as error:
                    failed |= error.failed
                    built += error.built
        finally:
            _stop_ray()
    if failed:
        raise StageError(plan.study.name, failed, built)
    return built


def _stop_ray() -> None:
    if "ray" in sys.modules:
        import ray

        from pipeline.stages.engines import end_engines

        end_engines()
        ray.shutdown()


def run_stage(stage: str) -> None:
    """`python -m jobs.<stage> STUDY`: the entry point of a batch job."""
    with exit_codes():
        if len(sys.argv) != 2:
            raise UserError(f"usage: python -m jobs.{stage} STUDY (a name in jobs/studies or a .toml file), got {sys.argv[1:]}")
        plan, runtime = plan_of(sys.argv[1]), runtime_from(os.environ)
        enforce(runtime)
        require_budget(plan, open_store(runtime.store))
        built = build(plan, runtime, (stage,))
        console.print(f"{stage}: {built} steps built")


# ---------------------------------------------------------------- progress


@contextlib.contextmanager
def _progress() -> Iterator[Listener]:
    logging.captureWarnings(True)  # third-party warnings would tear the bars
    if console.is_terminal:
        with _Bars() as bars:
            yield bars
    else:
        yield _Lines()


class _Bars:
    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<11}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeElapsedColumn(),
            TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        stage = event.get("stage")
        if event["kind"] == "stage_start":
            self._tasks[str(stage)] = self._progress.add_task(str(stage), total=None, rate="")
        elif event["kind"] == "progress" and stage in self._tasks:
            task = self._tasks[stage]
            self._progress.update(task, completed=event["done"], total=event["total"])
            speed = self._progress.tasks[self._progress.task_ids.index(task)].speed
            self._progress.update(task, rate=f"{speed:.1f} {event['unit']}/s" if speed else event["unit"])
        elif event["kind"] == "step_failed":
            self._progress.console.print(f"[red]{event['step']} failed: {event['reason']}[/red]", markup=True)


class _Lines:
    """Plain lines with time stamps, for logs: each step, and progress every ten seconds."""

    EVERY_S = 10.0

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._started: dict[str, float] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        kind, stage = event["kind"], event.get("stage")
        if kind == "stage_start":
            self._started[str(stage)] = time.monotonic()
            self._say(event, f"{stage}: {event['steps']} steps to build")
        elif kind == "step_done":
            self._say(event, f"{event['step']} done")
        elif kind == "step_failed":
            self._say(event, f"{event['step']} FAILED: {event['reason']}")
        elif kind == "stage_end":
            self._say(event, f"{stage}: {event['built']} built, {event['failed']} failed in {time.monotonic() - self._started[str(stage)]:.0f} s")
        elif kind == "progress" and time.monotonic() - self._last > self.EVERY_S:
            self._last = time.monotonic()
            elapsed = time.monotonic() - self._started.get(str(stage), time.monotonic())
            rate = event["done"] / elapsed if elapsed else 0.0
            left = f", {(event['total'] - event['done']) / rate:.0f} s left" if rate else ""
            self._say(event, f"{stage}: {event['done']}/{event['total']} {event['unit']} ({rate:.1f}/s{left})")

    @staticmethod
    def _say(event: dict[str, Any], text: str) -> None:
        print(f"{event['at']} {text}", flush=True)
