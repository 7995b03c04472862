"""Runs of `datadose` as a user types it: in a process of its own, with a store of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

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
    # An embedded Ray turns tokens on by itself; whoever attaches to one has to say so.
    attached = {"RAY_AUTH_MODE": "token"} if extra.get("RAY_ADDRESS") else {}
    return {**kept, "DATADOSE_STORE": str(store), "DATADOSE_MEMORY_GIB": "1", "RAY_ADDRESS": "", **attached, **extra}


def datadose(*arguments: str | Path, store: Path | str, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(store, **extra), capture_output=True, text=True, check=False, timeout=900)


def contents(store: Path) -> dict[str, tuple[str, int]]:
    """Every file of a store: digest and time of the last change."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def tables(store: Path) -> dict[str, object]:
    """Content of every committed table and adapter, by step; clocks left out."""
    found: dict[str, object] = {}
    for path in sorted((store / "manifests").rglob("*.json")):
        manifest = json.loads(path.read_text())
        for name, item in manifest["objects"].items():
            data = store / item["key"]
            if name.endswith(".parquet"):
                table = pq.read_table(data)
                found[f"{manifest['step']}/{name}"] = table.drop_columns([column for column in ("seconds",) if column in table.column_names]).to_pylist()
            elif "adapter" in name:
                found[f"{manifest['step']}/{name}"] = data.read_bytes()
    return found


def start(study: Path, store: Path, **extra: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.cli", "run", str(study)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(store, **extra), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
