"""Seeded draws of rows that keep the make-up of the whole: stratified where possible, balanced margins where not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.errors import UserError

Rows = Sequence[Mapping[str, str]]


def draw(rows: Rows, strata: Sequence[str], size: int, seed: int) -> tuple[list[int], str]:
    """Indices (sorted) of `size` rows, and how they were drawn: all, stratified or margins.

    stratified: scikit-learn's train_test_split on the crossed strata, as in Infantino 2024. It needs two rows in
    every stratum and at least one row of each stratum both inside and outside the draw. Where it cannot be, the
    margins of each column are balanced instead.
    """
    _check(rows, size)
    if size == len(rows):
        return list(range(size)), "all"
    labels = [crossed(row, strata) for row in rows]
    counts = Counter(labels)
    if min(counts.values()) >= 2 and min(size, len(rows) - size) >= len(counts):
        from sklearn.model_selection import train_test_split

        chosen, _ = train_test_split(range(len(rows)), train_size=size, stratify=labels, random_state=seed)
        return sorted(chosen), "stratified"
    return sorted(_balance_margins(rows, strata, size, seed)), "margins"


def balanced(rows: Rows, strata: Sequence[str], size: int, seed: int) -> list[int]:
    """Indices (sorted) of `size` rows that balance each column and the crossed strata, as far as one size can do both.

    What a plan draws its prompts with: unlike `draw` it takes milliseconds to import.
    """
    _check(rows, size)
    return sorted(_balance_margins([{**row, "crossed": crossed(row, strata)} for row in rows], [*strata, "crossed"], size, seed))


def crossed(row: Mapping[str, str], strata: Sequence[str]) -> str:
    return "|".join(row[column] for column in strata)


def _check(rows: Rows, size: int) -> None:
    if size > len(rows):
        raise UserError(f"{size} rows were asked for and there are {len(rows)}; lower the size or make more rows")


def _balance_margins(rows: Rows, strata: Sequence[str], size: int, seed: int) -> list[int]:
    """Greedy: each next row is one whose values are furthest behind their share; ties fall in seeded order."""
    order = np.random.default_rng(seed).permutation(len(rows))
    codes, wanted = [], []
    for column in strata:
        values, inverse = np.unique([rows[index][column] for index in order], return_inverse=True)
        codes.append(inverse)
        wanted.append(np.bincount(inverse, minlength=len(values)) / len(rows))
    taken = [np.zeros_like(share) for share in wanted]
    free = np.ones(len(rows), dtype=bool)
    chosen: list[int] = []
    for drawn in range(1, size + 1):
        behind = sum(((share * drawn - have)[code] for share, have, code in zip(wanted, taken, codes, strict=True)), np.zeros(len(rows)))
        best = int(np.argmax(np.where(free, np.round(behind, 9), -np.inf)))
        free[best] = False
        for have, code in zip(taken, codes, strict=True):
            have[code[best]] += 1
        chosen.append(int(order[best]))
    return chosen


def per_value(rows: Rows, strata: Sequence[str], count: int, seed: int) -> list[int]:
    """`count` distinct rows for each value of each column, no row drawn twice (the evaluation sample of Infantino 2024)."""
    generator = np.random.default_rng(seed)
    free = np.ones(len(rows), dtype=bool)
    chosen: list[int] = []
    for column in strata:
        values = np.array([row[column] for row in rows])
        for value in np.unique(values):
            candidates = np.flatnonzero(free & (values == value))
            if len(candidates) < count:
                raise UserError(f"per_value = {count}: only {len(candidates)} rows are left with {column} = {value!r}")
            picked = generator.choice(candidates, size=count, replace=False)
            free[picked] = False
            chosen.extend(int(index) for index in picked)
    return sorted(chosen)
