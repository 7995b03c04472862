"""What is asked and how it is scored: one module per task, each exporting TASK. `load` is an import."""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import UserError, nearest

Conversation = list[dict[str, str]]
"""Messages as {"role": system | user | assistant, "content": text}."""


class Parsed(NamedTuple):
    """status: one of schemas.STATUSES. value: None unless status is ok."""

    status: str
    value: str | None


SEEN = "seen combination"
"""Tier of evaluation rows whose every part occurs in training."""


@dataclass(frozen=True)
class Example:
    """One row of a task before anybody answered it: all that its prompts need, and the identity of the row."""

    row_id: str
    fields: Mapping[str, str]
    tier: str = SEEN
    """How new the row is to a model trained on this study's rows."""
    answer: str | None = None
    """What to train on, where the task's rows bring their own answers."""
    problem: str | None = None
    """Why a row of a user's table cannot be used: it is quarantined under this reason."""


class DataFile(BaseModel):
    """A user's file. Studies and steps know it by its digest, so it may move; `path` is where it lies now."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(exclude=True)
    sha256: str

    def read(self) -> bytes:
        """Raises UserError where the file is gone or has changed since the study was loaded."""
        try:
            data = Path(self.path).read_bytes()
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error}); put it back or name another file in the study") from error
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise UserError(f"{self.path} has changed since the study was loaded; run the command again")
        return data


class Criterion(NamedTuple):
    name: str
    explanation: str


@dataclass(frozen=True)
class Rubric:
    """What a judge needs to know to compare two answers; the protocols put it into words."""

    subject: str
    """What is compared, e.g. `sales posts for social media`."""
    criteria: tuple[Criterion, ...]


@dataclass(frozen=True)
class Task:
    """A task variant. A study's [task] table is validated by `params` and handed to `train` and `evaluation`."""

    name: str
    version: int
    columns: tuple[str, ...]
    """Fields that make a row what it is: kept in tables, hashed into the row's id."""
    strata: tuple[str, ...]
    """Columns that subsets and samples balance."""
    cluster: str
    """Column whose rows are not independent of each other (all posts of one company): the unit of resampling."""
    params: type[BaseModel]
    train: Callable[[Any], Iterator[Example]]
    evaluation: Callable[[Any], Iterator[Example]]
    rich: Callable[[Mapping[str, str]], Conversation] | None
    """Fields -> what the teacher is asked; None where rows bring their own answers."""
    plain: Callable[[Mapping[str, str]], Conversation]
    """Fields -> what users of the fine-tune ask; the default for training, always used for evaluation."""
    parse: Callable[[Any, Mapping[str, str], str, bool], Parsed] | None
    """None without a teacher. Params, fields, what the teacher wrote, whether it came to its end -> the answer to train on, or a status."""
    rubric: Rubric | None
    """None: the exact checks tell all there is, and no judge may be asked."""
    scores: Callable[[Mapping[str, str], str], dict[str, float]]
    """Fields (columns only), answer -> exact checks, each in [0, 1]."""
    measure: str | None = None
    """The check that the report draws against rows; the mean of all of them where none is named."""


def row_id(task: str, columns: tuple[str, ...], fields: Mapping[str, str]) -> str:
    """16 hex digits of sha256 over what the row is. Two of 10^6 rows share one with probability 3e-8."""
    text = json.dumps([task, [fields[column] for column in columns]], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load(name: str) -> Task:
    """Raises UserError for a task that does not exist."""
    known = [module.name for module in pkgutil.iter_modules(__path__)]
    if name not in known:
        raise UserError(f"task {name!r} does not exist; {nearest(name, known)}")
    task: Task = importlib.import_module(f"{__name__}.{name}").TASK
    return task
