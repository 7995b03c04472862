"""`make bench`: see the package."""

from __future__ import annotations

import argparse
import os
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
    given = parser.parse_args()
    if unknown := set(given.names) - set(names):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if given.rounds < 1:
        parser.error("--rounds: wanted at least 1")
    environment = preload_environment()
    if environment and any(os.environ.get(name) != value for name, value in environment.items()):
        # What a CPU worker preloads, for both sides alike: it counts from a process's first instruction on.
        os.execve(sys.executable, [sys.executable, "-m", "tests.bench", *sys.argv[1:]], os.environ | dict(environment))
    for item in BENCHMARKS:
        if not given.names or item.name in given.names:
            results = keep([measure(item, given.rounds, lambda text: print(text, flush=True))])
            head = TABLE.read_text().partition(MARK)[0]
            TABLE.write_text(head + MARK + "\n" + table(BENCHMARKS, results))


if __name__ == "__main__":
    main()
