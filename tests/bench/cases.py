"""What is measured. Each opens with everything loaded, and gives two functions that do the same work."""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from pipeline.models import local_model
from pipeline.plan import make_plan
from pipeline.runtime import Runtime
from pipeline.study import ModelName, Training, load_study
from pipeline.training import CellWork, TrainingRow, Watch
from tests.bench import Benchmark, Sides
from tests.bench.endpoint import endpoint
from tests.bench.engines import Remote, answers, folder_of_adapters, judge_ours, judge_shuffled, synthesis_bare, synthesis_ours

TEXT = "the a warm fresh bread order today buy light tent dry boots winter soup and with for every day our new offer join us on store sale best quality"
STEPS = 3
"""Optimizer steps of a round."""


def base() -> Path:
    return local_model(ModelName.parse(load_study("laptop").base), Runtime().cache_dir)


def rows(count: int, words: int) -> list[TrainingRow]:
    """Prompts of the study `laptop` with answers of about as many words as its teacher writes."""
    plan, dice = make_plan(load_study("laptop")), random.Random(1)
    return [
        TrainingRow(f"row{index}", plan.task.plain(example.fields), " ".join(dice.choices(TEXT.split(), k=dice.randint(words - 15, words + 15))))
        for index, example in zip(range(count), itertools.cycle(plan.train_rows))
    ]


def trained(trainer: Any, chosen: list[list[TrainingRow]], steps: int) -> tuple[float, int]:
    """Seconds in optimizer steps and the tokens they saw, of a cell for each list of rows."""
    with tempfile.TemporaryDirectory() as scratch:
        works = []
        for index, few in enumerate(chosen):
            folder = Path(scratch) / str(index)
            folder.mkdir()
            works.append(CellWork(str(index), few, steps, index, [], folder))
        logs = []
        for _, outcome in trainer.run(works, Watch()):
            if isinstance(outcome, Exception):
                raise outcome
            logs += outcome.log
    return sum(entry["seconds"] for entry in logs), sum(entry["tokens"] for entry in logs)


@contextlib.contextmanager
def packed_against_sft() -> Iterator[Sides]:
    """One cell of `laptop`; TRL's first step, in which it warms up, is left out, and so is ours."""
    from pipeline.training.packed import PackedTrainer
    from pipeline.training.sft import SFTTrainers

    study, few = load_study("laptop"), rows(32, 45)
    packed, sft = PackedTrainer(base(), study.training, study.precision), SFTTrainers("trl", base(), study.training, study.precision)

    def per_token(trainer: Any) -> float:
        with tempfile.TemporaryDirectory() as scratch:
            ((_, outcome),) = trainer.run([CellWork("cell", few, 1 + STEPS, 1, [], Path(scratch))], Watch())
        if isinstance(outcome, Exception):
            raise outcome
        losses[trainer.name] = [entry["loss"] for entry in outcome.log]
        after = outcome.log[1:]
        return float(sum(entry["seconds"] for entry in after) / sum(entry["tokens"] for entry in after))

    losses: dict[str, list[float]] = {}

    def facts() -> dict[str, Any]:
        return {"losses differ by at most": f"{max(abs(a - b) for a, b in zip(*losses.values(), strict=True)):.1e}"}

    yield Sides(lambda: per_token(packed), lambda: per_token(sft), False, facts)


def shared(batch: int, words: int, steps: int, cells: int = 8) -> contextlib.AbstractContextManager[Sides]:
    @contextlib.contextmanager
    def opened() -> Iterator[Sides]:
        from pipeline.training.packed import PackedTrainer

        study = load_study("laptop")
        training = Training.model_validate(study.training.model_dump() | {"global_batch": batch})
        many, one = (PackedTrainer(base(), training, study.precision, slots) for slots in (cells, 1))
        every = rows(8 * cells, words)
        chosen = [every[8 * index : 8 * index + 8] for index in range(cells)]
        yield Sides(lambda: trained(many, chosen, steps)[0], lambda: trained(one, chosen, steps)[0])

    return opened()


@contextlib.contextmanager
def rerun() -> Iterator[Sides]:
    """As a user types it, with the interpreter's start; the study was finished with scripted models."""
    from tests.runs import ROOT, environment

    with tempfile.TemporaryDirectory() as store:
        command = [sys.executable, "-m", "jobs.cli", "run", "paper", "--rehearse"]

        def run() -> float:
            started = time.perf_counter()
            ended = subprocess.run(command, env=environment(store), cwd=ROOT, capture_output=True, text=True, check=True)
            printed.append(ended.stdout)
            return time.perf_counter() - started

        printed: list[str] = []
        run()
        yield Sides(run, facts=lambda: {"nothing built": all("nothing to build" in text for text in printed[1:])})


