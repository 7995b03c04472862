"""Training of cells behind one small interface: a cell's rows in, an adapter and a loss log out.

`open_trainer` loads the frozen base once; `run` trains one cell on it, and `heldout` scores answers under that cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.runtime import Runtime
from pipeline.study import ModelName, Study
from pipeline.tasks import Conversation


@dataclass(frozen=True)
class TrainingRow:
    row_id: str
    conversation: Conversation
    answer: str


@dataclass(frozen=True)
class Trained:
    """adapter: folder as PEFT saves it. log: rows of schemas.TRAIN_LOG. heldout: rows of schemas.HELDOUT."""

    adapter: Path
    log: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    cut_rows: int
    """Rows longer than training.max_tokens, whose end the cell has not seen."""


class Trainer(Protocol):
    def run(self, rows: Sequence[TrainingRow], steps: int, seed: int, heldout: Sequence[TrainingRow], folder: Path, on_step: Callable[[], None]) -> Trained:
        """Train one cell from a fresh adapter; zero steps leave the adapter without effect."""


def open_trainer(study: Study, runtime: Runtime) -> Trainer:
    base = ModelName.parse(study.base)
    if base.simulated:
        from pipeline.training.scripted import ScriptedTrainer

        return ScriptedTrainer()
    from pipeline.models import local_model
    from pipeline.training.packed import PackedTrainer

    return PackedTrainer(local_model(base, runtime.cache_dir), study.training, study.precision)


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
