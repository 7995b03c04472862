"""Engines that outlive a stage: found again where they fit, made anew where they do not or were killed, and honest when they cannot start."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pipeline import preflight
from pipeline.llm.vllm_engine import CONTEXT_TOKENS, context_tokens
from pipeline.plan import make_plan
from pipeline.runtime import Runtime
from pipeline.study import load_study
from tests.runs import ROOT, environment

CODE = """
import asyncio
import os
import signal
import pytest
import ray
from pipeline.errors import UserError
from pipeline.llm import Request
from pipeline.plan import make_plan
from pipeline.runtime import Runtime
from pipeline.stages.engines import RemoteEngine, end_engines, engines_for
from pipeline.stages.workers import ensure_ray
from pipeline.study import Sampling, load_study

runtime, study = Runtime(), load_study("laptop")
ensure_ray(runtime)
first = engines_for("scripted/writer", runtime, study, adapters=3, workers=1)
assert engines_for("scripted/writer", runtime, study, adapters=0, workers=1) == first
roomier = engines_for("scripted/writer", runtime, study, adapters=4, workers=1)
assert roomier != first
with pytest.raises(ray.exceptions.RayActorError):
    ray.get(first[0].start.remote(), timeout=60)
engine, request = RemoteEngine(roomier[0]), Request(make_plan(study).task.rich(make_plan(study).train_rows[0].fields), Sampling(), 7)
before = asyncio.run(engine.complete(request))
killed = ray.get(roomier[0].__ray_call__.remote(lambda self: os.getpid()))
os.kill(killed, signal.SIGKILL)
assert asyncio.run(engine.complete(request)).text == before.text
assert ray.get(roomier[0].__ray_call__.remote(lambda self: os.getpid())) != killed
with pytest.raises(UserError, match="nothing-here is not installed"):
    engines_for("vllm/package:nothing-here@1", runtime, study, adapters=0, workers=1)
end_engines()
ray.shutdown()
"""


def test_engines_are_found_again_made_anew_also_once_killed_or_name_why_they_cannot_start(tmp_path, ray_address):
    run = subprocess.run(
        [sys.executable, "-c", CODE], env=environment(tmp_path, RAY_ADDRESS=ray_address), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(("holds", "wanted"), [(2048, 2048), (131072, CONTEXT_TOKENS)])
def test_engine_takes_no_longer_prompts_than_its_model(tmp_path, holds, wanted):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": holds}))
    assert context_tokens(tmp_path) == wanted


def test_machine_without_libnuma_is_told_so_before_an_engine_is_started(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(preflight.ctypes, "CDLL", missing)
    (check,) = preflight.libraries(make_plan(load_study("laptop")), Runtime())
    assert not check.passed
    assert "libnuma1" in check.remedy
    assert list(preflight.libraries(make_plan(load_study("laptop")), Runtime(gpus_per_worker=1))) == []
