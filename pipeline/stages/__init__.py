"""The stages. Each module has one public function, `build(context, steps)`, which commits the steps it is given."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.artifacts import Step, Store, done_keys
from pipeline.errors import StageError
from pipeline.events import Events
from pipeline.plan import Plan
from pipeline.runtime import Runtime


@dataclass(frozen=True)
class Context:
    """What a stage works with."""

    plan: Plan
    store: Store
    runtime: Runtime
    events: Events

    def committed(self, step: Step, **fields: object) -> None:
        self.events.emit("step_done", stage=step.stage, step=step.key, **fields)


def build_stage(stage: str, context: Context, keys: set[str]) -> int:
    """Build those of `keys` that belong to the stage and are not committed; how many that were.

    Raises StageError when some could not be built; the others are committed all the same.
    """
    done = done_keys(context.store)
    steps = [step for step in context.plan.stage(stage) if step.key in keys and step.key not in done]
    if not steps:
        return 0
    ready = [step for step in steps if all(item.key in done for item in step.inputs)]
    failed = {step.key: "its inputs are not built" for step in steps if step not in ready}
    context.events.emit("stage_start", stage=stage, steps=len(steps))
    if ready:
        failed |= importlib.import_module(f"pipeline.stages.{stage}").build(context, ready)
    for key, reason in failed.items():
        context.events.emit("step_failed", stage=stage, step=key, reason=reason)
    context.events.emit("stage_end", stage=stage, built=len(steps) - len(failed), failed=len(failed))
    context.events.flush()
    if failed:
        raise StageError(stage, failed, len(steps) - len(failed))
    return len(steps)


Failed = dict[str, str]
"""Step key -> why it was not built."""

Steps = Sequence[Step]
