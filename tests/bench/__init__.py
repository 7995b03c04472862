"""Benchmarks: ours against what a user would do without us, both in one run, interleaved; ratios count, not seconds.

`make bench` runs them all; `python -m tests.bench NAME... --rounds N` some of them. Results are kept in results.json
beside this file, and BENCHMARKS.md is written from it.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
TABLE = HERE.parent.parent / "BENCHMARKS.md"


@dataclass(frozen=True)
class Sides:
    """Each call does one round of work and returns its cost (seconds, or seconds per unit of work). theirs: None where a bar is absolute."""

    ours: Callable[[], float]
    theirs: Callable[[], float] | None = None
    warm_up: bool = True
    facts: Callable[[], dict[str, Any]] | None = None
    """Of the last round: sizes, peaks, whether both sides did the same."""


@dataclass(frozen=True)
class Benchmark:
    """bar: the least ratio that is wanted, theirs to ours; of an absolute one the most seconds."""

    name: str
    ours: str
    against: str
    bar: float
    open: Callable[[], AbstractContextManager[Sides]]
    at_most: float | None = None
    """The bar of an absolute one, in seconds."""
    in_worker: bool = True
    """Whether it is a worker's doing, whose environment is another than that of the command line."""

    @property
    def wanted(self) -> str:
        return f"at most {self.at_most:g} s" if self.at_most is not None else f"at least {self.bar:g} x"


def measure(benchmark: Benchmark, rounds: int, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The sides take turns, and take turns in going first."""
    with benchmark.open() as sides:
        if sides.warm_up:
            for side in (sides.ours, sides.theirs):
                if side:
                    side()
        ours, theirs = list[float](), list[float]()
        for number in range(rounds):
            order = [(ours, sides.ours), (theirs, sides.theirs)]
            for costs, side in order if number % 2 == 0 else reversed(order):
                if side:
                    costs.append(side())
            said = f"{ours[-1]:.4g}" + (f" against {theirs[-1]:.4g}: {theirs[-1] / ours[-1]:.3f} x" if theirs else "")
            say(f"{benchmark.name} {number + 1}/{rounds}: {said}")
        facts = sides.facts() if sides.facts else {}
    values = [other / mine for mine, other in zip(ours, theirs, strict=True)] if theirs else ours
    low, high, coverage = interval(values)
    median = statistics.median(values)
    return {
        "name": benchmark.name, "rounds": rounds, "values": values, "ours": ours, "theirs": theirs, "median": median, "low": low, "high": high,
        "coverage": coverage, "reached": median <= benchmark.at_most if benchmark.at_most is not None else median >= benchmark.bar,
        "facts": facts, "machine": machine(), "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


def interval(values: Sequence[float], wanted: float = 0.95) -> tuple[float, float, float]:
    """An interval for the median by order statistics, which assumes nothing about the values, and its coverage.

    The narrowest symmetric one of at least `wanted`; all of the values where they are too few for that.
    """
    ordered, count = sorted(values), len(values)
    best = (ordered[0], ordered[-1], 1 - 2 * 0.5**count)
    for rank in range(1, count // 2 + 1):
        outside = 2 * sum(math.comb(count, index) for index in range(rank)) / 2**count
        if 1 - outside < wanted:
            break
        best = (ordered[rank - 1], ordered[count - rank], 1 - outside)
    return best


def machine() -> str:
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.processor()}, {psutil.virtual_memory().total / 2**30:.0f} GiB"


def keep(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Write the results beside those of other benchmarks that are there; all of them by name."""
    there: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    there |= {result["name"]: result for result in results}
    RESULTS.write_text(json.dumps(there, indent=1) + "\n")
    return there


def table(benchmarks: Sequence[Benchmark], results: dict[str, dict[str, Any]]) -> str:
    lines = ["| what | against | bar | median | interval | machine | date |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for item in benchmarks:
        found = results.get(item.name)
        if found is None:
            lines.append(f"| {item.ours} | {item.against} | {item.wanted} | not run | | | |")
            continue
        unit = "s" if item.at_most is not None else "x"
        verdict = "" if found["reached"] else " (missed)"
        facts = "".join(f"; {name} {value}" for name, value in found["facts"].items())
        lines.append(
            f"| {item.ours} | {item.against}{facts} | {item.wanted} | {found['median']:.2f} {unit}{verdict} "
            f"| {found['low']:.2f} to {found['high']:.2f} ({found['coverage']:.0%}, {found['rounds']} rounds) | {found['machine']} | {found['date']} |"
        )
    return "\n".join(lines) + "\n"
