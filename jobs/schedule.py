"""What a study takes of GPUs: hours by stage, and the training on N of them as `datadose plan --gpus` shows it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table

from jobs.session import console
from pipeline.errors import UserError
from pipeline.plan import Plan, tokens_per_training_row
from pipeline.planner import Device, Load, place
from pipeline.runtime import Runtime
from pipeline.study import ModelName, parse

GANG = 8
"""GPUs of one machine: more would wait for a network."""
ASSUMED_TOKENS_PER_S = 9_800.0
"""Published for LoRA on an 8B model on one H100 without fused kernels (9.8 to 12.4 thousand): the lower end, at any length of a pass."""
ANSWERED_TOKENS_PER_S = ((30.0, 1_200.0), (0.0, 7_500.0))
"""From so many billion weights on, tokens of prompts and answers that vLLM passes in a second on a GPU: its own figures of
version 0.4.3, offline, for Llama 70B on four GPUs and Llama 7B on one (vllm-project/vllm#5046)."""


class Speed(BaseModel):
    """A GPU as `make bench-gpu` writes it. points: tokens of a pass, tokens per second. cell_gib: adapter, gradient and optimizer state."""

    model_config = ConfigDict(extra="forbid")
    points: tuple[tuple[float, float], ...] = Field(min_length=1)
    sync_s: float = Field(0.0, ge=0)
    memory_gib: float = Field(gt=0)
    base_gib: float = Field(0.0, ge=0)
    cell_gib: float = Field(0.0, ge=0)


def schedule_of(plan: Plan, gpus: int, runtime: Runtime, speed: Path | None) -> dict[str, Any]:
    """As JSON types. rows: on the critical path and at least, where speed does not count."""
    measured = _read(speed) if speed else None
    cell_gib = measured.cell_gib if measured else 0.0
    tokens = tokens_per_training_row(plan)
    batch = plan.study.training.global_batch
    if measured:
        device = Device(tuple(sorted(measured.points)), measured.sync_s, measured.memory_gib, measured.base_gib)
    else:
        device = Device(((1.0, ASSUMED_TOKENS_PER_S),))
    made = place([Load(cell.name, cell.steps, batch, tokens, cell_gib) for cell in plan.cells], gpus, device, GANG, runtime.share_base)
    in_rows = place([Load(cell.name, cell.steps, batch, 1.0) for cell in plan.cells], gpus, Device(((1.0, 1.0),)), GANG)
    return {
        "gpus": gpus, "measured": str(speed) if speed else None, "tokens_per_row": tokens,
        "placed": [asdict(item) for item in made.placed],
        "makespan_s": made.makespan_s, "lower_bound_s": made.lower_bound_s, "gpu_hours": made.busy_s / 3600,
        "rows_on_critical_path": round(in_rows.makespan_s), "rows_at_least": round(in_rows.lower_bound_s),
        "rows_one_gpu_a_cell": max(cell.steps * batch for cell in plan.cells),
    }  # fmt: skip


def gpu_hours(plan: Plan, tokens: dict[str, int], runtime: Runtime, speed: Path | None) -> dict[str, float | None]:
    """Stage -> GPU-hours for its estimated tokens; None where no model of ours does the work."""
    study = plan.study
    asked = {"synthesize": (study.synthesis.teacher,), "train": (study.base,), "generate": (study.base,), "judge": study.judging.judges}
    found: dict[str, float | None] = {}
    for stage, models in asked.items():
        ours = [name for name in map(ModelName.parse, filter(None, models)) if name.has_engine]
        if not ours or not tokens[stage]:
            found[stage] = None
        elif stage == "train":
            found[stage] = schedule_of(plan, 1, runtime, speed)["gpu_hours"]
        else:
            found[stage] = sum(tokens[stage] / len(models) / _answered_per_s(name) for name in ours) / 3600
    return found


def _answered_per_s(model: ModelName) -> float:
    """By the size that its name tells; one that tells none is taken for small."""
    size = re.search(r"(\d+(?:\.\d+)?)b(?![a-z])", model.name, re.IGNORECASE)
    return next(speed for least, speed in ANSWERED_TOKENS_PER_S if float(size[1] if size else 0) >= least)


def print_gpu_hours(hours: dict[str, float | None], speed: Path | None) -> None:
    told = {stage: f"{value:.2g}" for stage, value in hours.items() if value is not None}
    if not told:
        return
    large, small = (f"{speed:,.0f}" for _, speed in ANSWERED_TOKENS_PER_S)
    trained = f"as {speed} measured" if speed else f"at {ASSUMED_TOKENS_PER_S:,.0f} tokens/s"
    console.print(
        f"GPU-hours: {', '.join(f'{stage} {value}' for stage, value in told.items())} (trained {trained}, answered at {small}, by 30B and more at {large} "
        "tokens/s a GPU: published for H100s, not measured here)"
    )


def _read(path: Path) -> Speed:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--speed {path} cannot be read ({error}); wanted the JSON file that `make bench-gpu` writes") from error
    if not isinstance(raw, dict):
        raise UserError(f"--speed {path} holds a {type(raw).__name__}; wanted the object that `make bench-gpu` writes")
    return parse(Speed, raw, str(path))


def print_schedule(made: dict[str, Any]) -> None:
    table = Table(title=f"training on {made['gpus']} GPUs")
    for column in ("GPUs", "from", "to", "cells"):
        table.add_column(column, justify="left" if column == "cells" else "right")
    for item in sorted(made["placed"], key=lambda item: (item["devices"][0], item["start_s"])):
        first, last = item["devices"][0], item["devices"][-1]
        table.add_row(str(first) if first == last else f"{first}-{last}", _clock(item["start_s"]), _clock(item["end_s"]), ", ".join(item["keys"]))
    console.print(table)
    speed = f"measured: {made['measured']}" if made["measured"] else f"assumed, not measured: {ASSUMED_TOKENS_PER_S:,.0f} tokens/s a GPU; --speed gives yours"
    console.print(
        f"makespan {_clock(made['makespan_s'])} h, at least {_clock(made['lower_bound_s'])} h; {made['gpu_hours']:.2f} GPU-hours ({speed})\n"
        f"critical path {made['rows_on_critical_path']:,} rows, at least {made['rows_at_least']:,}; with a GPU for each cell {made['rows_one_gpu_a_cell']:,}"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
