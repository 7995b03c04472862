"""The cells: Ray Train workers, each with one base model loaded once, train their share and commit cell by cell."""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from pipeline.artifacts import NotFoundError, Step, Store, commit, done_keys, open_store, read_table
from pipeline.errors import UserError
from pipeline.plan import Plan, make_plan
from pipeline.planner import Device, Load, place
from pipeline.runtime import Runtime
from pipeline.schemas import HELDOUT, TRAIN_LOG, to_table
from pipeline.stages import Context, Failed, Steps
from pipeline.stages.subset import good_rows
from pipeline.stages.workers import board, ensure_ray, root_cause, worker_environment
from pipeline.study import Study
from pipeline.training import CellWork, Trained, Trainer, TrainingRow, Watch, open_trainer
from pipeline.training.tracking import Tracker

RESTARTS = 2
"""How often Ray Train starts its workers anew when one of them dies; committed cells are not trained again."""


def build(context: Context, steps: Steps) -> Failed:
    runtime = context.runtime
    ensure_ray(runtime)  # before ray.train: it imports ray.data, which reads there how much to log
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from pipeline.cpu import preload_environment

    workers = runtime.train_workers if runtime.gang > 1 else min(runtime.train_workers, len(steps))
    environment = worker_environment({} if runtime.gpus_per_worker else preload_environment(), workers)
    resources = {"CPU": 1.0} | ({"GPU": runtime.gpus_per_worker} if runtime.gpus_per_worker else {})
    total = sum(step.config["steps"] for step in steps)
    shares = shares_of(steps, workers, runtime.gang)
    with board(context, "train", total, "steps") as counts, tempfile.TemporaryDirectory() as scratch:
        settings: dict[str, Any] = {
            "train_loop_config": {
                "study": context.plan.study.model_dump_json(), "runtime": runtime.model_dump_json(), "shares": shares, "board": counts,
            },
            "scaling_config": ScalingConfig(num_workers=workers, use_gpu=runtime.gpus_per_worker > 0, resources_per_worker=resources),
            # A run whose name and folder exist would be resumed silently; what is done is known from the store alone.
            "run_config": RunConfig(
                name=Path(scratch).name, storage_path=scratch, failure_config=FailureConfig(max_failures=RESTARTS), worker_runtime_env=environment
            ),
        }  # fmt: skip
        if any(len(devices) > 1 for share in shares for _, devices in share):
            from ray.train.torch import TorchConfig, TorchTrainer

            trainer = TorchTrainer(_train_share, torch_config=TorchConfig(backend="nccl" if runtime.gpus_per_worker else "gloo"), **settings)
        else:  # cells have nothing to tell each other, and a process group takes a quarter of a minute to form
            trainer = DataParallelTrainer(_train_share, **settings)
        try:
            trainer.fit()
            failed: Failed = ray.get(counts.failures.remote())
            refused: UserError | None = ray.get(counts.refused.remote())
        except Exception as error:  # noqa: BLE001  # whatever it is, it is told of every step that is not done
            cause = root_cause(error)
            failed, refused = {step.key: f"{type(cause).__name__}: {cause}" for step in steps}, None
        if refused:
            raise refused
    built = done_keys(context.store)
    return {key: reason for key, reason in failed.items() if key not in built}


Share = list[tuple[list[str], list[int]]]
"""What one worker does, in order: steps' keys, and the workers that train them together."""


def shares_of(steps: Steps, workers: int, gang: int) -> list[Share]:
    """Placed by the rows that cells see: how fast a row is does not matter for who gets which."""
    loads = [Load(step.key, int(step.config["steps"]) + 1, int(step.config["training"]["global_batch"]), 1.0) for step in steps]
    schedule = place(loads, workers, Device(((1.0, 1.0),)), gang)
    return [[(list(item.keys), list(item.devices)) for item in schedule.of(worker)] for worker in range(workers)]


def _train_share(config: dict[str, Any]) -> None:
    """One Ray Train worker. A cell that fails is written on the board; the others go on."""
    try:
        _train(config)
    except UserError as error:  # were it raised, Ray Train would try again
        ray.get(config["board"].refuse.remote(error))


def _train(config: dict[str, Any]) -> None:
    runtime = Runtime.model_validate_json(config["runtime"])
    plan = make_plan(Study.model_validate_json(config["study"]))
    store = open_store(runtime.store)
    rank = ray.train.get_context().get_world_rank()
    gangs = sorted({tuple(devices) for share in config["shares"] for _, devices in share if len(devices) > 1})
    done = done_keys(store)
    groups = {}
    if gangs:
        import torch.distributed

        box = [done]
        torch.distributed.broadcast_object_list(box, src=0)  # a gang whose members disagree would wait for each other
        done, groups = box[0], {devices: torch.distributed.new_group(devices) for devices in gangs}
    mine = [([key for key in keys if key not in done], tuple(devices)) for keys, devices in config["shares"][rank]]
    if not any(keys for keys, _ in mine):
        return
    trainer = open_trainer(plan.study, runtime)
    for keys, devices in mine:
        trainer.group = groups.get(devices)
        if rank == devices[0]:
            train_cells(plan, keys, store, trainer, config["board"], runtime, len(devices))
        else:
            assist(plan, keys, store, trainer)


def assist(plan: Plan, keys: Sequence[str], store: Store, trainer: Trainer) -> None:
    """Train as the others of a gang do; its first worker tells and commits what comes of it."""
    with tempfile.TemporaryDirectory() as scratch:
        for _ in trainer.run((cell_work(store, plan.by_key[key], Path(scratch) / str(index)) for index, key in enumerate(keys)), Watch()):
            pass


