"""Loss, gradient norm, rate, throughput and memory of each step to TensorBoard, MLflow or Weights & Biases.

None of them is needed: one is imported when the user names it. A thread of its own writes, so that no step waits.
"""

from __future__ import annotations

import importlib
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from pipeline.errors import UserError

PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}

Write = Callable[[str, int, dict[str, float]], None]
"""Cell, step, values."""


def values_of(entry: dict[str, Any]) -> dict[str, float]:
    """Of a row of schemas.TRAIN_LOG."""
    speed = entry["tokens"] / entry["seconds"] if entry["seconds"] else 0.0
    kept = {name: float(entry[name]) for name in ("loss", "grad_norm", "learning_rate")}
    return kept | {"tokens_per_s": speed, "memory_gib": entry["memory_bytes"] / 2**30}


class Tracker:
    """name: a key of PACKAGES. Raises UserError where its package is missing."""

    def __init__(self, name: str, to: str | None, study: str) -> None:
        try:
            importlib.import_module(PACKAGES[name])
            self._write, self._end = _OPEN[name](to, study)
        except ImportError as error:
            raise UserError(
                f"track = {name!r} wants the package {PACKAGES[name]}, which is not installed: pip install {PACKAGES[name]}, or unset DATADOSE_TRACK"
            ) from error
        self._entries: queue.SimpleQueue[tuple[str, int, dict[str, float]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._drain, name="tracker", daemon=True)
        self._thread.start()

    def step(self, key: str, entry: dict[str, Any]) -> None:
        self._entries.put((key, int(entry["step"]), values_of(entry)))

    def close(self, timeout_s: float = 60.0) -> None:
        """Returns when everything is written, or a tracker that does not answer has had its time."""
        self._entries.put(None)
        self._thread.join(timeout_s)

    def _drain(self) -> None:
        while (item := self._entries.get()) is not None:
            try:
                self._write(*item)
            except Exception:  # a tracker that fails must not fail a cell
                logging.getLogger(__name__).exception("tracking %s failed", item[0])
        try:
            self._end()
        except Exception:
            logging.getLogger(__name__).exception("the tracker could not be closed")


def _tensorboard(to: str | None, study: str) -> tuple[Write, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writers: dict[str, Any] = {}

    def write(key: str, step: int, values: dict[str, float]) -> None:
        if key not in writers:
            writers[key] = SummaryWriter(f"{to or 'runs/tensorboard'}/{study}/{key}")
        for name, value in values.items():
            writers[key].add_scalar(name, value, step)

    def end() -> None:
        for writer in writers.values():
            writer.close()

    return write, end


def _mlflow(to: str | None, study: str) -> tuple[Write, Callable[[], None]]:
    mlflow = importlib.import_module("mlflow")
    client = mlflow.MlflowClient(tracking_uri=to)
    runs: dict[str, str] = {}

    def write(key: str, step: int, values: dict[str, float]) -> None:
        if key not in runs:
            found = client.get_experiment_by_name(study)
            experiment = found.experiment_id if found else client.create_experiment(study)
            runs[key] = client.create_run(experiment, run_name=key).info.run_id
        for name, value in values.items():
            client.log_metric(runs[key], name, value, step=step)

    def end() -> None:
        for run in runs.values():
            client.set_terminated(run)

    return write, end


def _wandb(to: str | None, study: str) -> tuple[Write, Callable[[], None]]:
    wandb = importlib.import_module("wandb")
    runs: dict[str, Any] = {}

    def write(key: str, step: int, values: dict[str, float]) -> None:
        if key not in runs:
            runs[key] = wandb.init(project=to or "datadose", group=study, name=key, reinit="create_new")
        runs[key].log(values, step=step)

    def end() -> None:
        for run in runs.values():
            run.finish()

    return write, end


_OPEN: dict[str, Callable[[str | None, str], tuple[Write, Callable[[], None]]]] = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}
