"""Stratified subsets of the teacher's good rows; one step per size."""

from __future__ import annotations

import pyarrow as pa

from pipeline import sampling
from pipeline.artifacts import Step, Store, commit, read_table, read_tables
from pipeline.errors import UserError
from pipeline.plan import Plan
from pipeline.schemas import SUBSET, to_table
from pipeline.stages import Context, Failed, Steps


def build(context: Context, steps: Steps) -> Failed:
    failed: Failed = {}
    total = len(steps)
    for index, step in enumerate(steps):
        table, how = draw(context.plan, step, context.store)
        commit(context.store, step, {"subset.parquet": table}, {"rows": table.num_rows, "drawn": how})
        context.committed(step, drawn=how)
        context.events.emit("progress", stage="subset", done=index + 1, total=total, unit="subsets")
    return failed


def draw(plan: Plan, step: Step, store: Store) -> tuple[pa.Table, str]:
    size = step.config["size"]
    if step.inputs[0].stage == "subset":
        rows = read_table(store, step.inputs[0], "subset.parquet").to_pylist(maps_as_pydicts="strict")
    else:
        rows = good_rows(store, step.inputs, plan.study.train_on)
    there = min(size, len(rows))
    if there < size * (1 - step.config["may_miss"]):
        raise UserError(
            f"subset of {size} rows: the teacher's answers gave {len(rows)} good rows of {len(plan.train_rows)}. "
            "Raise synthesis.rows or subsets.may_miss, mend the teacher's sampling (max_tokens, stop) or lower the grid's sizes"
        )
    chosen, how = sampling.draw([row["fields"] for row in rows], plan.task.strata, there, step.config["seed"])
    return to_table([rows[index] for index in chosen], SUBSET), how


def good_rows(store: Store, shards: Steps, prompt: str) -> list[dict[str, object]]:
    """Rows of the shards with status ok, by id, with the prompt that training uses."""
    table = read_tables(store, shards, "examples.parquet")
    rows = [
        {"row_id": row["row_id"], "fields": row["fields"], "conversation": row[prompt], "answer": row["answer"]}
        for row in table.to_pylist(maps_as_pydicts="strict")
        if row["status"] == "ok"
    ]
    return sorted(rows, key=lambda row: str(row["row_id"]))
