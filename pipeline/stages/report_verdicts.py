"""What the judges said about every cell, from committed verdicts to rates. By column: millions of verdicts stay arrays.

A `key` such as `blind-0` is one protocol with one judge of the study, by its number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.analysis import preferences, rates
from pipeline.analysis.verdicts import LOSS, OUTCOMES, TIE, UNPARSED, WIN, Tallies, agreement, outcomes, positions, tallies
from pipeline.artifacts import Step, Store, read_table
from pipeline.plan import Plan

KEPT = ("row_id", "order", "pick", "status", "raw", "explanation", "prompt_tokens", "completion_tokens")
"""Columns of schemas.VERDICTS that go into the report's table as they are."""


@dataclass(frozen=True)
class Judged:
    verdicts: pa.Table
    """One row per verdict: candidate, judge, protocol, cluster, KEPT."""
    outcomes: pa.Table
    """One row per pair, as `analysis.verdicts.outcomes` gives it."""
    tallied: Tallies


def read(plan: Plan, store: Store, steps: Sequence[Step]) -> Judged | None:
    """All verdicts of built judge steps; None without any."""
    if not steps:
        return None
    verdicts = pa.concat_tables([_labelled(plan, step, read_table(store, step, "verdicts.parquet")) for step in steps]).combine_chunks()
    found = outcomes(verdicts)
    return Judged(verdicts, found, tallies(found))


def _labelled(plan: Plan, step: Step, table: pa.Table) -> pa.Table:
    kept = table.select(list(KEPT))
    for name in ("candidate", "judge", "protocol"):
        kept = kept.append_column(name, pa.array([str(step.config[name])] * len(table), pa.string()).dictionary_encode())
    return kept.append_column("cluster", pc.map_lookup(table["fields"], plan.task.cluster, "first")).unify_dictionaries()


def is_(column: pa.ChunkedArray[Any], value: str) -> Any:
    """Which rows hold this value, of a column of strings or of a dictionary of them."""
    return pc.equal(column.cast(pa.string()), pa.scalar(value))


def key_of(plan: Plan, judge: str, protocol: str) -> str:
    return f"{protocol}-{plan.study.judging.judges.index(judge)}"


def keys(plan: Plan) -> list[dict[str, str]]:
    """Every protocol with every judge, in the study's order."""
    study = plan.study.judging
    return [{"key": f"{protocol}-{index}", "protocol": protocol, "judge": judge} for index, judge in enumerate(study.judges) for protocol in study.protocols]


