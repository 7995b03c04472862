"""Reads a table of product pages: CSV, JSONL or parquet, one row a page.

Every row of the file becomes one record: either the shop, the text and the attributes, or the problem why it cannot be
used, with its line. No row is dropped, and no row stops the others. The same table gives the same records in every format.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError, nearest


class Page(NamedTuple):
    """where: `line 7` (`row 7` in parquet, from 1). problem: why the page cannot be used, else None."""

    where: str
    shop: str
    text: str
    attributes: dict[str, str | None]
    problem: str | None = None


class _Row(NamedTuple):
    where: str
    values: dict[str, Any]
    problem: str | None = None


def read_pages(path: Path, data: bytes, shop: str, text: str, attributes: Sequence[str]) -> list[Page]:
    """The pages of a table in its order. data: what is in the file; shop, text, attributes: names of columns.

    Text that is not UTF-8, a row of the wrong length, JSON that does not parse, a shop or text that is missing or empty, a
    value that is not a scalar and a text that an earlier row has are problems of their row. An attribute that is missing,
    empty or NaN is None: not on the page. Other values are strings, as the file writes them where it is text.
    Raises UserError for another format, a missing column and a table without rows.
    """
    rows = list(_reader(path)(data, path))
    if not rows:
        raise UserError(f"{path}: the table has no rows; give one row a page")
    _check_columns(path, rows, (shop, text, *attributes))
    return list(_without_duplicates([_page(row, shop, text, attributes) for row in rows]))


def _reader(path: Path) -> Callable[[bytes, Path], Iterator[_Row]]:
    readers = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: a table is read by the end of its name, {', '.join(readers)}; got {path.suffix!r}")
    return readers[path.suffix.lower()]


def _csv(data: bytes, path: Path) -> Iterator[_Row]:
    # Bytes that are not UTF-8 pass as surrogates: they are then a problem of the row that has them and of no other.
    reader = csv.reader(io.StringIO(data.decode("utf-8-sig", "surrogateescape"), newline=""), strict=True)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise UserError(f"{path}: the header in line {first} is not valid CSV: {error}") from error
            last = f" to {reader.line_num}" if reader.line_num > first else ""
            yield _Row(f"line {first}{last}", {}, f"not valid CSV: {error}")
            continue
        if not cells:
            continue
        if header is None:
            header = cells
            if twice := sorted({name for name in header if header.count(name) > 1}):
                raise UserError(f"{path}: the header names {twice} twice; give every column a name of its own")
        elif len(cells) != len(header):
            yield _Row(f"line {first}", {}, f"{len(cells)} cells, where the header has {len(header)}")
        else:
            yield _Row(f"line {first}", dict(zip(header, cells, strict=True)))


def _jsonl(data: bytes, path: Path) -> Iterator[_Row]:
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            try:
                values = json.loads(line.decode("utf-8", "surrogateescape"), parse_float=str, parse_int=str)
            except (ValueError, RecursionError) as error:
                yield _Row(f"line {number}", {}, f"not valid JSON: {error}")
                continue
            problem = None if isinstance(values, dict) else f"a JSON {type(values).__name__}, where an object is wanted"
            yield _Row(f"line {number}", {} if problem else values, problem)


def _parquet(data: bytes, path: Path) -> Iterator[_Row]:
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file: {error}") from error
    columns = {name: _values(column) for name, column in zip(table.column_names, table.columns, strict=True)}
    for index in range(table.num_rows):
        yield _Row(f"row {index + 1}", {name: values[index] for name, values in columns.items()})


def _values(column: pa.ChunkedArray[Any]) -> list[Any]:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        # pyarrow raises for the whole column where one string of it is not UTF-8.
        return [value if value is None else value.decode("utf-8", "surrogateescape") for value in column.cast(pa.large_binary()).to_pylist()]
    return column.to_pylist()


def _check_columns(path: Path, rows: list[_Row], wanted: Sequence[str]) -> None:
    found = {name for row in rows for name in row.values}
    if not found:
        problems = "\n".join(f"  {row.where}: {row.problem}" for row in rows[:3])
        raise UserError(f"{path}: none of its {len(rows)} rows can be read:\n{problems}")
    for name in wanted:
        if name not in found:
            raise UserError(f"{path}: there is no column {name!r}; {nearest(name, found)}")


def _page(row: _Row, shop: str, text: str, attributes: Sequence[str]) -> Page:
    problem, cells = row.problem, dict.fromkeys((shop, text, *attributes), "")
    for name in cells if problem is None else ():
        try:
            cells[name] = _cell(row.values.get(name))
        except ValueError as error:
            problem = f"{name} {error}"
            break
    missing = [name for name in (shop, text) if not cells[name].strip()]
    if problem is None and missing:
        problem = f"{' and '.join(missing)} missing or empty"
    words = {name: " ".join(cell.split()) or None for name, cell in cells.items()}
    return Page(row.where, words[shop] or "", cells[text].strip(), {name: words[name] for name in attributes}, problem and f"{row.where}: {problem}")


def _cell(value: Any) -> str:
    """A scalar as text, empty for None and NaN. Raises ValueError that says what the value is instead."""
    if value is None or (isinstance(value, float | Decimal) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str | int | float | Decimal | date | time):
        raise ValueError(f"is a {type(value).__name__}, where one text or number is wanted")
    cell = str(value)
    try:
        cell.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"is not UTF-8 at its character {error.start + 1}") from error
    return cell


def _without_duplicates(pages: list[Page]) -> Iterator[Page]:
    """Two rows of one text could stand on both sides of the split, or contradict each other."""
    first: dict[str, str] = {}
    for page in pages:
        if page.problem is not None:
            yield page
            continue
        where = first.setdefault(" ".join(page.text.casefold().split()), page.where)
        yield page if where == page.where else page._replace(problem=f"{page.where}: the same text as {where}")
