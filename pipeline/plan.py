"""Study -> steps, and what they cost. Pure and light: a plan of the paper's size takes about a second.

Every worker makes the same plan from the same study, so a step travels as its key alone.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import judging, sampling
from pipeline.artifacts import Step, digest
from pipeline.errors import UserError, nearest
from pipeline.study import Study, parse
from pipeline.tasks import Conversation, Example, Task, load

STAGES = ("synthesize", "subset", "train", "generate", "judge", "report")
VERSIONS = {"synthesize": 1, "subset": 1, "train": 1, "generate": 1, "judge": 2, "report": 1}
"""Bumped when a stage's code changes its results: older artifacts are then not found and not touched."""

SHARD_ROWS = 64
"""Rows of a synthesis shard: the unit of lost work. Small enough to lose, large enough that 17,600 rows are 275 objects."""

CHARS_PER_TOKEN = 4.2
"""English text under the tokenizers of SmolLM2 and Llama 3, near enough for a price before the start."""

BASE, ZERO, BROKEN = "base", "zero", "broken"
"""Candidates beside the cells: the untouched model, an adapter of no training at all, and answers spoilt on purpose."""


@dataclass(frozen=True)
class Cell:
    """One fine-tune of the grid. epochs: passes over its rows, steps * global_batch / rows."""

    name: str
    rows: int
    steps: int
    epochs: float
    seed: int


@dataclass(frozen=True)
class Plan:
    study: Study
    task: Task
    params: Any
    """The study's [task] table, validated by the task."""
    train_rows: tuple[Example, ...]
    evaluation_rows: tuple[Example, ...]
    shards: Mapping[str, tuple[Example, ...]]
    """Key of a synthesis step -> its rows."""
    cells: tuple[Cell, ...]
    steps: tuple[Step, ...]
    """In the order of the stages; a step's inputs come before it."""

    @functools.cached_property
    def by_key(self) -> dict[str, Step]:
        return {step.key: step for step in self.steps}

    @functools.cached_property
    def by_name(self) -> dict[tuple[str, str], Step]:
        return {(step.stage, step.name): step for step in self.steps}

    def stage(self, stage: str) -> list[Step]:
        return [step for step in self.steps if step.stage == stage]

    def cell_of(self, step: Step) -> Cell | None:
        """The cell that a train or generate step is about; None for base and zero."""
        return next((cell for cell in self.cells if cell.name == step.name), None)

    def select(self, only: str | None) -> set[str]:
        """Keys of the steps of one stage or one cell (all without `only`). Raises UserError for neither."""
        if only is None:
            return {step.key for step in self.steps}
        if only in STAGES:
            return {step.key for step in self.stage(only)}
        cells = [cell.name for cell in self.cells]
        if only not in cells:
            raise UserError(f"--only {only!r} is neither a stage nor a cell; {nearest(only, [*STAGES, *cells])}")
        return {step.key for step in self.steps if step.name == only or step.name.startswith(f"{only}-")}


def cells_of(study: Study) -> tuple[Cell, ...]:
    """The grid: sizes x (steps and epochs) x seeds. An epoch is ceil(rows / global batch) steps."""
    found: dict[str, Cell] = {}
    batch = study.training.global_batch
    for rows in study.subsets.sizes:
        for steps in (*study.training.steps, *(math.ceil(epochs * rows / batch) for epochs in study.training.epochs)):
            for seed in study.training.seeds:
                cell = Cell(f"n{rows:05d}-s{steps:04d}-seed{seed}", rows, steps, steps * batch / rows, seed)
                found.setdefault(cell.name, cell)  # an epoch can be as long as one of the step counts
    return tuple(found.values())


