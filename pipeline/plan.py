"""Study -> steps, and what they cost. Pure and light: a plan of the paper's size takes about a second.

Every worker makes the same plan from the same study, so a step travels as its key alone.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import judging, sampling
from pipeline.artifacts import Step, digest
from pipeline.budget import Usage, added, money, require_prices
from pipeline.errors import UserError, nearest
from pipeline.study import Evaluation, ModelName, Sampling, Study, parse
from pipeline.tasks import Conversation, Example, Task, load

STAGES = ("synthesize", "subset", "train", "generate", "judge", "report")
VERSIONS = {"synthesize": 2, "subset": 1, "train": 2, "generate": 1, "judge": 3, "report": 2}
"""Bumped when a stage's code changes its results: older artifacts are then not found and not touched."""

SHARD_ROWS = 64
"""Rows of a synthesis shard: the unit of lost work. Small enough to lose, large enough that 17,600 rows are 275 objects."""

CHARS_PER_TOKEN = 4.2
"""English text under the tokenizers of SmolLM2 and Llama 3, near enough for a price before the start."""

BASE, ZERO, BROKEN = "base", "zero", "broken"
"""Candidates beside the cells: the untouched model, an adapter of no training at all, and answers spoilt on purpose."""


@dataclass(frozen=True)
class Cell:
    """One fine-tune of the grid. epochs: passes over its rows, steps * global_batch / rows. draw: seed of its subset."""

    name: str
    rows: int
    steps: int
    epochs: float
    draw: int
    seed: int

    @property
    def subset(self) -> str:
        return subset_name(self.rows, self.draw)


def subset_name(rows: int, draw: int) -> str:
    return f"n{rows:05d}-d{draw}"


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


def asked_model(step: Step) -> str | None:
    """The model whose answers a step is made of, as the study writes its name; None where it asks none."""
    role = {"synthesize": "teacher", "generate": "base", "judge": "judge"}.get(step.stage)
    model: str | None = step.config[role] if role else None
    return model


def paid(step: Step) -> bool:
    """Whether an endpoint answers what the step asks."""
    model = asked_model(step)
    return model is not None and ModelName.parse(model).behind_endpoint


def sizes_of(study: Study, asked: int) -> tuple[int, ...]:
    """Distinct rows of the grid's sizes, largest first; shares are of the `asked` training rows."""
    return tuple(sorted({*study.grid.rows, *(max(1, round(share * asked)) for share in study.grid.shares)}, reverse=True))


def steps_of(epochs: float, rows: int, batch: int) -> int:
    """Optimizer steps that show every row `epochs` times, the last batch filled up with rows of the next pass."""
    return math.ceil(round(epochs * rows / batch, 9))


def cells_of(study: Study, asked: int) -> tuple[Cell, ...]:
    """The grid: sizes x (steps and epochs) x seeds."""
    found: dict[str, Cell] = {}
    batch = study.training.global_batch
    for rows in sizes_of(study, asked):
        exposures = (*study.grid.steps, *(steps_of(epochs, rows, batch) for epochs in study.grid.epochs))
        for steps, draw, seed in itertools.product(exposures, study.subsets.seeds, study.training.seeds):
            cell = Cell(f"{subset_name(rows, draw)}-s{steps:04d}-t{seed}", rows, steps, steps * batch / rows, draw, seed)
            found.setdefault(cell.name, cell)  # an epoch can be as long as one of the step counts
    return tuple(found.values())


