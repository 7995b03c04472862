"""Every trainer shows a cell the same tokens: TRL's SFTTrainer against the packed loop, on a small random Llama."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline.errors import UserError
from pipeline.runtime import Runtime
from pipeline.training import CellWork, Watch, trainer_name
from tests.test_training import base, outcomes, packed, pytestmark, training, work
from tests.test_training_shared import InFolder, difference

__all__ = ["base"]
pytestmark = [
    *pytestmark,
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
CHANGES = {"learning_rate": 1e-3, "warmup_steps": 2}


def by_trl(base, *cells: CellWork, watch=None, **changes):
    from pipeline.training.sft import SFTTrainers

    return outcomes(SFTTrainers("trl", base, training(**CHANGES | changes), "float32"), *cells, watch=watch)


def curve(outcome):
    if isinstance(outcome, Exception):
        raise outcome
    return [entry["loss"] for entry in outcome.log]


def gap(one, other) -> float:
    """Largest difference of two loss curves at any step."""
    return max(abs(a - b) for a, b in zip(curve(one), curve(other), strict=True))


@pytest.fixture(scope="module")
def noise(base, tmp_path_factory):
    """How far the loss curve of packed moves when its micro-batch has another shape; in fp32 hardly at all, so at least 1e-5."""
    from pipeline.training import packed as module

    folder = tmp_path_factory.mktemp("noise")
    whole = outcomes(packed(base, **CHANGES), work(folder / "whole", 12))["whole"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MICRO_BATCH_TOKENS", 20)
        split = outcomes(packed(base, **CHANGES), work(folder / "split", 12))["split"]
    return max(1e-5, gap(split, whole))


@pytest.mark.parametrize("changes", [{}, {"loss_on": "all"}, {"max_tokens": 14}, {"global_batch": 3, "schedule": "constant"}], ids=str)
def test_loss_curve_of_trl_is_that_of_packed_within_the_noise_of_the_micro_batch(base, tmp_path, noise, changes):
    theirs = by_trl(base, work(tmp_path / "theirs", 12), **changes)["theirs"]
    ours = outcomes(packed(base, **CHANGES | changes), work(tmp_path / "ours", 12))["ours"]
    assert gap(theirs, ours) <= 10 * noise
    assert difference(theirs, ours) <= 1e-3
    for mine, other in zip(ours.log, theirs.log, strict=True):
        assert {name: mine[name] for name in ("step", "tokens", "loss_tokens")} == {name: other[name] for name in ("step", "tokens", "loss_tokens")}
        assert other["learning_rate"] == pytest.approx(mine["learning_rate"])
        assert other["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-3)
    assert theirs.cut_rows == ours.cut_rows
    for mine, other in zip(ours.heldout, theirs.heldout, strict=True):
        assert other["nll"] == pytest.approx(mine["nll"], rel=1e-3)
        assert (other["row_id"], other["tokens"], other["prompt_ids"]) == (mine["row_id"], mine["tokens"], mine["prompt_ids"])


@pytest.mark.parametrize("wrong", ["all tokens", "one token early", "another order", "normalised by row"])
def test_trainer_on_the_wrong_tokens_is_seen(base, tmp_path, noise, monkeypatch, wrong):
    """What the comparison above is for: each of these trains without an error and ends in another curve."""
    from pipeline.training import sft

    changes: dict[str, object] = {}
    if wrong == "all tokens":
        changes["loss_on"] = "all"
    elif wrong == "one token early":
        labels = sft._labels
        monkeypatch.setattr(sft, "_labels", lambda row: labels(row._replace(first=row.first - 1)))
    elif wrong == "another order":
        monkeypatch.setattr(sft, "batches", lambda count, steps, batch, seed: sft_batches(count, steps, batch, seed + 1))
    else:
        from trl import SFTTrainer

        plain = SFTTrainer.compute_loss
        monkeypatch.setattr(SFTTrainer, "compute_loss", lambda self, *args, num_items_in_batch=None, **kwargs: plain(self, *args, **kwargs) / 2)
    theirs = by_trl(base, work(tmp_path / "theirs", 12), **changes)["theirs"]
    ours = outcomes(packed(base, **CHANGES), work(tmp_path / "ours", 12))["ours"]
    assert gap(theirs, ours) > 100 * noise


def sft_batches(*arguments):
    from pipeline.training import batches

    return batches(*arguments)


def test_nf4_base_trains_alike(base, tmp_path):
    theirs = by_trl(base, work(tmp_path / "theirs", 3), quantization="nf4")["theirs"]
    ours = outcomes(packed(base, quantization="nf4", **CHANGES), work(tmp_path / "ours", 3))["ours"]
    assert gap(theirs, ours) <= 1e-4


def test_cell_that_was_broken_off_goes_on_from_its_checkpoint(base, tmp_path):
    class Stop(InFolder):
        def step(self, key, entry):
            if entry["step"] == 5:
                raise KeyError("stopped")

    broken = by_trl(base, work(tmp_path / "cell", 8), watch=Stop(tmp_path / "states"))["cell"]
    assert isinstance(broken, KeyError)
    steps = []

    class Counting(InFolder):
        def step(self, key, entry):
            steps.append(entry["step"])

    (tmp_path / "again").mkdir()
    resumed = by_trl(base, dataclasses.replace(work(tmp_path / "cell", 8), folder=tmp_path / "again"), watch=Counting(tmp_path / "states"))["cell"]
    whole = by_trl(base, work(tmp_path / "whole", 8))["whole"]
    assert steps == [5, 6, 7, 8]
    assert curve(resumed) == curve(whole)
    assert (resumed.adapter / "adapter_model.safetensors").read_bytes() == (whole.adapter / "adapter_model.safetensors").read_bytes()


def test_rate_that_explodes_is_told_and_the_next_cell_is_trained(base, tmp_path):
    made = by_trl(base, work(tmp_path / "first", 20), learning_rate=1e18)
    assert isinstance(made["first"], FloatingPointError)


def test_cell_of_no_steps_leaves_the_model_as_it_is(base, tmp_path):
    from safetensors.torch import load_file

    made = by_trl(base, work(tmp_path / "zero", 0, []))["zero"]
    assert made.log == []
    assert all(not tensor.any() for name, tensor in load_file(made.adapter / "adapter_model.safetensors").items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "packed"),
        ({"gpus_per_worker": 1}, "unsloth"),
        ({"gpus_per_worker": 1, "share_base": 4}, "packed"),
        ({"gang": 2}, "packed"),
        ({"trainer": "trl"}, "trl"),
    ],
    ids=str,
)
def test_trainer_is_the_one_named_or_fits_the_machine(settings, name):
    assert trainer_name(Runtime(**settings)) == name


@pytest.mark.parametrize("name", ["trl", "unsloth"])
def test_trainer_that_cannot_share_is_refused(name):
    with pytest.raises(UserError, match="DATADOSE_TRAINER=packed"):
        trainer_name(Runtime(trainer=name, share_base=4))


def test_trainer_that_is_not_installed_says_what_to_install(base, monkeypatch):
    import importlib.util

    from pipeline.training.sft import SFTTrainers

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install unsloth"):
        SFTTrainers("unsloth", base, training(), "float32")
    assert Watch().restore("cell") is None
