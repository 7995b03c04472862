"""One pyarrow schema per table. Rows keep raw text, its status and its value apart; a failed parse is a status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    from pipeline.llm import Completion

STATUSES = ("ok", "unparsed", "refused", "truncated", "error")


def _schema(**columns: pa.DataType | tuple[pa.DataType, bool]) -> pa.Schema:
    """Columns are required unless given as (type, True)."""
    fields = []
    for name, spec in columns.items():
        kind, nullable = spec if isinstance(spec, tuple) else (spec, False)
        fields.append(pa.field(name, kind, nullable=nullable))
    return pa.schema(fields)


_TEXT, _INT, _FLOAT = pa.string(), pa.int64(), pa.float64()
_FIELDS = pa.map_(pa.string(), pa.string())
_WIRE: dict[str, pa.DataType | tuple[pa.DataType, bool]] = {
    "finish_reason": _TEXT, "prompt_tokens": _INT, "completion_tokens": _INT, "served_model": (_TEXT, True), "attempts": (_INT, True),
    "first_byte_s": (_FLOAT, True), "total_s": (_FLOAT, True),
}  # fmt: skip

EXAMPLES = _schema(
    row_id=_TEXT, fields=_FIELDS, plain=_TEXT, rich=(_TEXT, True), raw=_TEXT, status=_TEXT, reason=(_TEXT, True), answer=(_TEXT, True),
    **_WIRE,
)  # fmt: skip
"""What the teacher wrote, or the user's own table holds. plain, rich: the prompts as JSON conversations; rich: null without
a teacher. answer: null unless status is ok. reason: why not, where more is known than the status. served_model: as the endpoint
named it. attempts: requests sent for the row. first_byte_s, total_s: of the last one; null for a model in process."""

SUBSET = _schema(row_id=_TEXT, fields=_FIELDS, conversation=_TEXT, answer=_TEXT)
"""The rows that a cell trains on, in the order of their ids. conversation: JSON, as the study's train_on says."""

TRAIN_LOG = _schema(step=_INT, loss=_FLOAT, learning_rate=_FLOAT, grad_norm=_FLOAT, tokens=_INT, loss_tokens=_INT, seconds=_FLOAT, memory_bytes=_INT)
"""One row per optimizer step. loss: mean nats per loss token over the global batch. seconds: of the device, for this cell.
memory_bytes: of the process on a CPU, at the peak so far on a GPU."""

HELDOUT = _schema(row_id=_TEXT, nll=_FLOAT, tokens=_INT, prompt_ids=pa.list_(pa.int64()))
"""nll: summed negative log-likelihood in nats of the held-out answer under the cell. prompt_ids: as training renders it."""

GENERATIONS = _schema(
    row_id=_TEXT, fields=_FIELDS, conversation=_TEXT, raw=_TEXT, status=_TEXT, answer=(_TEXT, True), finish_reason=_TEXT,
    prompt_tokens=_INT, completion_tokens=_INT, prompt_ids=pa.list_(pa.int64()), prompt_logprobs=(pa.list_(pa.float64()), True),
)  # fmt: skip
"""One answer per evaluation prompt. prompt_logprobs: of the first prompt only, the probe of the adapter gate."""

VERDICTS = _schema(
    row_id=_TEXT, fields=_FIELDS, protocol=_TEXT, judge=_TEXT, order=_INT, raw=_TEXT, status=_TEXT, pick=(_TEXT, True),
    explanation=(_TEXT, True), reason=(_TEXT, True), **_WIRE,
)  # fmt: skip
"""One row per question to the judge. order: 0 shows the baseline first, 1 the candidate. pick: baseline or candidate. The rest as in EXAMPLES."""


def wire(completion: Completion) -> dict[str, Any]:
    """How an answer came: the columns that EXAMPLES and VERDICTS share, of a row."""
    return {name: getattr(completion, name) for name in _WIRE}


def to_table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table of exactly this schema.

    pyarrow alone drops unknown keys and fills missing required ones with null, so the key sets are checked here.
    Raises ValueError that names the row and the keys.
    """
    wanted = set(schema.names)
    for index, row in enumerate(rows):
        if row.keys() != wanted:
            raise ValueError(f"row {index}: missing {sorted(wanted - row.keys())}, unknown {sorted(row.keys() - wanted)}")
        for field in schema:
            if row[field.name] is None and not field.nullable:
                raise ValueError(f"row {index}: {field.name} is null and must not be")
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    if "status" in schema.names and (unknown := {str(row["status"]) for row in rows} - set(STATUSES)):
        raise ValueError(f"status must be one of {STATUSES}, got {sorted(unknown)}")
    return table
