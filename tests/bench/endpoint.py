"""Our client of endpoints, journal and all, against vLLM's own benchmark client: both ask `vllm serve` on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pipeline.artifacts import Step, open_store
from pipeline.budget import NO_LIMIT, Tally, Usage
from pipeline.journal import Journal
from pipeline.llm import Request, open_model
from pipeline.llm.asking import Asker
from pipeline.runtime import Runtime
from pipeline.study import Sampling, load_study
from tests.bench import Sides
from tests.vllm_server import KEY, NAME, Served, serving

PROMPTS, AT_ONCE = 96, 32
GREEDY = Sampling(temperature=0, max_tokens=24)
VLLM_BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@contextlib.contextmanager
def endpoint() -> Iterator[Sides]:
    """The same prompts, as many at once."""
    os.environ["OPENAI_API_KEY"] = KEY
    texts = [f"Write a few sentences about {thing} for visitor number {number}." for number, thing in enumerate(["cats", "rain", "bread"] * (PROMPTS // 3))]
    with tempfile.TemporaryDirectory() as scratch, serving(Path(scratch) / "log") as served:
        prompts = Path(scratch) / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        yield Sides(lambda: _ours(served, texts, Path(scratch)), lambda: _vllms(served, prompts))


def _question(text: str, sampling: Sampling = GREEDY) -> Request:
    return Request([{"role": "user", "content": text}], sampling, 0)


def _ours(served: Served, texts: list[str], folder: Path) -> float:
    """Seconds for a token."""
    tally = Tally(NO_LIMIT, 0, Counter())

    async def tell(done: int, used: Usage) -> tuple[Usage, str | None]:
        return tally.use(used)

    async def run() -> float:
        model = open_model(NAME, Runtime(endpoint_url=served.url), "float32")
        journal = Journal(open_store(str(folder / "store")), Step("synthesize", "speed", {}))
        asker = Asker(model, NAME, load_study("laptop"), {}, AT_ONCE, tell)
        await model.complete(_question("Say yes.", GREEDY.model_copy(update={"max_tokens": 1})))  # theirs sends one too before its clock starts
        started = time.monotonic()
        answered = await asker.ask([_question(text) for text in texts], journal)
        seconds = time.monotonic() - started
        model.close()
        return seconds / sum(answer.completion_tokens for answer in answered.completions)

    return asyncio.run(run())


def _vllms(served: Served, prompts: Path) -> float:
    """Seconds for a token. Raises RuntimeError where it does not answer every prompt."""
    command = [
        sys.executable, "-c", VLLM_BENCH_SERVE, "--backend", "openai-chat", "--endpoint", "/v1/chat/completions",
        "--base-url", served.url.removesuffix("/v1"), "--model", "smollm2", "--tokenizer", str(served.weights), "--temperature", "0",
        "--dataset-name", "custom", "--dataset-path", str(prompts), "--custom-output-len", str(GREEDY.max_tokens), "--skip-chat-template", "--disable-shuffle",
        "--num-prompts", str(PROMPTS), "--max-concurrency", str(AT_ONCE), "--save-result", "--result-dir", str(prompts.parent),
        "--result-filename", "result.json", "--disable-tqdm",
    ]  # fmt: skip
    ran = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(ran.stderr[-3000:])
    result = json.loads((prompts.parent / "result.json").read_text())
    if result["completed"] != PROMPTS:
        raise RuntimeError(f"{result['completed']} of {PROMPTS} prompts were answered")
    return 1 / float(result["output_throughput"])
