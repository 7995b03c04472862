"""Training of cells behind one small interface: cells in, an adapter and a loss log out for each.

`open_trainer` loads the frozen base once; `run` trains the cells that it is given on it. All trainers show a cell the same
rows in the same order, start it from the same adapter, and mean the same by loss: nats per loss token over the global batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.errors import UserError

if TYPE_CHECKING:  # the benchmark for GPUs trains where only torch, transformers, peft and bitsandbytes are
    from pipeline.runtime import Runtime
    from pipeline.study import Study
    from pipeline.tasks import Conversation


@dataclass(frozen=True)
class TrainingRow:
    row_id: str
    conversation: Conversation
    answer: str


@dataclass(frozen=True)
class CellWork:
    """A cell to train from a fresh adapter; zero steps leave the adapter without effect. folder: empty, for the adapter."""

    key: str
    rows: Sequence[TrainingRow]
    steps: int
    seed: int
    heldout: Sequence[TrainingRow]
    folder: Path


@dataclass(frozen=True)
class Trained:
    """adapter: folder as PEFT saves it. log: rows of schemas.TRAIN_LOG. heldout: rows of schemas.HELDOUT."""

    adapter: Path
    log: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    cut_rows: int
    """Rows longer than training.max_tokens, whose end the cell has not seen."""
    seconds: float
    """Of the device: a step that several cells share counts for each by its tokens."""


class Watch:
    """Who looks on: told of every step, and keeper of checkpoints. This one keeps none.

    A cell whose `step` raises is given up and the exception is its outcome; the others go on.
    """

    def step(self, key: str, entry: dict[str, Any]) -> None:
        """After each optimizer step. entry: a row of schemas.TRAIN_LOG."""

    def due(self, key: str) -> bool:
        """Whether a checkpoint is wanted after this step."""
        return False

    def save(self, key: str, step: int, state: bytes) -> None:
        """state: all that the trainer needs to go on after `step` steps."""

    def restore(self, key: str) -> bytes | None:
        """The last state that was saved for the cell, by this process or one before it."""
        return None


class Trainer(Protocol):
    name: str
    group: Any
    """torch process group of the devices that train the next cells together; None for this one alone. `packed` can do it."""

    def run(self, cells: Iterable[CellWork], watch: Watch) -> Iterator[tuple[CellWork, Trained | Exception]]:
        """Each cell with what became of it, in the order in which they end. Takes a cell when there is room for it.

        What fails one cell is its outcome; what fails all that are under way is raised.
        """


def open_trainer(study: Study, runtime: Runtime) -> Trainer:
    """Raises UserError for a trainer that is not installed or cannot do what the runtime asks."""
    from pipeline.study import ModelName

    base = ModelName.parse(study.base)
    if base.simulated:
        from pipeline.training.scripted import ScriptedTrainer

        return ScriptedTrainer()
    from pipeline.models import local_model

    name = trainer_name(runtime)
    folder = local_model(base, runtime.cache_dir)
    if name == "packed":
        from pipeline.training.packed import PackedTrainer

        return PackedTrainer(folder, study.training, study.precision, runtime.share_base)
    from pipeline.training.sft import SFTTrainers

    return SFTTrainers(name, folder, study.training, study.precision)


def trainer_name(runtime: Runtime) -> str:
    """Which trainer runs: the one that is named, else unsloth on a GPU and packed on a CPU or where cells share a device or devices a cell."""
    alone = runtime.share_base == 1 and runtime.gang == 1
    if runtime.trainer in ("trl", "unsloth") and not alone:
        raise UserError(f"trainer = {runtime.trainer!r} trains one cell on one device; take out share_base and gang, or set DATADOSE_TRAINER=packed")
    if runtime.trainer != "auto":
        return runtime.trainer
    return "unsloth" if runtime.gpus_per_worker and alone else "packed"


def batches(count: int, steps: int, global_batch: int, seed: int) -> list[list[int]]:
    """Which rows each step sees: one seeded permutation after the other, cut into global batches.

    A size that the batch does not divide goes on into its next permutation, so every step has `global_batch` rows.
    """
    generator = np.random.default_rng(seed)
    stream: list[int] = []
    while len(stream) < steps * global_batch:
        stream.extend(int(index) for index in generator.permutation(count))
    return [stream[step * global_batch : (step + 1) * global_batch] for step in range(steps)]


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup_steps: int) -> float:
    """Of step 0 <= step < steps, as transformers' schedulers give it: linear warm-up, then constant or linear to zero."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    return peak * max(0, steps - step) / max(1, steps - warmup_steps)