def by_candidate(plan: Plan, judged: Judged | None, tallied: Tallies | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """Candidate -> key -> counts, win rate and ratio with intervals, worst-case bounds, comparison with the base.

    tallied: of a part of the pairs, all of them where not given. Holm's family is the cells under one key.
    """
    tallied = tallied or (judged.tallied if judged else None)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    if tallied is None:
        return found
    win, ratio, worst = rates.win_rates(tallied.counts), rates.ratios(tallied.counts), rates.bounds(tallied.counts)
    cells = {cell.name for cell in plan.cells}
    for label in dict.fromkeys(cell[1:] for cell in tallied.cells):
        here = [index for index, cell in enumerate(tallied.cells) if cell[1:] == label]
        family = [index for index in here if tallied.cells[index][0] in cells]
        compared = dict(zip(family, rates.compare([win[index] for index in family]), strict=True))
        strength = dict(zip(family, preferences.strengths(preferences.against_base(tallied.counts[family]))[1:], strict=True))
        for index in here:
            total = tallied.counts[index].sum(0)
            rate, odds, against = win[index], ratio[index], compared.get(index)
            found.setdefault(tallied.cells[index][0], {})[key_of(plan, *label)] = {
                "wins": int(total[WIN]), "losses": int(total[LOSS]), "ties": int(total[TIE]), "unparsed": int(total[UNPARSED]),
                "rate": {"mean": rate.value, "low": rate.low, "high": rate.high, "p": rate.p, "n": rate.pairs} if rate else None,
                "ratio": odds._asdict() if odds else None,
                "bounds": worst[index],
                "p_holm": against.p_holm if against else None,
                "different": against.different if against else None,
                "strength": strength.get(index),
            }  # fmt: skip
    return found


def by_tier(plan: Plan, judged: Judged | None) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Tier -> what `by_candidate` says of its prompts alone; compared within the tier."""
    if judged is None:
        return {}
    tiers = {row.row_id: row.tier for row in plan.evaluation_rows}
    column = labels(judged.outcomes, tiers)
    return {tier: by_candidate(plan, judged, tallies(judged.outcomes.filter(is_(column, tier)))) for tier in sorted(set(tiers.values()))}


def labels(found: pa.Table, values: Mapping[str, str]) -> pa.ChunkedArray[Any]:
    """The value of each pair's row, as strings: row id -> value."""
    codes, names = _codes(found, "row_id")
    return pa.chunked_array([pa.array([values[name] for name in names], pa.string()).take(pa.array(codes))])


def _codes(table: pa.Table, column: str) -> tuple[np.ndarray[Any, Any], list[str]]:
    """(Number of each row's value, the values) of a column of dictionary strings."""
    whole: Any = table[column].cast(pa.string()).dictionary_encode().combine_chunks()
    whole = whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
    return whole.indices.to_numpy(), [str(value) for value in whole.dictionary.to_pylist()]


def breakdown(plan: Plan, judged: Judged | None) -> list[dict[str, Any]]:
    """Counts of every cell under every key by each value of each stratum, and by all strata together."""
    if judged is None:
        return []
    strata = plan.task.strata
    found = []
    for by in (*((column,) for column in strata), *([strata] if len(strata) > 1 else [])):
        column = labels(judged.outcomes, {row.row_id: " · ".join(row.fields[name] for name in by) for row in plan.evaluation_rows})
        grouped = judged.outcomes.select(["candidate", "judge", "protocol", "outcome"]).append_column("value", column)
        counted: dict[tuple[str, str, str], dict[str, int]] = {}
        for row in grouped.group_by(["candidate", "judge", "protocol", "value", "outcome"]).aggregate([([], "count_all")]).to_pylist():
            place = counted.setdefault((row["candidate"], key_of(plan, row["judge"], row["protocol"]), row["value"]), dict.fromkeys(OUTCOMES, 0))
            place[row["outcome"]] = row["count_all"]
        found += [{"cell": cell, "key": key, "by": " × ".join(by), "value": value, **counts} for (cell, key, value), counts in sorted(counted.items())]
    return found


def length_controlled(plan: Plan, judged: Judged | None, lengths: Mapping[str, Mapping[str, int]], base: str) -> dict[str, dict[str, Any]]:
    """Cell -> key -> win rate at equal length. lengths: cell -> row id -> characters of its answer; `base` among the cells."""
    found: dict[str, dict[str, Any]] = {}
    if judged is None:
        return found
    table = judged.outcomes
    worth = np.select([is_(table["outcome"], name).to_numpy() for name in ("win", "tie", "loss")], [np.array(value) for value in (1.0, 0.5, 0.0)], np.nan)
    coded = {name: _codes(table, name) for name in ("candidate", "judge", "protocol", "row_id", "cluster")}
    place, names = {name: codes for name, (codes, _) in coded.items()}, {name: values for name, (_, values) in coded.items()}
    for number, cell in enumerate(names["candidate"]):
        if cell not in lengths:  # the spoilt answers: nobody asks how they would do at equal length
            continue
        longer = np.array([lengths[cell].get(row, 0) - lengths[base].get(row, 0) for row in names["row_id"]], float)
        for one, judge in enumerate(names["judge"]):
            for other, protocol in enumerate(names["protocol"]):
                here = (place["candidate"] == number) & (place["judge"] == one) & (place["protocol"] == other) & ~np.isnan(worth)
                if not here.any():
                    continue
                made = preferences.length_controlled(worth[here], longer[place["row_id"][here]], place["cluster"][here].astype(np.int64))
                found.setdefault(cell, {})[key_of(plan, judge, protocol)] = made._asdict() if made else None
    return found


def habits(plan: Plan, judged: Judged | None) -> list[dict[str, Any]]:
    """Of each judge under each protocol: verdicts, unparsed ones, position share and flip rate."""
    if judged is None:
        return []
    found = []
    looked = positions(judged.verdicts, judged.tallied)
    for item in keys(plan):
        if (place := looked.get((item["judge"], item["protocol"]))) is None:
            continue
        mine = judged.verdicts.filter(pc.and_(is_(judged.verdicts["judge"], item["judge"]), is_(judged.verdicts["protocol"], item["protocol"])))
        counts = {"verdicts": len(mine), "unparsed": len(mine) - place.verdicts}
        found.append({**item, **counts, "first_position_share": place.first, "flip_rate": place.flips})
    return found


def alphas(judged: Judged | None) -> dict[str, float | None]:
    """Protocol -> Krippendorff's alpha among the study's judges."""
    return agreement(judged.outcomes) if judged else {}
