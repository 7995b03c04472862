"""Cells that share a base against the same cells alone, and cells that are broken off: on a small random Llama."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline.training import CellWork, Watch
from tests.test_training import ROWS, base, outcomes, packed, pytestmark, row, trained, work

__all__ = ["base", "pytestmark"]

SETTINGS = {"learning_rate": 1e-3}


def cells(tmp_path, steps=(20, 20, 20), rows=(ROWS, ROWS[:3], ROWS[2:])):
    return [work(tmp_path / f"cell{index}", count, few, ROWS[:3], seed=index) for index, (count, few) in enumerate(zip(steps, rows, strict=True))]


def weights_of(outcome):
    from safetensors.torch import load_file

    return load_file(outcome.adapter / "adapter_model.safetensors")


def difference(one, other) -> float:
    """Of all weights together, relative to the second's."""
    import torch

    both = [torch.cat([tensor.double().flatten() for _, tensor in sorted(weights_of(item).items())]) for item in (one, other)]
    return float((both[0] - both[1]).norm() / both[1].norm())


def test_gradients_of_the_first_step_are_those_of_the_cell_alone(base, tmp_path):
    """Read off the weights: one step of plain SGD would be the gradient, and AdamW's first moments after it are too."""
    import io

    import torch

    class Kept(Watch):
        def __init__(self):
            self.states = {}

        def due(self, key):
            return True

        def save(self, key, step, state):
            self.states.setdefault(key, torch.load(io.BytesIO(state), weights_only=True)["optimizer"]["state"][0]["exp_avg"])

    together, alone = Kept(), Kept()
    outcomes(packed(base, 3, **SETTINGS), *cells(tmp_path / "together", (2, 2, 2)), watch=together)
    for cell in cells(tmp_path / "alone", (2, 2, 2)):
        outcomes(packed(base, **SETTINGS), cell, watch=alone)
    for key, gradient in alone.states.items():
        assert gradient.norm() > 0
        assert (together.states[key] - gradient).norm() <= 1e-4 * gradient.norm()


def test_adapters_logs_and_heldout_losses_after_twenty_steps_are_those_of_the_cells_alone(base, tmp_path):
    together = outcomes(packed(base, 3, **SETTINGS), *cells(tmp_path / "together"))
    for cell in cells(tmp_path / "alone"):
        alone = outcomes(packed(base, **SETTINGS), cell)[cell.key]
        shared = together[cell.key]
        assert difference(shared, alone) <= 1e-3
        assert [entry["loss"] for entry in shared.log] == pytest.approx([entry["loss"] for entry in alone.log], rel=1e-3)
        assert [(entry["tokens"], entry["learning_rate"]) for entry in shared.log] == [(entry["tokens"], entry["learning_rate"]) for entry in alone.log]
        assert [item["nll"] for item in shared.heldout] == pytest.approx([item["nll"] for item in alone.heldout], rel=1e-3)
    assert difference(together["cell0"], together["cell2"]) > 0.1  # or a comparison would tell nothing


