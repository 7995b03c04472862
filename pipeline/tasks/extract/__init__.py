"""Product attributes out of the text of a product page, as one JSON object, after Oliver & Wang 2024.

Rows are pages of the user's own table and bring their own answers: no teacher is asked, no judge is needed. All pages of
a shop are on one side, training or evaluation, so that evaluation tells how a shop is read that was never seen.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.errors import UserError, nearest
from pipeline.tasks import Conversation, DataFile, Example, Task, row_id
from pipeline.tasks.extract import scoring
from pipeline.tasks.extract.table import Page, read_pages

PAGES = Path(__file__).parent / "pages.jsonl"
"""The table that ships with the task: pages of invented shops, written for this task."""

NEW_SHOP = "new shop"
"""The tier of every evaluation row."""

HELD_OUT_SHARE = 0.25
"""Of the shops, where a study says neither which nor how many."""

COLUMNS = ("shop", "text", "truth", "missing")
"""truth: the attributes as JSON, null for what is not on the page. missing: how many are null."""

RESERVED = (*scoring.CHECKS, *COLUMNS, "cell", "row_id", "raw", "status", "finish_reason", "prompt_tokens", "completion_tokens")
"""Names that a report's tables have beside one column for each attribute."""


class Params(BaseModel):
    """The [task] table of a study: a table of pages, the names of its columns, and which shops are held out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    table_file: DataFile | None = None
    """CSV, JSONL or parquet; the table that ships with the task where not given."""
    shop: str = "shop"
    text: str = "text"
    attributes: tuple[str, ...] = Field(("brand", "product", "color", "material", "size", "price"), min_length=1)
    """Columns that become the keys of the JSON, in this order."""
    held_out: tuple[str, ...] = ()
    held_out_share: float | None = Field(None, gt=0, lt=1)
    """Share of the shops that is held out: those whose digest with `seed` is lowest, at least one and never all."""
    seed: int = 3407

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        if self.held_out and self.held_out_share is not None:
            raise ValueError("give one of held_out, held_out_share")
        for key, names in (("held_out", self.held_out), ("shop, text and attributes", (self.shop, self.text, *self.attributes))):
            if len(set(names)) < len(names):
                raise ValueError(f"{key} must be distinct, got {list(names)}")
        if taken := sorted(set(self.attributes) & set(RESERVED)):
            raise ValueError(f"attributes {taken} have names that a report's own columns have; rename these columns of the table")
        return self


def train(params: Params) -> Iterator[Example]:
    """The pages of shops that are not held out, and every quarantined row: one whose shop cannot be read has no other side."""
    pages, held_out = _split(params)
    return (_example(page) for page in pages if page.problem is not None or page.shop not in held_out)


def evaluation(params: Params) -> Iterator[Example]:
    pages, held_out = _split(params)
    return (replace(_example(page), tier=NEW_SHOP) for page in pages if page.problem is None and page.shop in held_out)


def _split(params: Params) -> tuple[tuple[Page, ...], frozenset[str]]:
    pages = _pages(params)
    shops = sorted({page.shop for page in pages if page.problem is None})
    if len(shops) < 2:
        problems = "".join(f"\n  {problem}" for problem in [page.problem for page in pages if page.problem is not None][:3])
        given = f"{len(shops)} ({', '.join(shops)})" if shops else "0"
        raise UserError(f"both sides of the split need a shop with usable pages; add pages of other shops, the table's are {given}.{problems}")
    for shop in params.held_out:
        if shop not in shops:
            raise UserError(f"held_out: no usable page is of the shop {shop!r}; {nearest(shop, shops)}")
    if len(params.held_out) == len(shops):
        raise UserError(f"held_out: all {len(shops)} shops are held out and none is left to train on; take some from the list")
    if params.held_out:
        return pages, frozenset(params.held_out)
    count = round(len(shops) * (params.held_out_share or HELD_OUT_SHARE))
    drawn = sorted(shops, key=lambda shop: hashlib.sha256(json.dumps([params.seed, shop]).encode()).digest())
    return pages, frozenset(drawn[: min(max(count, 1), len(shops) - 1)])


@functools.lru_cache(maxsize=2)
def _pages(params: Params) -> tuple[Page, ...]:
    file = params.table_file
    path, data = (PAGES, PAGES.read_bytes()) if file is None else (Path(file.path), file.read())
    return tuple(read_pages(path, data, params.shop, params.text, params.attributes))


def _example(page: Page) -> Example:
    truth = json.dumps(page.attributes, ensure_ascii=False)
    missing = sum(value is None for value in page.attributes.values())
    fields = {"shop": page.shop, "text": page.text, "truth": truth, "missing": str(missing)}
    if page.problem is None:
        return Example(row_id(TASK.name, COLUMNS, fields), fields, answer=truth)
    # Its place is what tells a row that could not be read from others like it.
    return Example(row_id(TASK.name, ("problem",), {"problem": page.problem}), fields, problem=page.problem)


def plain(fields: Mapping[str, str]) -> Conversation:
    keys = ", ".join(f'"{name}"' for name in json.loads(fields["truth"]))
    user = f"Return JSON with the keys {keys}; null where the page says nothing.\n\nPage:\n{fields['text']}"
    return [{"role": "system", "content": "You extract product data."}, {"role": "user", "content": user}]


def scores(fields: Mapping[str, str], answer: str) -> dict[str, float]:
    return scoring.scores(json.loads(fields["truth"]), answer)


TASK = Task(
    name="extract", version=1, columns=COLUMNS, strata=("shop", "missing"), cluster="shop", params=Params, train=train, evaluation=evaluation,
    rich=None, plain=plain, parse=None, rubric=None, scores=scores, measure="accuracy",
)  # fmt: skip
