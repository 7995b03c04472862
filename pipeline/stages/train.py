"""The cells: Ray Train workers, each with one base model loaded once, train their share and commit cell by cell."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from pipeline.artifacts import Step, Store, commit, done_keys, open_store, read_table
from pipeline.errors import UserError
from pipeline.plan import Plan, make_plan
from pipeline.runtime import Runtime
from pipeline.schemas import HELDOUT, TRAIN_LOG, to_table
from pipeline.stages import Context, Failed, Steps
from pipeline.stages.subset import good_rows
from pipeline.stages.workers import board, ensure_ray, root_cause, worker_environment
from pipeline.study import Study
from pipeline.training import Trainer, TrainingRow, open_trainer

RESTARTS = 2
"""How often Ray Train starts its workers anew when one of them dies; committed cells are not trained again."""


def build(context: Context, steps: Steps) -> Failed:
    runtime = context.runtime
    ensure_ray(runtime)  # before ray.train: it imports ray.data, which reads there how much to log
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from pipeline.cpu import preload_environment

    workers = min(runtime.train_workers, len(steps))
    environment = worker_environment({} if runtime.gpus_per_worker else preload_environment(), workers)
    resources = {"CPU": 1.0} | ({"GPU": runtime.gpus_per_worker} if runtime.gpus_per_worker else {})
    total = sum(step.config["steps"] for step in steps)
    with board(context, "train", total, "steps") as counts, tempfile.TemporaryDirectory() as scratch:
        # Not TorchTrainer: cells have nothing to tell each other, and its process group takes a quarter of a minute to form.
        trainer = DataParallelTrainer(
            _train_share,
            train_loop_config={
                "study": context.plan.study.model_dump_json(), "runtime": runtime.model_dump_json(),
                "shares": shares([(step.key, int(step.config["steps"])) for step in steps], workers), "board": counts,
            },
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=runtime.gpus_per_worker > 0, resources_per_worker=resources),
            # A run whose name and folder exist would be resumed silently; what is done is known from the store alone.
            run_config=RunConfig(
                name=Path(scratch).name, storage_path=scratch, failure_config=FailureConfig(max_failures=RESTARTS), worker_runtime_env=environment
            ),
        )  # fmt: skip
        try:
            trainer.fit()
            failed: Failed = ray.get(counts.failures.remote())
        except Exception as error:
            cause = root_cause(error)
            if isinstance(cause, UserError):
                raise cause from error
            failed = {step.key: f"{type(cause).__name__}: {cause}" for step in steps}
    built = done_keys(context.store)
    return {key: reason for key, reason in failed.items() if key not in built}


def shares(costs: Sequence[tuple[str, int]], workers: int) -> list[list[str]]:
    """Keys for each worker: longest first, each to the worker that has least to do."""
    loads, lists = [0] * workers, [list[str]() for _ in range(workers)]
    for key, cost in sorted(costs, key=lambda item: -item[1]):
        worker = loads.index(min(loads))
        loads[worker] += cost + 1
        lists[worker].append(key)
    return lists


def _train_share(config: dict[str, Any]) -> None:
    """One Ray Train worker. A cell that fails is written on the board; the others go on."""
    runtime = Runtime.model_validate_json(config["runtime"])
    plan = make_plan(Study.model_validate_json(config["study"]))
    store = open_store(runtime.store)
    mine = [key for key in config["shares"][ray.train.get_context().get_world_rank()] if key not in done_keys(store)]
    if not mine:
        return
    trainer = open_trainer(plan.study, runtime)
    for key in mine:
        try:
            train_cell(plan, plan.by_key[key], store, trainer, config["board"], runtime.gpus_per_worker)
        except Exception as error:  # whatever it is fails this cell alone, and is told
            logging.getLogger(__name__).exception("%s failed", key)
            ray.get(config["board"].fail.remote(key, f"{type(error).__name__}: {error}"))


def train_cell(plan: Plan, step: Step, store: Store, trainer: Trainer, board: Any, gpus: float) -> None:
    started, rows = time.monotonic(), []
    if step.config["steps"]:
        table = read_table(store, step.inputs[0], "subset.parquet")
        rows = [TrainingRow(row["row_id"], json.loads(row["conversation"]), row["answer"]) for row in table.to_pylist()]
    heldout = heldout_rows(store, step)
    with tempfile.TemporaryDirectory() as scratch:
        made = trainer.run(rows, step.config["steps"], step.config["seed"], heldout, Path(scratch), lambda: board.add.remote(1))
        objects: dict[str, bytes | Path | pa.Table] = {
            f"adapter/{path.name}": path for path in sorted(made.adapter.iterdir()) if path.suffix in (".safetensors", ".json")
        }
        objects |= {"train_log.parquet": to_table(made.log, TRAIN_LOG), "heldout.parquet": to_table(made.heldout, HELDOUT)}
        seconds = time.monotonic() - started  # reading, training and the held-out loss
        facts = {
            "trainer": type(trainer).__name__, "rows": len(rows), "cut_rows": made.cut_rows,
            "tokens": sum(row["tokens"] for row in made.log), "seconds": seconds, "gpu_seconds": gpus * seconds if gpus else None,
        }  # fmt: skip
        commit(store, step, objects, facts)
        board.finish.remote(step.key)


def heldout_rows(store: Store, step: Step) -> list[TrainingRow]:
    """The teacher's good answers to the evaluation prompts, asked plainly."""
    shards = [item for item in step.inputs if item.stage == "synthesize"]
    rows = good_rows(store, shards, "plain")
    return [TrainingRow(str(row["row_id"]), json.loads(str(row["conversation"])), str(row["answer"])) for row in rows]
