"""Runs of `datadose` as a user types it: in a process of its own, with a store of its own.

The process is forked from a server that has imported the heavy libraries once: ten seconds less for every run.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent

REHEARSAL = ROOT / "tests" / "rehearsal.toml"
"""Scripted models; a teacher some of whose rows are quarantined."""

SMALL = """
name = "small"
base = "scripted/writer"
precision = "float32"
[task]
name = "posts"
companies = ["penrook"]
held_out = ["wrenfold-software"]
[synthesis]
teacher = "scripted/writer"
rows = 24
[evaluation]
count = 3
[grid]
rows = [8]
steps = [2]
[judging]
judges = ["scripted/longest"]
"""


def environment(store: Path | str, **extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DATADOSE_")}
    ray = {"RAY_ADDRESS": "", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}  # the last two as where Ray is embedded
    return {**kept, "DATADOSE_STORE": str(store), "DATADOSE_MEMORY_GIB": "1", **ray, **extra}


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "altair", "boto3", "jinja2", "ray.data", "ray.train.v2.api.data_parallel_trainer", "scipy.stats", "sklearn.feature_extraction.text",
    "sklearn.model_selection", "statsmodels.api", "vl_convert",
])  # fmt: skip
# Nothing of this project: a fork imports it as it is, with the console of its own output.


@dataclass(frozen=True)
class Finished:
    returncode: int
    stdout: str
    stderr: str


class Run:
    """One `datadose` under way. returncode as subprocess has it: negative where a signal ended it."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str]) -> None:
        self._output = tempfile.TemporaryDirectory()
        paths = [str(Path(self._output.name) / name) for name in ("stdout", "stderr")]
        self._process: Any = FORKS.Process(target=_main, args=(arguments, dict(environment), *paths))
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode  # type: ignore[no-any-return]

    def family(self) -> list[psutil.Process]:
        """The processes that it has started, and they; none once it has ended."""
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def wait(self, timeout: float = 900) -> Finished:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"datadose did not end within {timeout} s:\n{self._read('stderr')}")
        with self._output:
            return Finished(self._process.exitcode, self._read("stdout"), self._read("stderr"))

    def _read(self, name: str) -> str:
        path = Path(self._output.name) / name
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _main(arguments: list[str], environment: Mapping[str, str], out: str, err: str) -> None:
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    if "CRASH_CONTROL" in environment:  # an interpreter that starts finds it on its PYTHONPATH
        runpy.run_path(str(ROOT / "tests" / "crash" / "sitecustomize.py"))
    sys.argv = ["datadose", *arguments]
    from jobs.cli import main

    main()


def start(*arguments: str | Path, store: Path | str, **extra: str) -> Run:
    return Run([*map(str, arguments)], environment(store, **extra))


def datadose(*arguments: str | Path, store: Path | str, **extra: str) -> Finished:
    return start(*arguments, store=store, **extra).wait()


def contents(store: Path) -> dict[str, tuple[str, int]]:
    """Every file of a store: digest and time of the last change."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def tables(store: Path) -> dict[str, object]:
    """Content of every committed table and adapter, by step; clocks and memory left out."""
    found: dict[str, object] = {}
    for path in sorted((store / "manifests").rglob("*.json")):
        manifest = json.loads(path.read_text())
        for name, item in manifest["objects"].items():
            data = store / item["key"]
            if name.endswith(".parquet"):
                table = pq.read_table(data)
                found[f"{manifest['step']}/{name}"] = table.drop_columns(
                    [column for column in ("seconds", "memory_bytes") if column in table.column_names]
                ).to_pylist()
            elif "adapter" in name:
                found[f"{manifest['step']}/{name}"] = data.read_bytes()
    return found


def report_files(store: Path, study: str = "rehearsal") -> dict[str, Path]:
    """The committed report of a study by the names of its files."""
    (manifest,) = (store / "manifests/report").glob(f"{study}-*.json")
    return {name: store / item["key"] for name, item in json.loads(manifest.read_text())["objects"].items()}
