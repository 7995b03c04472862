"""A trainer that plays its part in seconds, for tests and dry runs: a study that uses it is marked as simulated."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterable, Iterator

from pipeline.training import CellWork, Trained, Watch


class ScriptedTrainer:
    name = "scripted"
    group = None

    def run(self, cells: Iterable[CellWork], watch: Watch) -> Iterator[tuple[CellWork, Trained | Exception]]:
        for work in cells:
            try:
                yield work, self._train(work, watch)
            except Exception as error:  # noqa: BLE001  # as Watch says
                yield work, error

    def _train(self, work: CellWork, watch: Watch) -> Trained:
        started, rows, steps, folder = time.perf_counter(), work.rows, work.steps, work.folder
        seen = hashlib.sha256(json.dumps([[row.row_id for row in rows], steps, work.seed]).encode()).hexdigest()
        dice = random.Random(seen)
        log = []
        for step in range(steps):
            loss = 1.5 + 1.5 * 0.98**step + dice.uniform(-0.05, 0.05)
            log.append({
                "step": step + 1, "loss": loss, "learning_rate": 2e-4, "grad_norm": 1.0, "tokens": 100, "loss_tokens": 50, "seconds": 0.01,
                "memory_bytes": 0,
            })  # fmt: skip
            watch.step(work.key, log[-1])
        (folder / "adapter_model.safetensors").write_text(seen if steps else "zero")
        (folder / "adapter_config.json").write_text(json.dumps({"scripted": True}))
        worth = 1.5 + 1.5 / (1 + 0.05 * min(steps, 20) ** 0.5 + 0.02 * len(rows) ** 0.5)
        scored = [
            {
                "row_id": row.row_id,
                "nll": worth * len(row.answer.split()),
                "tokens": len(row.answer.split()),
                "prompt_ids": list("\n".join(message["content"] for message in row.conversation).encode()),
            }
            for row in work.heldout
        ]
        return Trained(folder, log, scored, 0, time.perf_counter() - started)