def train_cells(plan: Plan, keys: Sequence[str], store: Store, trainer: Trainer, board: Any, runtime: Runtime, devices: int) -> None:
    """Train and commit the cells of these steps, on so many devices together. One that fails is told to the board."""

    def failed(key: str, error: Exception) -> None:
        logging.getLogger(__name__).error("%s failed", key, exc_info=error)
        ray.get(board.fail.remote(key, f"{type(error).__name__}: {error}"))

    def cells(folder: Path) -> Iterator[CellWork]:
        for index, key in enumerate(keys):
            try:
                work = cell_work(store, plan.by_key[key], folder / str(index))
            except Exception as error:  # noqa: BLE001  # whatever it is fails this cell alone, and is told
                failed(key, error)
            else:
                yield work

    with tempfile.TemporaryDirectory() as scratch:
        watch = StoredWatch(store, board, runtime, trainer.name, plan.study.name)
        for work, outcome in trainer.run(cells(Path(scratch)), watch):
            try:
                if isinstance(outcome, Exception):
                    raise outcome
                commit_cell(store, plan.by_key[work.key], work, outcome, trainer.name, devices, runtime.gpus_per_worker * devices)
            except Exception as error:  # noqa: BLE001  # as above
                failed(work.key, error)
            else:
                watch.discard(work.key)
                board.finish.remote(work.key)
            shutil.rmtree(work.folder)
        watch.close()


def cell_work(store: Store, step: Step, folder: Path) -> CellWork:
    rows = []
    if step.config["steps"]:
        table = read_table(store, step.inputs[0], "subset.parquet")
        rows = [TrainingRow(row["row_id"], json.loads(row["conversation"]), row["answer"]) for row in table.to_pylist()]
    folder.mkdir()
    return CellWork(step.key, rows, step.config["steps"], step.config["seed"], heldout_rows(store, step), folder)


def commit_cell(store: Store, step: Step, work: CellWork, made: Trained, trainer: str, devices: int, gpus: float) -> None:
    objects: dict[str, bytes | Path | pa.Table] = {
        f"adapter/{path.name}": path for path in sorted(made.adapter.iterdir()) if path.suffix in (".safetensors", ".json")
    }
    objects |= {"train_log.parquet": to_table(made.log, TRAIN_LOG), "heldout.parquet": to_table(made.heldout, HELDOUT)}
    facts = {
        "trainer": trainer, "devices": devices, "rows": len(work.rows), "cut_rows": made.cut_rows, "tokens": sum(row["tokens"] for row in made.log),
        "seconds": made.seconds, "gpu_seconds": gpus * made.seconds if gpus else None,
    }  # fmt: skip
    commit(store, step, objects, facts)


CHECKPOINTS = "checkpoints/"


class StoredWatch(Watch):
    """Steps are counted on the board; checkpoints lie in the store until their cell is committed.

    Objects `checkpoints/<step>/<trainer>-<steps taken>-<attempt>`: attempts at the same time never meet, the most steps
    count, and an attempt removes its own older ones. Of a committed cell nobody reads them.
    """

    def __init__(self, store: Store, board: Any, runtime: Runtime, trainer: str, study: str) -> None:
        self._store, self._board, self._every_s, self._trainer = store, board, runtime.checkpoint_every_s, trainer
        self._tracker = Tracker(runtime.track, runtime.track_to, study) if runtime.track != "none" else None
        self._attempt = secrets.token_hex(4)
        self._saved_at: dict[str, float] = {}
        self._saved: dict[str, str] = {}

    def step(self, key: str, entry: dict[str, Any]) -> None:
        self._saved_at.setdefault(key, time.monotonic() - entry["seconds"])
        self._board.add.remote(1)
        if self._tracker:
            self._tracker.step(key, entry)

    def close(self) -> None:
        if self._tracker:
            self._tracker.close()

    def due(self, key: str) -> bool:
        return time.monotonic() - self._saved_at[key] >= self._every_s

    def save(self, key: str, step: int, state: bytes) -> None:
        name = f"{CHECKPOINTS}{key}/{self._trainer}-{step:08d}-{self._attempt}"
        self._store.replace(name, state)
        if older := self._saved.get(key):
            self._store.delete(older)
        self._saved[key], self._saved_at[key] = name, time.monotonic()

    def restore(self, key: str) -> bytes | None:
        for name in sorted(self._store.list(f"{CHECKPOINTS}{key}/{self._trainer}-"), reverse=True):
            with contextlib.suppress(NotFoundError):  # another attempt has just gone further, or has committed the cell
                state = self._store.read(name)
                self._board.add.remote(int(name.rsplit("-", 2)[1]))
                return state
        return None

    def discard(self, key: str) -> None:
        """As far as that goes: what stays does no harm."""
        with contextlib.suppress(Exception):
            for name in list(self._store.list(f"{CHECKPOINTS}{key}/")):
                self._store.delete(name)


def heldout_rows(store: Store, step: Step) -> list[TrainingRow]:
    """The teacher's good answers to the evaluation prompts, asked plainly."""
    shards = [item for item in step.inputs if item.stage == "synthesize"]
    rows = good_rows(store, shards, "plain")
    return [TrainingRow(str(row["row_id"]), json.loads(str(row["conversation"])), str(row["answer"])) for row in rows]