@contextlib.contextmanager
def prompts() -> Iterator[Sides]:
    """10^6 rows: what a plan does with prompts, against formatting them and throwing them away; one thread each, so CPU time counts."""
    from pipeline.plan import SHARD_ROWS, prompts_digest
    from pipeline.tasks import Example

    plan = make_plan(load_study("paper"))
    task, count = plan.task, 1_000_000
    known = [dict(row.fields) for row in plan.train_rows]

    def example(index: int) -> Example:
        again, place = divmod(index, len(known))
        return Example(f"{index:016x}", known[place] | {"company": f"{known[place]['company']} {again}"})

    examples = [example(index) for index in range(count)]
    assert task.rich is not None
    rich, plain, peak = task.rich, task.plain, [0]

    def ours() -> float:
        gc.collect()
        started = time.process_time()
        for start in range(0, count, SHARD_ROWS):
            prompts_digest(examples[start : start + SHARD_ROWS], rich, plain)
        peak[0] = psutil.Process().memory_info().rss
        return time.process_time() - started

    def theirs() -> float:
        gc.collect()
        started = time.process_time()
        for example in examples:
            rich(example.fields)
            plain(example.fields)
        return time.process_time() - started

    yield Sides(ours, theirs, facts=lambda: {"peak GiB": f"{peak[0] / 2**30:.2f}"})


@contextlib.contextmanager
def grid() -> Iterator[Sides]:
    """All 15 cells of `laptop`, from the first load of the base to the last adapter on disk."""
    from pipeline.training.packed import PackedTrainer
    from pipeline.training.sft import SFTTrainers

    study, every = load_study("laptop"), rows(160, 45)
    cells = make_plan(study).cells

    def wall(open_trainer: Callable[[], Any]) -> float:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            works = []
            for cell in cells:
                (folder := Path(scratch) / cell.name).mkdir()
                works.append(CellWork(cell.name, every[: cell.rows], cell.steps, cell.seed, [], folder))
            for _, outcome in open_trainer().run(works, Watch()):
                if isinstance(outcome, Exception):
                    raise outcome
        return time.perf_counter() - started

    yield Sides(
        lambda: wall(lambda: PackedTrainer(base(), study.training, study.precision, 4)),
        lambda: wall(lambda: SFTTrainers("trl", base(), study.training, study.precision)),
        warm_up=False,
    )


@contextlib.contextmanager
def synthesis() -> Iterator[Sides]:
    ours, theirs = Remote(synthesis_ours, 500), Remote(synthesis_bare, 500)
    last: dict[str, Any] = {}

    def per_token(name: str, side: Remote) -> float:
        last[name] = side()
        return float(last[name]["seconds"] / last[name]["tokens"])

    try:
        yield Sides(
            lambda: per_token("ours", ours), lambda: per_token("bare", theirs), facts=lambda: {f"tokens {name}": item["tokens"] for name, item in last.items()}
        )
    finally:
        ours.close()
        theirs.close()


@contextlib.contextmanager
def adapters() -> Iterator[Sides]:
    """From an engine's start to its last token, the base and each adapter; an engine for each means one after the other."""
    scratch, paths = folder_of_adapters(15)

    def wall(groups: list[list[Path | None]]) -> float:
        seconds = 0.0
        for group in groups:
            side = Remote(answers, group)
            seconds += side()["seconds"]
            side.close()
        return seconds

    with scratch:
        yield Sides(lambda: wall([[None, *paths]]), lambda: wall([[None], *([path] for path in paths)]), warm_up=False)


@contextlib.contextmanager
def judging() -> Iterator[Sides]:
    """12 prompts, 15 candidates, both orders: 360 verdicts."""
    ours, theirs = Remote(judge_ours, 12, 15), Remote(judge_shuffled, 12, 15)
    last: dict[str, Any] = {}

    def wall(name: str, side: Remote) -> float:
        last[name] = side()
        return float(last[name]["seconds"])

    def facts() -> dict[str, Any]:
        pairs = list(zip(last["ours"]["verdicts"], last["shuffled"]["verdicts"], strict=True))
        return {"same verdicts": f"{sum(a == b for a, b in pairs)} of {len(pairs)}"}

    try:
        yield Sides(lambda: wall("ours", ours), lambda: wall("shuffled", theirs), facts=facts)
    finally:
        ours.close()
        theirs.close()


BENCHMARKS = (
    Benchmark("synthesis", "synthesis, 500 rows, tokens/s", "one `LLM.chat` call of bare vLLM, engine start left out", 0.95, synthesis),
    Benchmark("grid", "the 15 cells of `laptop`, shared base of 4, wall", "15 SFTTrainer runs of TRL one after the other, loads included", 3.0, grid),
    Benchmark("packed", "`packed`, one cell, tokens/s", "TRL's SFTTrainer, same cell, after warm-up", 1.5, packed_against_sft),
    Benchmark("shared-small", "shared base, K = 8 cells of 2 rows a step", "`packed`, one cell after the other", 1.15, lambda: shared(2, 45, STEPS)),
    Benchmark("shared-laptop", "shared base, K = 8 cells of `laptop` (8 rows a step)", "`packed`, one cell after the other", 1.0, lambda: shared(8, 45, 1)),
    Benchmark("adapters", "base and 15 adapters in one engine, 12 prompts x 60 tokens each, wall", "an engine for each", 3.5, adapters),
    Benchmark("judging", "judge's requests in our order, prefix cache on", "shuffled, cache off", 2.5, judging),
    Benchmark("endpoint", "answers of `vllm serve` through our client, journaled, tokens/s", "vLLM's own benchmark client, same prompts", 0.95, endpoint),
    Benchmark("rerun", "`datadose run` of a finished paper-size study", "–", 0, rerun, 5.0, in_worker=False),
    Benchmark("prompts", "building and hashing 10^6 prompts", "a loop that only formats them", 0.5, prompts, in_worker=False),
)
