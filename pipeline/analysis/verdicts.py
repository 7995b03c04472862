"""Verdicts -> outcomes of pairs -> tallies, by column and linear in the verdicts: no row becomes a Python object.

Invariant: every pair of a candidate, judge, protocol and row has exactly one outcome, unparsed ones included, and every
outcome is counted in exactly one tally.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Ints = npt.NDArray[Any]

OUTCOMES = ("win", "loss", "tie", "unparsed")
"""From the candidate's side; the order of a tally's columns."""
WIN, LOSS, TIE, UNPARSED = range(4)
PROTOCOLS = ("paper", "blind")
PICKS = ("baseline", "candidate")
KEYS = ("candidate", "judge", "protocol")
COLUMNS = (*KEYS, "row_id", "cluster", "order", "pick")
SPARSE = 8
"""Combinations per row up to which a table of all combinations (9 bytes each) is smaller than what a sort needs."""


def outcomes(verdicts: pa.Table) -> pa.Table:
    """One row per (candidate, judge, protocol, row_id).

    verdicts: candidate, judge, protocol, row_id, cluster and pick as (dictionaries of) strings, order as integers: 0 shows
    the baseline first, 1 the candidate. pick is baseline, candidate, or null where it could not be parsed.
    Returns candidate, judge, protocol, row_id, cluster and outcome as dictionaries of strings. `blind`: both orders parsed
    and equal are a win or a loss, different a tie, anything else unparsed. `paper`: the one verdict decides.
    Raises ValueError for missing columns, unknown values, a verdict delivered twice and a row of two clusters.
    """
    if missing := [name for name in COLUMNS if name not in verdicts.column_names]:
        raise ValueError(f"verdicts have no column {', '.join(missing)}; wanted are {', '.join(COLUMNS)}")
    codes, names = {}, {}
    for name in (*KEYS, "row_id", "cluster"):
        codes[name], names[name] = _coded(verdicts, name)
    order, pick = _orders(verdicts), _picks(verdicts)
    protocol = _positions(names["protocol"], PROTOCOLS, "protocol")[codes["protocol"]] if len(verdicts) else codes["protocol"]
    if np.any((protocol == PROTOCOLS.index("paper")) & (order == 1)):
        raise ValueError("a verdict of protocol paper has order 1; paper shows the baseline first (order 0) and asks once")

    pair, first = _grouped([codes[name] for name in (*KEYS, "row_id")], [len(names[name]) for name in (*KEYS, "row_id")])
    place = pair * 2
    place += order
    if len(twice := np.flatnonzero(np.bincount(place, minlength=1) > 1)):
        which = int(np.flatnonzero(place == twice[0])[0])
        given = {name: names[name][codes[name][which]].as_py() for name in (*KEYS, "row_id")}
        raise ValueError(f"{len(twice)} verdicts were delivered more than once, the first is {given} in order {order[which]}; deliver each verdict once")
    cluster = np.zeros(len(names["row_id"]), np.int32)
    cluster[codes["row_id"]] = codes["cluster"]
    if len(torn := np.flatnonzero(cluster[codes["row_id"]] != codes["cluster"])):
        raise ValueError(f"row {names['row_id'][codes['row_id'][torn[0]]].as_py()!r} has verdicts in several clusters; a row belongs to one cluster")

    picked = np.full(2 * len(first), -1, np.int8)
    picked[place] = pick
    baseline_first, candidate_first = picked[0::2], picked[1::2]
    candidate_first = np.where(protocol[first] == PROTOCOLS.index("blind"), candidate_first, baseline_first)
    unparsed = (baseline_first < 0) | (candidate_first < 0)
    found = np.select([unparsed, baseline_first != candidate_first, baseline_first == 1], [UNPARSED, TIE, WIN], LOSS)
    columns = {name: _dictionary(codes[name][first], names[name]) for name in (*KEYS, "row_id")}
    columns["cluster"] = _dictionary(cluster[codes["row_id"][first]], names["cluster"])
    return pa.table(columns | {"outcome": _dictionary(found.astype(np.int8), pa.array(OUTCOMES))})


class Tallies(NamedTuple):
    """counts[cell, cluster]: how many pairs were won, lost, tied and unparsed (the order of OUTCOMES), int64."""

    cells: tuple[tuple[str, str, str], ...]
    """(candidate, judge, protocol), sorted."""
    clusters: tuple[str, ...]
    """Sorted; a cell without pairs in a cluster has zeros there."""
    counts: npt.NDArray[np.int64]


def tallies(found: pa.Table) -> Tallies:
    """Counts of what `outcomes` found; they do not depend on the order of its rows."""
    codes, names = zip(*(_coded(found, name) for name in (*KEYS, "cluster", "outcome")), strict=True)
    outcome = _positions(names[-1], OUTCOMES, "outcome")[codes[-1]] if len(found) else codes[-1]
    cell, first = _grouped(list(codes[:3]), [len(values) for values in names[:3]])
    labels = [tuple(str(values[code[row]].as_py()) for values, code in zip(names[:3], codes[:3], strict=True)) for row in first]
    clusters = [str(value) for value in names[3].to_pylist()]
    shape = (len(labels), len(clusters), len(OUTCOMES))
    flat = (cell * shape[1] + codes[3]) * shape[2] + outcome
    counts = np.bincount(flat, minlength=shape[0] * shape[1] * shape[2]).reshape(shape)
    by_label, by_cluster = sorted(range(len(labels)), key=labels.__getitem__), sorted(range(len(clusters)), key=clusters.__getitem__)
    cells = tuple((labels[index][0], labels[index][1], labels[index][2]) for index in by_label)
    return Tallies(cells, tuple(clusters[index] for index in by_cluster), counts[by_label][:, by_cluster])


class Position(NamedTuple):
    """How far one judge under one protocol looks at the place instead of the text.

    first: share of parsed verdicts that take the answer shown first. Under `blind` 0.5 is without bias, as each answer is
    shown first once; under `paper` a good candidate lowers it too. flips: share of the pairs parsed in both orders whose
    picks differ; None where no pair has both orders. Zheng et al. 2023 (arXiv 2306.05685) call 1 - flips consistency.
    """

    first: float | None
    flips: float | None
    verdicts: int
    """Parsed."""


def positions(verdicts: pa.Table, tallied: Tallies) -> dict[tuple[str, str], Position]:
    """(judge, protocol) -> its position share and flip rate. tallied: of the same verdicts."""
    judge, judges = _coded(verdicts, "judge")
    protocol, protocols = _coded(verdicts, "protocol")
    order, pick = _orders(verdicts), _picks(verdicts)
    shape = (len(judges), len(protocols), 2, 3)
    flat = ((judge.astype(np.int64) * shape[1] + protocol) * 2 + order) * 3 + pick + 1
    counts = np.bincount(flat, minlength=int(np.prod(shape))).reshape(shape)
    made = {}
    for one, of_judge in enumerate(judges.to_pylist()):
        for other, of_protocol in enumerate(protocols.to_pylist()):
            table = counts[one, other]
            if not table.sum():
                continue
            parsed = int(table[:, 1:].sum())
            taken = int(table[0, 1] + table[1, 2])  # baseline where it came first, candidate where it did
            wins, losses, ties, _ = sum(
                (tallied.counts[index].sum(0) for index, cell in enumerate(tallied.cells) if cell[1:] == (of_judge, of_protocol)), np.zeros(4, np.int64)
            )
            both = int(wins + losses + ties) if of_protocol == "blind" else 0
            made[str(of_judge), str(of_protocol)] = Position(taken / parsed if parsed else None, int(ties) / both if both else None, parsed)
    return made


def agreement(found: pa.Table) -> dict[str, float | None]:
    """Protocol -> Krippendorff's alpha (nominal) of its judges over win, loss and tie of the same candidate and row.

    Krippendorff 2019, Content Analysis, 4th edition, chapter 12: 1 is agreement, 0 is chance; an unparsed outcome is missing.
    None where no pair has parsed outcomes of two judges, or where all of them are one and the same: chance is then undefined.
    """
    candidate, candidates = _coded(found, "candidate")
    row, rows = _coded(found, "row_id")
    protocol, protocols = _coded(found, "protocol")
    code, names = _coded(found, "outcome")
    outcome = _positions(names, OUTCOMES, "outcome")[code] if len(found) else code
    made: dict[str, float | None] = {}
    for index, of_protocol in enumerate(protocols.to_pylist()):
        here = (protocol == index) & (outcome != UNPARSED)
        unit, first = _grouped([candidate[here], row[here]], [len(candidates), len(rows)])
        counts = np.bincount(unit * 3 + outcome[here], minlength=3 * len(first)).reshape(-1, 3)
        made[str(of_protocol)] = _alpha(counts[counts.sum(1) >= 2])
    return made


def _alpha(counts: Ints) -> float | None:
    """counts: (units, values), two or more of each unit. 1 - observed / expected disagreement."""
    judged, totals = counts.sum(1), counts.sum(0)
    expected = int(totals.sum()) ** 2 - sum(int(total) ** 2 for total in totals)
    if not expected:
        return None
    observed = float(((judged**2 - (counts**2).sum(1)) / (judged - 1)).sum())
    return 1 - (int(totals.sum()) - 1) * observed / expected


# ---------------------------------------------------------------- columns as integers


def _coded(table: pa.Table, name: str) -> tuple[Ints, pa.Array[Any]]:
    """(int32 code of each row, what each code stands for). Raises ValueError for a null."""
    codes, values = _nullable(table, name)
    if np.any(codes < 0):
        raise ValueError(f"column {name} holds null in row {int(np.argmax(codes < 0))}; a verdict needs one")
    return codes, values


def _nullable(table: pa.Table, name: str) -> tuple[Ints, pa.Array[Any]]:
    """As `_coded`, with -1 for null."""
    column: Any = table.column(name).combine_chunks()
    column = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    distinct = column.dictionary.dictionary_encode()  # a dictionary of other hands may name a value twice, or null
    known = np.append(distinct.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32), np.int32(-1))
    return known[column.indices.cast(pa.int32()).fill_null(-1).to_numpy(zero_copy_only=False)], distinct.dictionary


def _positions(values: pa.Array[Any], allowed: tuple[str, ...], name: str) -> Ints:
    """Place of each value among the allowed ones. Raises ValueError for any other value."""
    found = [str(value) for value in values.to_pylist()]
    if unknown := sorted(set(found) - set(allowed)):
        raise ValueError(f"column {name} holds {', '.join(map(repr, unknown))}; it may hold {', '.join(map(repr, allowed))}")
    return np.array([allowed.index(value) for value in found], np.int8)


def _orders(verdicts: pa.Table) -> Ints:
    column = verdicts.column("order")
    if column.null_count or not pa.types.is_integer(column.type):
        raise ValueError(f"column order is {column.type} with {column.null_count} nulls; wanted are integers: 0 baseline first, 1 candidate first")
    order = column.to_numpy()
    if len(odd := order[(order != 0) & (order != 1)]):
        raise ValueError(f"column order holds {odd[0]}; it may hold 0 (baseline shown first) or 1 (candidate shown first)")
    return order.astype(np.int8, copy=False)


def _picks(verdicts: pa.Table) -> Ints:
    """-1 unparsed, 0 baseline, 1 candidate."""
    codes, values = _nullable(verdicts, "pick")
    return np.append(_positions(values, PICKS, "pick"), np.int8(-1))[codes]


def _grouped(codes: list[Ints], sizes: list[int]) -> tuple[Ints, Ints]:
    """(dense number of each row's combination of codes, in the combinations' order; first row of each combination).

    Linear where a fair part of all combinations occurs, as it does when every cell is judged on every row; else by a sort.
    """
    key = np.zeros(len(codes[0]), np.int64)
    for code, size in zip(codes, sizes, strict=True):
        key *= size
        key += code
    if math.prod(sizes) <= SPARSE * len(key):
        occurs = np.zeros(math.prod(sizes), bool)
        occurs[key] = True
        count = int(np.count_nonzero(occurs))
        group = (np.cumsum(occurs) - 1)[key]
    else:
        distinct, group = np.unique(key, return_inverse=True)
        count = len(distinct)
    first = np.empty(count, np.int64)
    first[group[::-1]] = np.arange(len(group) - 1, -1, -1)  # the last write wins: the earliest row
    return group, first


def _dictionary(codes: Ints, values: pa.Array[Any]) -> pa.DictionaryArray[Any, Any]:
    return pa.DictionaryArray.from_arrays(codes, values)