def make_plan(study: Study) -> Plan:
    """Raises UserError for whatever of the study cannot be done."""
    _answerable(study)
    require_prices(study)
    task = load(study.task["name"])
    params = parse(task.params, study.task, "[task]")
    if task.rich and not study.synthesis.teacher:
        raise UserError(f"synthesis.teacher is missing: the rows of task {task.name!r} are written by a model, e.g. 'vllm/...'")
    if not task.rich and (study.synthesis.teacher or study.train_on == "rich"):
        raise UserError(f"the rows of task {task.name!r} bring their own answers: take out synthesis.teacher and train_on = 'rich'")
    train_rows = _drawn(list(task.train(params)), task.strata, study.synthesis.rows, study.synthesis.seed, "synthesis.rows")
    usable = sum(row.problem is None for row in train_rows)
    sizes = sizes_of(study, usable)
    if sizes[0] > usable:
        raise UserError(f"grid: {sizes[0]} rows are wanted and there are at most {usable}; lower the size, raise synthesis.rows or give the task more rows")
    pool = list(task.evaluation(params))
    if study.evaluation.per_value is not None:
        chosen = sampling.per_value([row.fields for row in pool], task.strata, study.evaluation.per_value, study.evaluation.seed)
        evaluation_rows = [pool[index] for index in chosen]
    else:
        evaluation_rows = _evaluation_rows(pool, (*task.strata, task.cluster), study.evaluation)

    shards: dict[str, tuple[Example, ...]] = {}
    steps: list[Step] = []
    for split, rows in (("train", train_rows), ("evaluation", evaluation_rows)):
        for step, shard in _synthesize_steps(study, task, params, split, rows):
            shards[step.key] = shard
            steps.append(step)
    train_shards = tuple(step for step in steps if step.name.startswith("train"))
    evaluation_shards = tuple(step for step in steps if step.name.startswith("evaluation"))
    subsets = _subset_steps(study, task, sizes, train_shards)
    cells = cells_of(study, usable)
    trained = _train_steps(study, task, cells, subsets, evaluation_shards)
    generated = _generate_steps(study, task, evaluation_rows, trained)
    judged = _judge_steps(study, task, generated)
    report = Step(
        "report",
        study.name,
        {"version": VERSIONS["report"], "study": study.model_dump(mode="json") | {"task": params}},
        (*evaluation_shards, *subsets.values(), *trained, *generated, *judged),
    )
    every = (*steps, *subsets.values(), *trained, *generated, *judged, report)
    return Plan(study, task, params, tuple(train_rows), tuple(evaluation_rows), shards, cells, every)


def _answerable(study: Study) -> None:
    """Raises UserError for what a model behind an endpoint cannot do for this study."""
    if (base := ModelName.parse(study.base)).behind_endpoint:
        raise UserError(f"base = {study.base!r} is behind an endpoint and cannot be trained; give the model that {base.name} is by its hub name or its folder")
    teacher = ModelName.parse(study.synthesis.teacher) if study.synthesis.teacher else None
    if teacher and teacher.provider == "groq":
        sampling = study.synthesis.sampling
        if unknown := [name for name in ("top_k", "min_p", "repetition_penalty") if getattr(sampling, name) != Sampling.model_fields[name].default]:
            raise UserError(f"synthesis.sampling: groq takes no {', '.join(unknown)}, and without it the answers would be others; take it out")


def _drawn(rows: list[Example], strata: tuple[str, ...], size: int | None, seed: int, what: str) -> list[Example]:
    """Rows by id: the order of the task's nested loops plays no part in what follows."""
    if size is not None:
        try:
            chosen = sampling.balanced([row.fields for row in rows], strata, size, seed)
        except UserError as error:
            raise UserError(f"{what}: {error}") from error
        rows = [rows[index] for index in chosen]
    return sorted(rows, key=lambda row: row.row_id)


def _evaluation_rows(pool: list[Example], strata: tuple[str, ...], evaluation: Evaluation) -> list[Example]:
    """`count` rows, as many of each tier as of the others (one more of the first few where it does not divide)."""
    assert evaluation.count is not None
    tiers = sorted({row.tier for row in pool})
    found = []
    for index, tier in enumerate(tiers):
        share = evaluation.count // len(tiers) + (index < evaluation.count % len(tiers))
        found += _drawn(
            [row for row in pool if row.tier == tier],
            strata,
            share,
            evaluation.seed,
            "evaluation.count" if len(tiers) == 1 else f"evaluation.count, tier {tier!r}",
        )
    return sorted(found, key=lambda row: row.row_id)


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
            "split": split,
            "prompts": prompts_digest(chunk, *((task.rich, task.plain) if task.rich else (task.plain,))),
            "answers": None if task.rich else digest([[row.answer, row.problem] for row in chunk]),
        }
        made.append((Step("synthesize", f"{split}-{index:04d}of{len(chunks):04d}", config), chunk))
    return made