def make_plan(study: Study) -> Plan:
    """Raises UserError for whatever of the study cannot be done."""
    task = load(study.task["name"])
    params = parse(task.params, study.task, "[task]")
    train_rows = _drawn(list(task.train(params)), task.strata, study.synthesis.rows, study.synthesis.seed, "synthesis.rows")
    if study.subsets.sizes[0] > len(train_rows):
        raise UserError(
            f"subsets.sizes: {study.subsets.sizes[0]} rows are wanted and the teacher is asked for {len(train_rows)}; "
            "lower the size, raise synthesis.rows or name more companies"
        )
    pool = list(task.evaluation(params))
    if study.evaluation.per_value is not None:
        chosen = sampling.per_value([row.fields for row in pool], task.strata, study.evaluation.per_value, study.evaluation.seed)
        evaluation_rows = [pool[index] for index in chosen]
    else:
        evaluation_rows = _drawn(pool, (*task.strata, task.cluster), study.evaluation.count, study.evaluation.seed, "evaluation.count")

    shards: dict[str, tuple[Example, ...]] = {}
    steps: list[Step] = []
    for split, rows in (("train", train_rows), ("evaluation", evaluation_rows)):
        for step, shard in _synthesize_steps(study, task, params, split, rows):
            shards[step.key] = shard
            steps.append(step)
    train_shards = tuple(step for step in steps if step.name.startswith("train"))
    evaluation_shards = tuple(step for step in steps if step.name.startswith("evaluation"))
    subsets = _subset_steps(study, task, train_shards)
    cells = cells_of(study)
    trained = _train_steps(study, task, cells, subsets, evaluation_shards)
    generated = _generate_steps(study, task, evaluation_rows, trained)
    judged = _judge_steps(study, task, generated)
    report = Step("report", study.name, {"version": VERSIONS["report"], "study": study}, (*evaluation_shards, *subsets.values(), *trained, *generated, *judged))
    every = (*steps, *subsets.values(), *trained, *generated, *judged, report)
    return Plan(study, task, params, tuple(train_rows), tuple(evaluation_rows), shards, cells, every)


def _drawn(rows: list[Example], strata: tuple[str, ...], size: int | None, seed: int, what: str) -> list[Example]:
    """Rows by id: the order of the task's nested loops plays no part in what follows."""
    if size is not None:
        try:
            chosen = sampling.balanced([row.fields for row in rows], strata, size, seed)
        except UserError as error:
            raise UserError(f"{what}: {error}") from error
        rows = [rows[index] for index in chosen]
    return sorted(rows, key=lambda row: row.row_id)


def _synthesize_steps(study: Study, task: Task, params: Any, split: str, rows: list[Example]) -> list[tuple[Step, tuple[Example, ...]]]:
    chunks = [tuple(rows[start : start + SHARD_ROWS]) for start in range(0, len(rows), SHARD_ROWS)]
    made = []
    for index, chunk in enumerate(chunks):
        config = {
            "version": VERSIONS["synthesize"],
            "task": [task.version, params],
            "teacher": study.synthesis.teacher,
            "sampling": study.synthesis.sampling,
            "precision": study.precision,
            "rows": len(chunk),
            "prompts": digest([[row.row_id, task.rich(row.fields), task.plain(row.fields)] for row in chunk]),
        }
        made.append((Step("synthesize", f"{split}-{index:04d}of{len(chunks):04d}", config), chunk))
    return made


def _subset_steps(study: Study, task: Task, shards: tuple[Step, ...]) -> dict[int, Step]:
    made: dict[int, Step] = {}
    previous: Step | None = None
    for size in study.subsets.sizes:
        config = {"version": VERSIONS["subset"], "size": size, "seed": study.subsets.seed, "strata": task.strata, "train_on": study.train_on}
        made[size] = Step("subset", f"n{size:05d}", config, (previous,) if study.subsets.nested and previous else shards)
        previous = made[size]
    return made


def _train_steps(study: Study, task: Task, cells: tuple[Cell, ...], subsets: dict[int, Step], evaluation: tuple[Step, ...]) -> list[Step]:
    shared: dict[str, Any] = {"version": VERSIONS["train"], "base": study.base, "precision": study.precision}
    training = study.training.model_dump(exclude={"steps", "epochs", "seeds"})
    made = []
    for cell in cells:
        config = shared | {"training": training, "steps": cell.steps, "seed": cell.seed}
        made.append(Step("train", cell.name, config, (subsets[cell.rows], *evaluation)))
    zero = shared | {"training": training, "steps": 0, "seed": study.training.seeds[0]}
    return [Step("train", ZERO, zero, evaluation), *made]


def _generate_steps(study: Study, task: Task, rows: list[Example], trained: list[Step]) -> list[Step]:
    config = {
        "version": VERSIONS["generate"],
        "base": study.base,
        "precision": study.precision,
        "sampling": study.generation,
        "prompts": digest([[row.row_id, task.plain(row.fields)] for row in rows]),
    }
    return [Step("generate", BASE, config), *(Step("generate", step.name, config, (step,)) for step in trained)]


