"""`make bench`: see the package."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from pipeline.cpu import preload_environment
from tests.bench import TABLE, keep, measure, table
from tests.bench.cases import BENCHMARKS

MARK = "<!-- make bench writes the table below -->\n"


def main() -> None:
    names = [item.name for item in BENCHMARKS]
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Both sides in one run, interleaved.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(names)}; all without any")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--here", action="store_true", help="in this very process and environment, not one of its own for each")
    given = parser.parse_args()
    if unknown := set(given.names) - set(names):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if given.rounds < 1:
        parser.error("--rounds: wanted at least 1")
    for item in BENCHMARKS:
        if given.names and item.name not in given.names:
            continue
        if not given.here:
            # What a CPU worker preloads counts from a process's first instruction on, for both sides alike.
            environment = os.environ | (dict(preload_environment()) if item.in_worker else {})
            subprocess.run([sys.executable, "-m", "tests.bench", "--here", item.name, "--rounds", str(given.rounds)], env=environment, check=True)
            continue
        results = keep([measure(item, given.rounds, lambda text: print(text, flush=True))])
        head = TABLE.read_text().partition(MARK)[0]
        TABLE.write_text(head + MARK + "\n" + table(BENCHMARKS, results))


if __name__ == "__main__":
    main()
