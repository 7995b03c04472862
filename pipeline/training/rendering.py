"""Rows as token ids, the same for every trainer, and how they are cut into passes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pipeline.chat import completion_ids, prompt_ids
from pipeline.training import TrainingRow

if TYPE_CHECKING:
    from pipeline.study import Training

T = TypeVar("T")


class Rendered(NamedTuple):
    """ids: of prompt and answer, cut at training.max_tokens. first: where the tokens that carry loss begin."""

    row_id: str
    prompt: list[int]
    ids: list[int]
    first: int
    cut: bool

    @property
    def targets(self) -> list[int]:
        return self.ids[self.first :]


def render(tokenizer: Any, training: Training, row: TrainingRow) -> Rendered:
    prompt = prompt_ids(tokenizer, row.conversation)
    ids = prompt + completion_ids(tokenizer, row.conversation, row.answer)
    first = len(prompt) if training.loss_on == "completion" else 1
    return Rendered(row.row_id, prompt, ids[: training.max_tokens], first, len(ids) > training.max_tokens)


def common_prefix(rows: Sequence[Rendered]) -> int:
    """How many tokens all prompts begin with; at least one token of each prompt is left to itself."""
    most = min(min(len(row.prompt), len(row.ids)) for row in rows) - 1
    return next((index for index in range(most) if len({row.prompt[index] for row in rows}) > 1), most)


def micro_batches(rows: Sequence[tuple[T, Rendered]], budget: int) -> Iterator[list[tuple[T, list[Rendered]]]]:
    """Rows with their owners, in order, in runs of at most `budget` tokens; a longer row stands alone.

    Of each run: the owners, each with its rows of that run. An owner whose rows fit into one run is not cut.
    """
    run: list[tuple[T, list[Rendered]]] = []
    tokens = 0
    for _, group in itertools.groupby(rows, key=lambda item: id(item[0])):
        mine = list(group)
        together = sum(len(row.ids) for _, row in mine)
        for place, (owner, row) in enumerate(mine):
            wanted = together if place == 0 and together <= budget else len(row.ids)
            if run and tokens + wanted > budget:
                yield run
                run, tokens = [], 0
            if not run or run[-1][0] is not owner:
                run.append((owner, []))
            run[-1][1].append(row)
            tokens += len(row.ids)
    if run:
        yield run
