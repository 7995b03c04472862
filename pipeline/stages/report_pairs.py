"""The browser of pairs: every prompt with the base's and a cell's answer, and what each judge said and why.

Up to INLINE pairs are part of the page. More lie beside it, one script per cell that the page loads when the cell is
chosen: scripts, because a page opened from a folder may not fetch anything else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.plan import BASE, Plan
from pipeline.stages.report_verdicts import Judged, is_, key_of

INLINE = 5000


def pairs(plan: Plan, answers: Mapping[str, list[dict[str, Any]]], judged: Judged | None) -> tuple[dict[str, Any] | None, dict[str, bytes]]:
    """(What the page carries, the scripts beside it by file name). None where there is no base to compare with.

    rows: prompt, fields (in the order of `columns`), tier and the base's answer. cells: name -> for each row, in the same
    order, the answer and [key, order, pick, status, explanation] of each verdict, or null where the cell has no answer to it.
    """
    cells = [cell.name for cell in plan.cells if cell.name in answers]
    if BASE not in answers or not cells:
        return None, {}
    tiers = {row.row_id: row.tier for row in plan.evaluation_rows}
    columns = [column for column in plan.task.columns if column in {*plan.task.strata, plan.task.cluster}]
    rows = [
        {
            "prompt": json.loads(row["conversation"])[-1]["content"],
            "fields": [row["fields"][column] for column in columns],
            "tier": tiers[row["row_id"]],
            "base": row["raw"],
        }
        for row in answers[BASE]
    ]
    order = [row["row_id"] for row in answers[BASE]]
    count = len(rows) * len(cells)
    made: dict[str, Any] = {"columns": columns, "count": count, "names": cells}
    if count <= INLINE:
        return made | {"rows": rows, "cells": {cell: _of_cell(plan, cell, answers[cell], order, judged) for cell in cells}}, {}
    files = {cell: f"pairs-{cell}.js" for cell in cells}
    beside = {"pairs-rows.js": _script("rows", rows)}
    beside |= {file: _script(cell, _of_cell(plan, cell, answers[cell], order, judged)) for cell, file in files.items()}
    return made | {"files": {"rows": "pairs-rows.js", **files}}, beside


def _of_cell(plan: Plan, cell: str, answers: list[dict[str, Any]], order: list[str], judged: Judged | None) -> list[Any]:
    said: dict[str, list[Any]] = {}
    if judged is not None:
        mine = judged.verdicts.filter(is_(judged.verdicts["candidate"], cell))
        for row in mine.select(["row_id", "judge", "protocol", "order", "pick", "status", "explanation"]).to_pylist():
            verdict = [key_of(plan, row["judge"], row["protocol"]), row["order"], row["pick"], row["status"], row["explanation"]]
            said.setdefault(row["row_id"], []).append(verdict)
    found = {row["row_id"]: row["raw"] for row in answers}
    return [[found[row_id], said.get(row_id, [])] if row_id in found else None for row_id in order]


def as_json(value: Any) -> str:
    """JSON that can stand inside a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _script(name: str, value: Any) -> bytes:
    return f"datadosePairs({as_json(name)},{as_json(value)});\n".encode()