def prompts_digest(rows: Iterable[Example], *prompts: Callable[[Mapping[str, str]], Conversation]) -> str:
    """sha256 over the lengths of all texts, then the texts: for 10^6 rows twice the time of making them; by way of JSON, thirteen times.

    Of a conversation these are its roles and what each says. A first message that is the row's before (an instruction to all)
    is hashed once. Of `rows` the order counts.
    """
    texts: list[str] = []
    add = texts.append
    heads: list[dict[str, str] | None] = [None] * len(prompts)
    numbered = tuple(enumerate(prompts))
    for row in rows:
        add(row.row_id)
        fields = row.fields
        for number, prompt in numbered:
            conversation = prompt(fields)
            if conversation[0] == heads[number]:
                message = conversation[-1]
                if len(conversation) == 2:
                    add("= " + message["role"])
                    add(message["content"])
                    continue
                roles = "= "
                conversation = conversation[1:]
            else:
                heads[number] = conversation[0]
                roles = ""
            add(roles + " ".join(message["role"] for message in conversation))  # in no role is a space or "=", so it tells how many follow
            texts += [message["content"] for message in conversation]
    lengths = struct.pack(f"<{len(texts) + 1}I", len(texts), *map(len, texts))
    return hashlib.sha256(lengths + "".join(texts).encode()).hexdigest()


def _subset_steps(study: Study, task: Task, sizes: tuple[int, ...], shards: tuple[Step, ...]) -> dict[str, Step]:
    made: dict[str, Step] = {}
    for draw in study.subsets.seeds:
        larger: Step | None = None
        for size in sizes:
            config = {
                "version": VERSIONS["subset"],
                "size": size,
                "may_miss": study.subsets.may_miss,
                "seed": draw,
                "strata": task.strata,
                "train_on": study.train_on,
            }
            name = subset_name(size, draw)
            made[name] = larger = Step("subset", name, config, (larger,) if study.subsets.nested and larger else shards)
    return made


def _train_steps(study: Study, task: Task, cells: tuple[Cell, ...], subsets: dict[str, Step], evaluation: tuple[Step, ...]) -> list[Step]:
    shared: dict[str, Any] = {"version": VERSIONS["train"], "base": study.base, "precision": study.precision}
    training = study.training.model_dump(exclude={"seeds"})
    made = []
    for cell in cells:
        config = shared | {"training": training, "steps": cell.steps, "seed": cell.seed}
        made.append(Step("train", cell.name, config, (subsets[cell.subset], *evaluation)))
    zero = shared | {"training": training, "steps": 0, "seed": study.training.seeds[0]}
    return [Step("train", ZERO, zero, evaluation), *made]


def _generate_steps(study: Study, task: Task, rows: list[Example], trained: list[Step]) -> list[Step]:
    config = {
        "version": VERSIONS["generate"],
        "base": study.base,
        "precision": study.precision,
        "sampling": study.generation,
        "prompts": prompts_digest(rows, task.plain),
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
        "detectable": detectable(plan),
    }


def detectable(plan: Plan) -> dict[str, Any] | None:
    """The smallest win rate above 0.5 that the study tells from it, for one cell alone and for all after Holm's correction.

    None without judges. A distance is None where no win rate would do.
    """
    if not plan.study.judging.judges:
        return None
    from pipeline.analysis.rates import ICC, smallest_detectable

    prompts, clusters = len(plan.evaluation_rows), len({row.fields[plan.task.cluster] for row in plan.evaluation_rows})
    alone, corrected = smallest_detectable(prompts, clusters), smallest_detectable(prompts, clusters, len(plan.cells))
    return {
        "prompts": prompts, "clusters": clusters, "assumed_icc": ICC, "power": 0.8,
        "one_cell": alone and 0.5 + alone, "all_cells": corrected and 0.5 + corrected,
    }  # fmt: skip


