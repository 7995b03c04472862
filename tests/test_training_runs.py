"""Cells of a study on a small random Llama through the command line: killed and run again, sharing the base, in a gang."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import pytest

from tests.runs import SMALL, datadose, start, tables
from tests.test_training import base
from tests.test_training import pytestmark as warnings

__all__ = ["base"]

pytestmark = [*warnings, pytest.mark.long]

TRAINING = """
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
    text = SMALL.replace('base = "scripted/writer"', f'base = "{base}"').replace("rows = [8]\nsteps = [2]", "rows = [16, 8]\nsteps = [5, 8]")
    path.write_text(text.partition("[judging]")[0] + TRAINING)
    return path


@pytest.fixture(scope="module")
def rows(study, tmp_path_factory, ray_address):
    """A store that lacks the cells alone."""
    store = tmp_path_factory.mktemp("rows")
    for stage in ("synthesize", "subset"):
        assert datadose("run", study, "--only", stage, store=store, RAY_ADDRESS=ray_address).returncode == 0
    return store


@pytest.fixture
def store(rows, tmp_path):
    return shutil.copytree(rows, tmp_path / "store")


def trained(study, store, address, **settings: str):
    """What the cells' steps hold."""
    run = datadose("run", study, "--only", "train", store=store, RAY_ADDRESS=address, **settings)
    assert run.returncode == 0, run.stdout + run.stderr
    return {name: value for name, value in tables(store).items() if name.startswith("train/")}


@pytest.fixture(scope="module")
def alone(study, rows, tmp_path_factory, ray_address):
    cells = trained(study, shutil.copytree(rows, tmp_path_factory.mktemp("alone") / "store"), ray_address)
    assert sum(name.endswith("adapter_model.safetensors") for name in cells) == 5  # zero and four cells
    return cells


def near(found, wanted):
    import torch
    from safetensors.torch import load

    assert found.keys() == wanted.keys()
    adapters = [name for name in wanted if name.endswith("adapter_model.safetensors")]
    assert adapters
    for name in adapters:
        one, other = (torch.cat([tensor.flatten() for _, tensor in sorted(load(cells[name]).items())]) for cells in (found, wanted))
        assert (one - other).norm() <= 1e-3 * other.norm()
    return True


def test_killed_run_goes_on_from_its_checkpoints_and_ends_with_the_same_bytes(study, alone, store, ray_cluster):
    process = start("run", study, "--only", "train", store=store, RAY_ADDRESS=ray_cluster.address, DATADOSE_CHECKPOINT_EVERY_S="0")
    while not any(int(path.name.split("-")[1]) >= 3 for path in (store / "checkpoints").rglob("packed-*")):
        assert process.poll() is None, process.wait().stderr
        time.sleep(0.01)  # polls another program's files
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    ray_cluster.settled()
    left = list((store / "checkpoints").rglob("packed-*"))
    assert left
    assert trained(study, store, ray_cluster.address) == alone
    assert not [path for path in (store / "checkpoints").rglob("*") if path.is_file()]


def test_cells_that_share_the_base_are_the_cells_alone(study, alone, store, ray_address):
    assert near(trained(study, store, ray_address, DATADOSE_SHARE_BASE="3"), alone)


def test_cells_in_a_gang_are_the_cells_alone(study, alone, store, ray_address):
    assert near(trained(study, store, ray_address, DATADOSE_TRAIN_WORKERS="2", DATADOSE_GANG="2"), alone)


def test_which_trainer_ran_is_recorded(study, alone, store, tmp_path, ray_address):
    one = tmp_path / "one.toml"
    one.write_text(study.read_text().replace("rows = [16, 8]\nsteps = [5, 8]", "rows = [8]\nsteps = [5]"))
    found = trained(one, store, ray_address, DATADOSE_TRAINER="trl")
    assert near(found, {name: alone[name] for name in found})
    facts = [json.loads(path.read_text())["facts"] for path in (store / "manifests/train").glob("*.json")]
    assert [item["trainer"] for item in facts] == ["trl"] * 2  # zero and the cell


def test_trainer_that_is_not_installed_ends_the_run_with_what_to_install(study, store, ray_address):
    run = datadose("run", study, "--only", "train", store=store, RAY_ADDRESS=ray_address, DATADOSE_TRAINER="unsloth")
    assert run.returncode == 2
    assert "pip install unsloth" in run.stderr