@pytest.mark.long
def test_in_bfloat16_company_makes_no_more_difference_than_another_micro_batch(base, tmp_path, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # some virtual machines announce AMX and fault on it
    for name in ("together", "alone", "reshaped"):
        process = multiprocessing.get_context("spawn").Process(target=_in_bfloat16, args=(base, str(tmp_path), name))
        process.start()
        process.join(300)
        assert process.exitcode == 0
    keys = ("cell0", "cell1", "cell2")
    company = sum(difference(Folder(tmp_path / "together" / key), Folder(tmp_path / "alone" / key)) for key in keys)
    shape = sum(difference(Folder(tmp_path / "reshaped" / key), Folder(tmp_path / "alone" / key)) for key in keys)
    assert shape > 0  # or the bound below would tell nothing
    assert company <= 1.5 * shape


class Folder(NamedTuple):
    adapter: Path


def _in_bfloat16(base, folder: str, name: str) -> None:
    from pipeline.training import packed as module
    from tests.test_training import training

    if name == "reshaped":
        module.MICRO_BATCH_TOKENS = 20
    trainer = module.PackedTrainer(base, training(**SETTINGS), "bfloat16", 3 if name == "together" else 1)
    outcomes(trainer, *cells(Path(folder) / name))


def test_cells_of_other_lengths_take_each_others_place(base, tmp_path):
    counts = (1, 5, 0, 3, 2, 4)
    made = outcomes(packed(base, 2, **SETTINGS), *cells(tmp_path / "together", counts, [ROWS] * 6))
    assert {key: len(outcome.log) for key, outcome in made.items()} == {f"cell{index}": count for index, count in enumerate(counts)}
    for cell in cells(tmp_path / "alone", counts, [ROWS] * 6):
        assert difference(made[cell.key], outcomes(packed(base, **SETTINGS), cell)[cell.key]) <= 1e-3


def test_many_cells_in_passes_of_few_tokens_are_the_same(base, tmp_path, monkeypatch):
    whole = outcomes(packed(base, 3, **SETTINGS), *cells(tmp_path / "whole", (3, 3, 3)))
    monkeypatch.setattr("pipeline.training.packed.MICRO_BATCH_TOKENS", 50)
    split = outcomes(packed(base, 3, **SETTINGS), *cells(tmp_path / "split", (3, 3, 3)))
    assert all(difference(split[key], whole[key]) <= 1e-3 for key in whole)


class Breaking(Watch):
    """What befalls cell1 at its third step."""

    def __init__(self, what):
        self._what = what

    def step(self, key, entry):
        if key == "cell1" and entry["step"] == 3:
            self._what()


def test_cell_that_goes_to_nan_leaves_the_others_untouched(base, tmp_path):
    from pipeline.training.packed import PackedTrainer

    class Poisoned(PackedTrainer):
        def _begin(self, cell, slot, watch):
            running = super()._begin(cell, slot, watch)
            if cell.key == "cell1":
                self._adapters.weights[slot] = float("nan")
            return running

    made = outcomes(Poisoned(base, packed_settings(), "float32", 3), *cells(tmp_path / "together", (5, 5, 5)))
    assert isinstance(made["cell1"], FloatingPointError)
    for cell in cells(tmp_path / "alone", (5, 5, 5)):
        if cell.key != "cell1":
            assert difference(made[cell.key], outcomes(packed(base, **SETTINGS), cell)[cell.key]) <= 1e-3


def packed_settings():
    from tests.test_training import training

    return training(**SETTINGS)


def test_cell_that_is_given_up_leaves_the_others_untouched_and_the_next_takes_its_place(base, tmp_path):
    def give_up():
        raise KeyError("given up")

    made = outcomes(packed(base, 2, **SETTINGS), *cells(tmp_path / "together", (6, 6, 6)), watch=Breaking(give_up))
    assert isinstance(made["cell1"], KeyError)
    for cell in cells(tmp_path / "alone", (6, 6, 6)):
        if cell.key != "cell1":
            assert difference(made[cell.key], outcomes(packed(base, **SETTINGS), cell)[cell.key]) <= 1e-3


def test_pass_that_memory_does_not_hold_is_split_and_recomputed_with_the_same_result(base, tmp_path, monkeypatch):
    import torch
    from transformers.models.llama.modeling_llama import LlamaModel

    whole = trained(base, tmp_path / "whole", **SETTINGS)
    forward = LlamaModel.forward

    def small_device(self, input_ids, **kwargs):
        if input_ids.shape[1] > (60 if self.gradient_checkpointing else 30):
            raise torch.OutOfMemoryError("the test's device is full")
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", small_device)
    split = trained(base, tmp_path / "split", **SETTINGS)
    assert difference(split, whole) <= 1e-3


def test_row_that_no_pass_can_hold_fails_with_what_torch_says(base, tmp_path, monkeypatch):
    import torch
    from transformers.models.llama.modeling_llama import LlamaModel

    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("the test's device is full")

    monkeypatch.setattr(LlamaModel, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        trained(base, tmp_path)


# ---------------------------------------------------------------- broken off


class InFolder(Watch):
    """Keeps each cell's last state in a folder, after every step; ends the process by SIGKILL once `cell1` has taken `fatal` steps."""

    def __init__(self, folder, fatal=None):
        folder.mkdir(exist_ok=True)
        self._folder, self._fatal = folder, fatal

    def due(self, key):
        return True

    def save(self, key, step, state):
        temporary = self._folder / f"{key}.new"
        temporary.write_bytes(state)
        temporary.rename(self._folder / key)
        if key == "cell1" and step == self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def restore(self, key):
        path = self._folder / key
        return path.read_bytes() if path.exists() else None


def _killed(base, folder: str, slots: int, fatal: int, optimizer: str) -> None:
    outcomes(packed(base, slots, optimizer=optimizer, **SETTINGS), *cells(Path(folder) / "first", (6, 6, 6)), watch=InFolder(Path(folder) / "states", fatal))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_cells_of_a_killed_process_go_on_and_end_with_the_same_bytes(base, tmp_path, optimizer):
    (tmp_path / "first").mkdir()
    process = multiprocessing.get_context("spawn").Process(target=_killed, args=(base, str(tmp_path), 1, 4, optimizer))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    taken = []

    class Counting(InFolder):
        def step(self, key, entry):
            taken.append((key, entry["step"]))

    resumed = outcomes(packed(base, optimizer=optimizer, **SETTINGS), *cells(tmp_path / "second", (6, 6, 6)), watch=Counting(tmp_path / "states"))
    assert [step for key, step in taken if key == "cell1"] == [5, 6]
    for cell in cells(tmp_path / "alone", (6, 6, 6)):
        alone = outcomes(packed(base, optimizer=optimizer, **SETTINGS), cell)[cell.key]
        assert (resumed[cell.key].adapter / "adapter_model.safetensors").read_bytes() == (alone.adapter / "adapter_model.safetensors").read_bytes()
        assert resumed[cell.key].heldout == alone.heldout
        assert [entry["loss"] for entry in resumed[cell.key].log] == [entry["loss"] for entry in alone.log]


def test_checkpoint_of_a_cell_in_company_is_as_large_as_of_one_alone(base, tmp_path):
    outcomes(packed(base, 1), work(tmp_path / "one" / "cell0", 2), watch=InFolder(tmp_path / "alone"))
    outcomes(packed(base, 5), work(tmp_path / "five" / "cell0", 2), watch=InFolder(tmp_path / "company"))
    assert (tmp_path / "company" / "cell0").stat().st_size == (tmp_path / "alone" / "cell0").stat().st_size


@pytest.mark.parametrize("state", [b"", b"torn", b"PK\x03\x04 torn"])
def test_checkpoint_that_cannot_be_read_is_none(base, tmp_path, state):
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "cell").write_bytes(state)
    again = outcomes(packed(base, **SETTINGS), work(tmp_path / "cell"), watch=InFolder(tmp_path / "states"))["cell"]
    assert (again.adapter / "adapter_model.safetensors").read_bytes() == _bytes(trained(base, tmp_path / "whole", **SETTINGS))


def _bytes(outcome) -> bytes:
    return (outcome.adapter / "adapter_model.safetensors").read_bytes()


def test_rows_given_are_the_cells_own(base, tmp_path):
    """A cell whose company has other rows is not the cell whose company has its own: the comparisons above can fail."""
    one = outcomes(packed(base, 1, **SETTINGS), CellWork("a", ROWS, 5, 7, [], _folder(tmp_path / "a")))["a"]
    other = outcomes(packed(base, 1, **SETTINGS), CellWork("b", [*ROWS[:7], row(9, 3, 9)], 5, 7, [], _folder(tmp_path / "b")))["b"]
    assert difference(one, other) > 1e-3


def _folder(path):
    path.mkdir()
    return path


# ---------------------------------------------------------------- gangs


def _member(base, folder: str, rank: int, size: int, fatal: int | None) -> None:
    import torch

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting{fatal}", rank=rank, world_size=size)
    trainer = packed(base, 2, **SETTINGS)
    trainer.group = torch.distributed.group.WORLD
    watch = InFolder(Path(folder) / "states", fatal) if rank == 0 else Watch()  # the first alone has somebody look on
    outcomes(trainer, *cells(Path(folder) / f"rank{rank}", (8, 8, 8)), watch=watch)
    torch.distributed.destroy_process_group()


def together(base, tmp_path, size: int, fatal: int | None = None) -> list[int | None]:
    tmp_path.mkdir(exist_ok=True)
    members = [multiprocessing.get_context("spawn").Process(target=_member, args=(base, str(tmp_path), rank, size, fatal)) for rank in range(size)]
    for member in members:
        member.start()
    for member in members:
        member.join(300)
    return [member.exitcode for member in members]


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 3])
def test_gang_trains_the_adapters_of_one_worker_with_the_global_batch_unchanged(base, tmp_path, size):
    assert together(base, tmp_path, size) == [0] * size
    for cell in cells(tmp_path / "alone", (8, 8, 8)):
        alone = outcomes(packed(base, **SETTINGS), cell)[cell.key]
        assert difference(Folder(tmp_path / "rank0" / cell.key), alone) <= 1e-3
        assert not list((tmp_path / "rank1" / cell.key).iterdir())


@pytest.mark.long
def test_gang_that_was_killed_goes_on_from_the_first_ones_checkpoints(base, tmp_path):
    killed = together(base, tmp_path, 2, fatal=4)
    assert killed[0] == -signal.SIGKILL
    assert killed[1] != 0
    assert together(base, tmp_path, 2) == [0, 0]
    for cell in cells(tmp_path / "alone", (8, 8, 8)):
        assert difference(Folder(tmp_path / "rank0" / cell.key), outcomes(packed(base, **SETTINGS), cell)[cell.key]) <= 1e-3
