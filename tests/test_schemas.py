"""Rows become tables of exactly their schema, or an error that names the row."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from pipeline import schemas
from pipeline.artifacts import Step, commit, open_store, read_table

pytestmark = pytest.mark.fast

SCHEMAS = {name: value for name, value in vars(schemas).items() if isinstance(value, pa.Schema)}
every_schema = pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS.keys())
with_status = pytest.mark.parametrize("schema", [schemas.EXAMPLES, schemas.GENERATIONS, schemas.VERDICTS], ids=["EXAMPLES", "GENERATIONS", "VERDICTS"])
nullable = [(name, field.name) for name, schema in SCHEMAS.items() for field in schema if field.nullable]
required = [(name, field.name) for name, schema in SCHEMAS.items() for field in schema if not field.nullable]


def a_value(field: pa.Field) -> Any:
    if field.name == "status":
        return "ok"
    samples = {
        pa.string(): "Größe 5 – “ok” 🎉",
        pa.int64(): 2**40,
        pa.float64(): -0.125,
        pa.list_(pa.int64()): [1, 2, 3],
        pa.list_(pa.float64()): [-0.5, -1.5],
        pa.map_(pa.string(), pa.string()): {"company": "Penrook", "tone": "witty"},
    }
    return samples[field.type]


def a_row(schema: pa.Schema, **changed: Any) -> dict[str, Any]:
    return {field.name: a_value(field) for field in schema} | changed


def back(table: pa.Table) -> list[dict[str, Any]]:
    return table.to_pylist(maps_as_pydicts="strict")


def test_the_six_tables_of_the_pipeline_have_a_schema():
    assert set(SCHEMAS) == {"EXAMPLES", "SUBSET", "TRAIN_LOG", "HELDOUT", "GENERATIONS", "VERDICTS"}


@every_schema
def test_rows_come_back_as_they_were_given(schema: pa.Schema):
    rows = [a_row(schema), a_row(schema, **{field.name: None for field in schema if field.nullable})]
    table = schemas.to_table(rows, schema)
    assert table.schema.equals(schema)
    assert back(table) == rows


@every_schema
def test_rows_come_back_from_a_committed_step_as_they_were_given(schema: pa.Schema, tmp_path):
    store, step = open_store(str(tmp_path)), Step("subset", "n1", {})
    rows = [a_row(schema), a_row(schema, **{field.name: None for field in schema if field.nullable})]
    commit(store, step, {"t.parquet": schemas.to_table(rows, schema)})
    assert back(read_table(store, step, "t.parquet")) == rows
    assert read_table(store, step, "t.parquet").schema.equals(schema)


@every_schema
def test_no_rows_are_an_empty_table_of_the_schema(schema: pa.Schema):
    table = schemas.to_table([], schema)
    assert table.num_rows == 0
    assert table.schema.equals(schema)


@every_schema
def test_key_order_of_a_row_does_not_matter(schema: pa.Schema):
    row = a_row(schema)
    assert back(schemas.to_table([dict(reversed(row.items()))], schema)) == [row]


@every_schema
def test_unknown_key_raises_value_error_that_names_row_and_key(schema: pa.Schema):
    with pytest.raises(ValueError, match=r"row 1.*surplus"):
        schemas.to_table([a_row(schema), a_row(schema, surplus=1)], schema)


@pytest.mark.parametrize(("name", "column"), required + nullable)
def test_missing_key_raises_value_error_that_names_row_and_key(name: str, column: str):
    row = a_row(SCHEMAS[name])
    del row[column]
    with pytest.raises(ValueError, match=rf"row 1.*{column}"):
        schemas.to_table([a_row(SCHEMAS[name]), row], SCHEMAS[name])


@pytest.mark.parametrize(("name", "column"), required)
def test_null_in_a_required_column_raises_value_error_that_names_row_and_column(name: str, column: str):
    with pytest.raises(ValueError, match=rf"row 1.*{column}"):
        schemas.to_table([a_row(SCHEMAS[name]), a_row(SCHEMAS[name], **{column: None})], SCHEMAS[name])


def test_columns_that_may_be_null_are_the_values_of_a_parse_the_probe_what_only_a_teacher_has_and_how_an_answer_came():
    assert nullable == [
        ("EXAMPLES", "rich"),
        ("EXAMPLES", "reason"),
        ("EXAMPLES", "answer"),
        ("EXAMPLES", "served_model"),
        ("EXAMPLES", "attempts"),
        ("EXAMPLES", "first_byte_s"),
        ("EXAMPLES", "total_s"),
        ("GENERATIONS", "answer"),
        ("GENERATIONS", "prompt_logprobs"),
        ("VERDICTS", "pick"),
        ("VERDICTS", "explanation"),
        ("VERDICTS", "reason"),
        ("VERDICTS", "served_model"),
        ("VERDICTS", "attempts"),
        ("VERDICTS", "first_byte_s"),
        ("VERDICTS", "total_s"),
    ]


@with_status
@pytest.mark.parametrize("status", ["", "OK", "failed", "ok "])
def test_unknown_status_raises_value_error_that_names_it_and_the_valid_ones(schema: pa.Schema, status: str):
    with pytest.raises(ValueError, match="unparsed") as error:
        schemas.to_table([a_row(schema), a_row(schema, status=status)], schema)
    assert repr(status) in str(error.value)


@with_status
@pytest.mark.parametrize("status", ["ok", "unparsed", "refused", "truncated", "error"])
def test_every_documented_status_is_taken(schema: pa.Schema, status: str):
    assert schemas.to_table([a_row(schema, status=status)], schema)["status"].to_pylist() == [status]


@every_schema
@pytest.mark.parametrize("value", [object(), {"a": object()}], ids=["object", "dict"])
def test_value_of_another_type_raises(schema: pa.Schema, value: Any):
    with pytest.raises((ValueError, TypeError)):
        schemas.to_table([a_row(schema, **{schema.names[-1]: value})], schema)