def _judge_steps(study: Study, task: Task, generated: list[Step]) -> list[Step]:
    if study.judging.judges and task.rubric is None:
        raise UserError(
            f"judging.judges: task {task.name!r} has no rubric to judge by; leave the judges out (its exact checks need none) or choose another task"
        )
    base, *candidates = generated
    made = []
    for index, judge in enumerate(study.judging.judges):
        for name in study.judging.protocols:
            protocol = judging.PROTOCOLS[name]
            config = {
                "version": VERSIONS["judge"],
                "judge": judge,
                "protocol": name,
                "sampling": protocol.sampling,
                "precision": study.precision,
                "questions": digest([protocol.choices, *(_sample_question(task, name, order) for order in protocol.orders)]),
            }
            suffix = f"{name}-{index}"
            made.append(Step("judge", f"{BROKEN}-{suffix}", config | {"candidate": BROKEN}, (base,)))
            made += [Step("judge", f"{step.name}-{suffix}", config | {"candidate": step.name}, (base, step)) for step in candidates]
    return made


def _sample_question(task: Task, protocol: str, order: int) -> Conversation:
    """A question about nothing: all of its text that is the rubric's and the protocol's."""
    assert task.rubric is not None  # make_plan refuses judges without one
    return judging.question(judging.PROTOCOLS[protocol], task.rubric, [{"role": "user", "content": "prompt"}], "baseline", "candidate", order)


# ---------------------------------------------------------------- what it costs


def describe(plan: Plan, done: set[str]) -> dict[str, Any]:
    """The plan as JSON types: cells, cost, and what of each stage is done. Tokens are estimates (characters / 4.2)."""
    study = plan.study
    return {
        "study": study.name,
        "prompts": len(plan.train_rows),
        "evaluation_prompts": len(plan.evaluation_rows),
        "simulated": list(study.simulated),
        "cells": [
            {"name": cell.name, "rows": cell.rows, "steps": cell.steps, "epochs": round(cell.epochs, 6), "done": plan.by_name["train", cell.name].key in done}
            for cell in plan.cells
        ],
        "stages": {stage: {"steps": len(plan.stage(stage)), "done": sum(step.key in done for step in plan.stage(stage))} for stage in STAGES},
        "missing": [step.key for step in plan.steps if step.key not in done],
        "cost": cost(plan),
    }


def cost(plan: Plan) -> dict[str, Any]:
    study, task = plan.study, plan.task
    asked = len(plan.train_rows) + len(plan.evaluation_rows)
    models = len(plan.stage("generate"))
    evaluation = len(plan.evaluation_rows)
    judged = Counter(str(step.config["protocol"]) for step in plan.stage("judge"))
    verdicts = {name: pairs * evaluation * len(judging.PROTOCOLS[name].orders) for name, pairs in judged.items()}
    steps = sum(cell.steps for cell in plan.cells)
    rich = _tokens(task.rich, plan.train_rows)
    plain = _tokens(task.plain, plan.evaluation_rows)
    trained_prompt = rich if study.train_on == "rich" else _tokens(task.plain, plan.train_rows)
    answer = study.generation.max_tokens
    exposures = steps * study.training.global_batch
    return {
        "rows": asked,
        "training_rows": exposures,
        "steps": steps,
        "requests": {"synthesize": asked, "generate": models * evaluation, "judge": sum(verdicts.values())},
        "tokens_estimated": {
            "synthesize": round(asked * (rich + study.synthesis.sampling.max_tokens)),
            "train": round(exposures * (trained_prompt + study.synthesis.sampling.max_tokens)),
            "generate": round(models * evaluation * (plain + answer)),
            "judge": round(sum(count * (plain + 2 * answer + _verdict_tokens(task, name)) for name, count in verdicts.items())),
        },
    }


def _verdict_tokens(task: Task, protocol: str) -> float:
    """Of a question without what is judged, and of its answer at its longest."""
    return _conversation_tokens(_sample_question(task, protocol, 0)) + judging.PROTOCOLS[protocol].sampling.max_tokens


def _tokens(prompt: Any, rows: tuple[Example, ...]) -> float:
    """Mean tokens of a prompt, over at most 200 rows spread evenly."""
    sample = rows[:: max(1, len(rows) // 200)]
    return sum(_conversation_tokens(prompt(row.fields)) for row in sample) / len(sample)


def _conversation_tokens(conversation: Conversation) -> float:
    return sum(len(message["content"]) for message in conversation) / CHARS_PER_TOKEN
