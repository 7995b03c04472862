"""Cells of a study on a small random Llama through the command line: killed and run again, sharing the base, in a gang."""

from __future__ import annotations

import time

import pytest

from tests.runs import datadose, start, tables
from tests.test_training import base, pytestmark

__all__ = ["base", "pytestmark"]

STUDY = """
name = "dose"
base = "{base}"
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
rows = [16, 8]
steps = [20, 30]
[training]
quantization = "none"
warmup_steps = 0
optimizer = "adamw"
learning_rate = 1e-3
rank = 4
alpha = 8
"""


@pytest.fixture(scope="module")
def study(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("dose") / "dose.toml"
    path.write_text(STUDY.format(base=base))
    return path


def trained(study, store, address, **settings: str):
    """Rows, subsets and cells; what the cells' steps hold."""
    for stage in ("synthesize", "subset", "train"):
        run = datadose("run", study, "--only", stage, store=store, RAY_ADDRESS=address, **settings)
        assert run.returncode == 0, run.stdout + run.stderr
    return cells_of(store)


def cells_of(store):
    return {name: value for name, value in tables(store).items() if name.startswith("train/")}


@pytest.fixture(scope="module")
def alone(study, tmp_path_factory, ray_address):
    return trained(study, tmp_path_factory.mktemp("alone"), ray_address)


def near(found, wanted):
    import torch
    from safetensors.torch import load

    assert found.keys() == wanted.keys()
    adapters = [name for name in wanted if name.endswith("adapter_model.safetensors")]
    assert len(adapters) == 5  # zero and four cells
    for name in adapters:
        one, other = (torch.cat([tensor.flatten() for _, tensor in sorted(load(cells[name]).items())]) for cells in (found, wanted))
        assert (one - other).norm() <= 1e-3 * other.norm()
    return True


def test_killed_run_goes_on_from_its_checkpoints_and_ends_with_the_same_bytes(study, alone, tmp_path, ray_address):
    store = tmp_path / "store"
    for stage in ("synthesize", "subset"):
        assert datadose("run", study, "--only", stage, store=store, RAY_ADDRESS=ray_address).returncode == 0
    process = start("run", study, "--only", "train", store=store, RAY_ADDRESS=ray_address, DATADOSE_CHECKPOINT_EVERY_S="0")
    while not any(int(path.name.split("-")[1]) >= 3 for path in (store / "checkpoints").rglob("packed-*")):
        assert process.poll() is None, process.wait().stderr
        time.sleep(0.01)  # polls another program's files
    import os
    import signal

    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = list((store / "checkpoints").rglob("packed-*"))
    assert left
    assert trained(study, store, ray_address) == alone
    assert not [path for path in (store / "checkpoints").rglob("*") if path.is_file()]


def test_cells_that_share_the_base_are_the_cells_alone(study, alone, tmp_path, ray_address):
    assert near(trained(study, tmp_path, ray_address, DATADOSE_SHARE_BASE="3"), alone)


def test_cells_in_a_gang_are_the_cells_alone(study, alone, tmp_path, ray_address):
    assert near(trained(study, tmp_path, ray_address, DATADOSE_TRAIN_WORKERS="2", DATADOSE_GANG="2"), alone)


def test_which_trainer_ran_is_recorded(study, alone, tmp_path, ray_address):
    import json

    assert near(trained(study, tmp_path, ray_address, DATADOSE_TRAINER="trl"), alone)
    facts = [json.loads(path.read_text())["facts"] for path in (tmp_path / "manifests/train").glob("*.json")]
    assert {item["trainer"] for item in facts} == {"trl"}


def test_trainer_that_is_not_installed_ends_the_run_with_what_to_install(study, tmp_path, ray_address):
    for stage in ("synthesize", "subset"):
        assert datadose("run", study, "--only", stage, store=tmp_path, RAY_ADDRESS=ray_address).returncode == 0
    run = datadose("run", study, "--only", "train", store=tmp_path, RAY_ADDRESS=ray_address, DATADOSE_TRAINER="unsloth")
    assert run.returncode == 2
    assert "pip install unsloth" in run.stderr