def cost(plan: Plan) -> dict[str, Any]:
    study, task = plan.study, plan.task
    asked = len(plan.train_rows) + len(plan.evaluation_rows)
    models = len(plan.stage("generate"))
    evaluation = len(plan.evaluation_rows)
    judged = Counter(str(step.config["protocol"]) for step in plan.stage("judge"))
    verdicts = {name: pairs * evaluation * len(judging.PROTOCOLS[name].orders) for name, pairs in judged.items()}
    steps = sum(cell.steps for cell in plan.cells)
    rich = _tokens(task.rich, plan.train_rows) if task.rich else 0.0
    plain = _tokens(task.plain, plan.evaluation_rows)
    answer = study.generation.max_tokens
    exposures = steps * study.training.global_batch
    return {
        "rows": asked,
        "training_rows": exposures,
        "steps": steps,
        "requests": {"synthesize": asked if task.rich else 0, "generate": models * evaluation, "judge": sum(verdicts.values())},
        "tokens_estimated": {
            "synthesize": round(asked * (rich + study.synthesis.sampling.max_tokens)) if task.rich else 0,
            "train": round(exposures * tokens_per_training_row(plan)),
            "generate": round(models * evaluation * (plain + answer)),
            "judge": round(sum(count * (plain + 2 * answer + _question_tokens(task, name) + _verdict_tokens(name)) for name, count in verdicts.items())),
        },
        "endpoints": _endpoints(plan),
    }


def tokens_per_training_row(plan: Plan) -> float:
    """Prompt and answer, estimated; a teacher's answer at its longest."""
    study, task = plan.study, plan.task
    prompt = task.rich if study.train_on == "rich" else task.plain
    answer = study.synthesis.sampling.max_tokens if task.rich else _mean(len(row.answer or "") / CHARS_PER_TOKEN for row in plan.train_rows)
    return _tokens(prompt, plan.train_rows) + answer


def planned_use(plan: Plan, done: Collection[str] = ()) -> dict[str, Usage]:
    """Model behind an endpoint -> what its steps whose keys are not in `done` will use, every answer at its longest, no retries."""
    study, task, found = plan.study, plan.task, dict[str, Usage]()
    evaluation = len(plan.evaluation_rows)
    missing = [step for step in (*plan.stage("synthesize"), *plan.stage("judge")) if step.key not in done and paid(step)]
    rich = _tokens(task.rich, plan.train_rows) if missing and task.rich else 0.0
    judged = _tokens(task.plain, plan.evaluation_rows) + 2 * study.generation.max_tokens if missing else 0.0
    questions: dict[str, float] = {name: _question_tokens(task, name) for name in study.judging.protocols} if study.judging.judges else {}
    for step in missing:
        if step.stage == "synthesize":
            count, asked, answered = len(plan.shards[step.key]), rich, study.synthesis.sampling.max_tokens
        else:
            protocol = str(step.config["protocol"])
            count, asked, answered = evaluation * len(judging.PROTOCOLS[protocol].orders), judged + questions[protocol], _verdict_tokens(protocol)
        found = added(found, str(asked_model(step)), Usage(count, math.ceil(count * asked), count * answered))
    return found


def _endpoints(plan: Plan) -> dict[str, Any] | None:
    """What the whole study asks of endpoints and what that costs; None where it asks none. money: None without the prices."""
    use, prices = planned_use(plan), plan.study.prices
    if not use:
        return None
    models = {
        model: {"requests": usage.requests, "input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens, "money": money(prices, {model: usage})}
        for model, usage in use.items()
    }
    day = prices.date.isoformat() if prices.date else None
    return {"models": models, "money": money(prices, use), "currency": prices.currency, "prices_of": day}


def _question_tokens(task: Task, protocol: str) -> float:
    """Of a question to a judge without what is judged."""
    return _conversation_tokens(_sample_question(task, protocol, 0))


def _verdict_tokens(protocol: str) -> int:
    """Of a judge's answer at its longest."""
    return judging.PROTOCOLS[protocol].sampling.max_tokens


def _tokens(prompt: Any, rows: tuple[Example, ...]) -> float:
    """Mean tokens of a prompt, over at most 200 rows spread evenly."""
    sample = rows[:: max(1, len(rows) // 200)]
    return _mean(_conversation_tokens(prompt(row.fields)) for row in sample)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)


def _conversation_tokens(conversation: Conversation) -> float:
    return sum(len(message["content"]) for message in conversation) / CHARS_PER_TOKEN
