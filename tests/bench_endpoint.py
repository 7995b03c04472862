"""How fast the client for endpoints is, against the tests' own server on the same machine: no test, run by hand.

python -m tests.bench_endpoint limited [SECONDS]     a limit of 6,000 requests a minute, answers after 200 ms
python -m tests.bench_endpoint unlimited [SECONDS]   no limit, answers after 1 ms
Answers are journaled in a folder store. Each with --actors N for N Ray actors that share a limiter; one process has one of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections import Counter
from typing import Any

import psutil

from pipeline.artifacts import Step, open_store
from pipeline.budget import Usage
from pipeline.journal import Journal
from pipeline.llm import Request, open_model
from pipeline.llm.asking import Asker
from pipeline.llm.limiter import limiter_for
from pipeline.runtime import Runtime
from pipeline.study import Sampling, load_study
from tests.endpoint_server import EndpointServer

LIMIT = 6000
MODEL = "openai-compatible/small"
SAMPLING = Sampling(max_tokens=64)
STEPS, ROWS = 4, 250
"""Steps under way at once, and the rows of each."""


async def ask_on(seconds: float, in_flight: int, runtime: Runtime, limiter: Any, worker: int) -> dict[str, Any]:
    """Ask, as a stage does, the questions of STEPS steps at once, each journaled, for about so long; what became of them, and the process's cost."""
    model, store = open_model(MODEL, runtime, "float32", limiter=limiter), open_store(runtime.store)
    asker = Asker(model, MODEL, load_study("laptop"), {}, in_flight, _tell)
    process = psutil.Process(os.getpid())
    before = process.cpu_times()
    end, outcomes, asked_for = time.monotonic() + seconds, Counter[str](), 0

    async def ask(number: int) -> None:
        nonlocal asked_for
        seed = 0
        while time.monotonic() < end:
            step = Step("synthesize", f"w{worker}-{number}-{seed}", {})
            asked = [{"role": "user", "content": f"Write about kettle {worker} {number} {seed} and say whom it is for."}]
            answered = await asker.ask([Request(asked, SAMPLING, place) for place in range(ROWS)], journal := Journal(store, step))
            await asyncio.to_thread(journal.discard)
            outcomes.update(answer.status for answer in answered.completions)
            asked_for += sum(answer.attempts for answer in answered.completions)
            seed += 1

    await asyncio.gather(*map(ask, range(STEPS)))
    model.close()
    after = process.cpu_times()
    cpu_s = after.user + after.system - before.user - before.system
    return {"statuses": dict(outcomes), "rss_mib": process.memory_info().rss / 2**20, "cpu_ms": 1000 * cpu_s / max(1, asked_for)}


async def _tell(done: int, used: Usage) -> tuple[Usage, None]:
    return used, None


def run(server: EndpointServer, seconds: float, in_flight: int, actors: int, store: str) -> list[dict[str, Any]]:
    runtime = Runtime(endpoint_url=server.url, endpoint_timeout_s=30, store=store)
    if not actors:
        return [asyncio.run(ask_on(seconds, in_flight, runtime, None, 0))]
    import ray

    from pipeline.stages.workers import ensure_ray

    ensure_ray(runtime)
    limiter = limiter_for(MODEL, runtime)

    @ray.remote(num_cpus=0)
    def work(limiter: Any, worker: int) -> dict[str, Any]:
        return asyncio.run(ask_on(seconds, in_flight // actors, runtime, limiter, worker))

    found: list[dict[str, Any]] = ray.get([work.remote(limiter, worker) for worker in range(actors)])
    ray.shutdown()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("limited", "unlimited"))
    parser.add_argument("seconds", type=float, nargs="?", default=60.0)
    parser.add_argument("--actors", type=int, default=0)
    parser.add_argument("--in-flight", type=int, default=0)
    given = parser.parse_args()
    limited = given.what == "limited"
    settings = {"latency_s": 0.2, "requests_per_minute": LIMIT} if limited else {"latency_s": 0.001}
    with EndpointServer(**settings) as server, tempfile.TemporaryDirectory() as store:
        found = run(server, given.seconds, given.in_flight or (256 if limited else 32), given.actors, store)
        server_s = sum(psutil.Process(server.pid).cpu_times()[:2])
        records = server.requests
        over, peak = server.violations(), server.peak_requests()
    span = records[-1].at - records[0].at
    answered = sum(record.delivered_at is not None for record in records)
    print(f"{len(records)} requests, {answered} answered in {span:.1f} s: {answered / span:.1f}/s")
    print(f"server: {1000 * server_s / len(records):.2f} ms of CPU time a request")
    if limited:
        print(f"{answered / span / (LIMIT / 60):.4f} of the limit; {over} over it; at most {peak} of {LIMIT} in a minute")
    for worker in found:
        print(f"statuses {worker['statuses']}, RSS {worker['rss_mib']:.0f} MiB, {worker['cpu_ms']:.2f} ms of CPU time a request")


if __name__ == "__main__":
    main()
