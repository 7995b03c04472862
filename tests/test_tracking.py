"""Steps on their way to a tracker: a stand-in for each at the edge."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from pipeline.errors import UserError
from pipeline.training.tracking import PACKAGES, Tracker, values_of

pytestmark = [pytest.mark.fast, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

ENTRIES = [
    {"step": step, "loss": 2.0 / step, "learning_rate": 1e-3, "grad_norm": 0.5, "tokens": 800, "loss_tokens": 300, "seconds": 2.0, "memory_bytes": 2**31}
    for step in (1, 2)
]
WANTED = {"loss": 2.0, "grad_norm": 0.5, "learning_rate": 1e-3, "tokens_per_s": 400.0, "memory_gib": 2.0}


def told(name: str, to: str | None, monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[name], module)
    tracker = Tracker(name, to, "study")
    for entry in ENTRIES:
        tracker.step("train/a", entry)
    tracker.close()


def test_values_of_a_step_are_its_rates_and_sizes():
    assert values_of(ENTRIES[0]) == WANTED


def test_wandb_gets_a_run_for_each_cell_in_the_project_that_was_named(monkeypatch):
    seen: list[object] = []
    run = SimpleNamespace(log=lambda values, step: seen.append((step, values)), finish=lambda: seen.append("finished"))
    module = ModuleType("wandb")
    module.init = lambda **settings: seen.append((settings["project"], settings["name"])) or run  # type: ignore[attr-defined]
    told("wandb", "mine", monkeypatch, module)
    assert seen == [("mine", "train/a"), (1, WANTED), (2, WANTED | {"loss": 1.0}), "finished"]


def test_mlflow_gets_every_value_with_its_step(monkeypatch):
    seen: list[object] = []

    class Client:
        def __init__(self, tracking_uri):
            seen.append(tracking_uri)

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            return name

        def create_run(self, experiment, run_name):
            return SimpleNamespace(info=SimpleNamespace(run_id=f"{experiment}:{run_name}"))

        def log_metric(self, run, name, value, step):
            seen.append((run, name, value, step))

        def set_terminated(self, run):
            seen.append(run)

    module = ModuleType("mlflow")
    module.MlflowClient = Client  # type: ignore[attr-defined]
    told("mlflow", "file:/tmp/x", monkeypatch, module)
    assert seen[0] == "file:/tmp/x"
    assert seen[-1] == "study:train/a"
    assert {(name, step): value for _, name, value, step in seen[1:-1]} == {
        (name, step): value for step in (1, 2) for name, value in (WANTED | {"loss": 2.0 / step}).items()
    }


def test_tensorboard_gets_a_folder_for_each_cell(monkeypatch):
    seen: list[object] = []

    class SummaryWriter:
        def __init__(self, folder):
            seen.append(folder)

        def add_scalar(self, name, value, step):
            if name == "loss":
                seen.append((step, value))

        def close(self):
            seen.append("closed")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    told("tensorboard", "/logs", monkeypatch, ModuleType("tensorboard"))
    assert seen == ["/logs/study/train/a", (1, 2.0), (2, 1.0), "closed"]


def test_tracker_that_fails_fails_no_cell(monkeypatch):
    module = ModuleType("wandb")

    def refuse(**settings):
        raise ConnectionError("no network")

    module.init = refuse  # type: ignore[attr-defined]
    told("wandb", None, monkeypatch, module)


@pytest.mark.parametrize("name", PACKAGES)
def test_tracker_that_is_not_installed_says_what_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(UserError, match=f"pip install {PACKAGES[name]}"):
        Tracker(name, None, "study")
