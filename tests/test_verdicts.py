"""Verdicts as columns: every pair has one outcome, every outcome is counted once, and nothing is taken twice."""

from __future__ import annotations

from itertools import product
from typing import Any

import krippendorff
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.analysis.rates import ratios
from pipeline.analysis.verdicts import OUTCOMES, agreement, outcomes, positions, tallies

pytestmark = pytest.mark.fast

SCHEMA = pa.schema([*((name, pa.string()) for name in ("candidate", "judge", "protocol", "row_id", "cluster")), ("order", pa.int64()), ("pick", pa.string())])
PICKS = ("candidate", "baseline", None)


def verdict(order: int, pick: str | None, **other: str) -> dict[str, Any]:
    return {"candidate": "tuned", "judge": "one", "protocol": "blind", "row_id": "r0", "cluster": "k0", "order": order, "pick": pick} | other


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def judged(picks: dict[str, tuple[str | None, str | None]], **other: str) -> list[dict[str, Any]]:
    """Verdicts of both orders, row by row."""
    return [verdict(order, pick, row_id=row, **other) for row, both in picks.items() for order, pick in enumerate(both)]


@pytest.mark.parametrize(("first", "second"), list(product(PICKS, PICKS)))
def test_blind_pair_is_won_or_lost_where_both_orders_agree_and_tied_where_they_do_not(first: str | None, second: str | None):
    wanted = "unparsed" if None in (first, second) else "tie" if first != second else "win" if first == "candidate" else "loss"
    rows = [verdict(0, first), verdict(1, second)]
    assert outcomes(table(rows))["outcome"].to_pylist() == [wanted]
    assert outcomes(table(rows[::-1]))["outcome"].to_pylist() == [wanted]


@pytest.mark.parametrize("order", [0, 1])
def test_blind_pair_with_one_verdict_is_unparsed(order: int):
    assert outcomes(table([verdict(order, "candidate")]))["outcome"].to_pylist() == ["unparsed"]


@pytest.mark.parametrize(("pick", "wanted"), [("candidate", "win"), ("baseline", "loss"), (None, "unparsed")])
def test_paper_pair_is_decided_by_its_one_verdict(pick: str | None, wanted: str):
    assert outcomes(table([verdict(0, pick, protocol="paper")]))["outcome"].to_pylist() == [wanted]


def test_no_verdicts_give_no_outcomes_and_no_cells():
    found = outcomes(table([]))
    assert len(found) == 0
    assert tallies(found).cells == ()
    assert agreement(found) == {}
    assert positions(table([]), tallies(found)) == {}


GIVEN = st.dictionaries(
    st.tuples(st.sampled_from("xy"), st.sampled_from("jk"), st.sampled_from(["blind", "paper"]), st.integers(0, 5)),
    st.tuples(st.sampled_from(PICKS), st.sampled_from(PICKS)),
    min_size=1,
)


def drawn(given: dict[Any, Any]) -> list[dict[str, Any]]:
    rows = []
    for (candidate, judge, protocol, row), picks in given.items():
        for order in (0, 1) if protocol == "blind" else (0,):
            other = {"candidate": candidate, "judge": judge, "protocol": protocol, "row_id": f"r{row}", "cluster": f"k{row % 3}"}
            rows.append(verdict(order, picks[order], **other))
    return rows


@given(GIVEN, st.randoms())
def test_every_pair_is_counted_once_in_its_cell_and_cluster_whatever_the_order_and_encoding(given: dict[Any, Any], random: Any):
    rows = drawn(given)
    whole = tallies(outcomes(table(rows)))
    for cell, by_cluster in zip(whole.cells, whole.counts, strict=True):
        for cluster, counts in zip(whole.clusters, by_cluster, strict=True):
            assert counts.sum() == sum(key[:3] == cell and f"k{key[3] % 3}" == cluster for key in given)
    random.shuffle(rows)
    cut = len(rows) // 2
    encoded = pa.concat_tables([table(rows[:cut]), table(rows[cut:])])
    for name in ("candidate", "judge", "protocol", "row_id", "cluster", "pick"):
        encoded = encoded.set_column(encoded.column_names.index(name), name, pa.chunked_array([chunk.dictionary_encode() for chunk in encoded[name].chunks]))
    again = tallies(outcomes(encoded))
    assert (again.cells, again.clusters, again.counts.tolist()) == (whole.cells, whole.clusters, whole.counts.tolist())


def test_rows_that_are_few_among_all_combinations_are_paired_as_well():
    rows = [row for index in range(50) for row in judged({f"r{index}": ("candidate", "baseline")}, candidate=f"c{index}")]
    found = outcomes(table(rows))
    assert found["outcome"].to_pylist() == ["tie"] * 50
    assert sorted(zip(found["candidate"].to_pylist(), found["row_id"].to_pylist(), strict=True)) == sorted((f"c{index}", f"r{index}") for index in range(50))


def test_dictionary_that_names_a_value_twice_makes_one_pair_of_both_orders():
    rows = table([verdict(0, "candidate"), verdict(1, "candidate")])
    twice = rows.set_column(3, "row_id", pa.DictionaryArray.from_arrays([0, 1], ["r0", "r0"]))
    assert outcomes(twice)["outcome"].to_pylist() == ["win"]


REFUSED = {
    "delivered twice": ([verdict(0, "candidate"), verdict(0, "candidate")], "more than once.*r0"),
    "delivered twice with another pick": ([verdict(1, "candidate"), verdict(1, None)], "more than once.*order 1"),
    "row in two clusters": ([verdict(0, None), verdict(1, None, cluster="k1")], "'r0' has verdicts in several clusters"),
    "unknown protocol": ([verdict(0, None, protocol="open")], "protocol holds 'open'"),
    "unknown pick": ([verdict(0, "A")], "pick holds 'A'"),
    "unknown order": ([verdict(2, None)], "order holds 2"),
    "second order of paper": ([verdict(1, None, protocol="paper")], "paper has order 1"),
    "no judge": ([verdict(0, None, judge=None)], "judge holds null in row 0"),
    "no order": ([verdict(None, None)], "order is int64 with 1 nulls"),
}


@pytest.mark.parametrize(("rows", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_verdicts_that_cannot_be_are_refused(rows: list[dict[str, Any]], says: str):
    with pytest.raises(ValueError, match=says):
        outcomes(table(rows))


def test_verdicts_without_a_column_are_refused_by_its_name():
    with pytest.raises(ValueError, match="no column cluster;"):
        outcomes(table([verdict(0, None)]).drop_columns("cluster"))


# ---------------------------------------------------------------- judges


def test_judge_that_takes_the_first_has_position_share_one_and_flips_every_pair():
    rows = judged({f"r{index}": ("baseline", "candidate") for index in range(4)}) + judged({"r9": (None, "candidate")})
    found = positions(table(rows), tallies(outcomes(table(rows))))
    assert found == {("one", "blind"): (1.0, 1.0, 9)}


def test_judge_that_looks_at_the_text_takes_each_place_half_the_time_and_flips_none():
    rows = judged({"r0": ("baseline", "baseline"), "r1": ("candidate", "candidate"), "r2": ("baseline", "baseline")})
    assert positions(table(rows), tallies(outcomes(table(rows)))) == {("one", "blind"): (0.5, 0.0, 6)}


def test_paper_has_a_position_share_and_no_flip_rate():
    rows = [verdict(0, pick, protocol="paper", row_id=f"r{index}") for index, pick in enumerate(["baseline", "baseline", "candidate", None])]
    assert positions(table(rows), tallies(outcomes(table(rows)))) == {("one", "paper"): (2 / 3, None, 3)}


def test_agreement_is_krippendorffs_alpha_of_the_outcomes_with_unparsed_ones_missing():
    generator = np.random.default_rng(7)
    truth = generator.integers(0, 3, 60)
    values = np.where(generator.random((4, 60)) < 0.6, truth, generator.integers(0, 4, (4, 60)))
    both = {"win": ("candidate", "candidate"), "loss": ("baseline", "baseline"), "tie": ("baseline", "candidate"), "unparsed": (None, "candidate")}
    rows = [
        row for judge in range(4) for index, value in enumerate(values[judge]) for row in judged({f"r{index}": both[OUTCOMES[value]]}, judge=f"judge {judge}")
    ]
    wanted = krippendorff.alpha(reliability_data=np.where(values < 3, values.astype(float), np.nan), level_of_measurement="nominal")
    assert 0.2 < wanted < 0.8
    assert agreement(outcomes(table(rows))) == {"blind": pytest.approx(wanted, abs=1e-12)}


def test_one_judge_and_judges_of_one_outcome_only_have_no_agreement():
    one = judged({"r0": ("candidate", "candidate"), "r1": ("baseline", "baseline")})
    assert agreement(outcomes(table(one))) == {"blind": None}
    same = judged({"r0": ("candidate", "candidate")}) + judged({"r0": ("candidate", "candidate")}, judge="two")
    assert agreement(outcomes(table(same))) == {"blind": None}


# ---------------------------------------------------------------- Infantino 2024

PUBLISHED = (
    (88, 50, 7.27), (176, 50, 5.71), (176, 150, 5.71), (88, 150, 5.64), (8800, 1100, 5.26), (17600, 2200, 4.93), (8800, 150, 4.52), (1760, 50, 4.27),
    (1760, 220, 4.27), (17600, 150, 4.22), (176, 22, 4.22), (17600, 50, 4.16), (8800, 50, 3.52), (1760, 150, 3.38), (88, 11, 1.35),
)  # fmt: skip
"""(rows, steps, performance ratio) in the paper's order."""
VERDICTS = (
    (80, 11), (80, 14), (80, 14), (79, 14), (79, 15), (79, 16), (77, 17), (77, 18), (77, 18), (76, 18), (76, 18), (75, 18), (74, 21), (71, 21), (54, 40),
)  # fmt: skip
"""(wins, losses): of all counts that give the published ratio the most verdicts that 95 prompts allow. 7.27 needs 91 or fewer."""


def test_published_ratios_come_out_of_verdicts_in_the_papers_order():
    rows = []
    for (size, steps, _), (wins, losses) in zip(PUBLISHED, VERDICTS, strict=True):
        for index in range(wins + losses):
            other = {"candidate": f"{size}/{steps}", "protocol": "paper", "row_id": f"r{index}", "cluster": f"k{index % 15}"}
            rows.append(verdict(0, "candidate" if index < wins else "baseline", **other))
    tallied = tallies(outcomes(table(rows)))
    found = dict(zip((cell[0] for cell in tallied.cells), ratios(tallied.counts), strict=True))
    wanted = [(f"{size}/{steps}", ratio) for size, steps, ratio in PUBLISHED]
    ranked = sorted((name for name, _ in wanted), key=lambda name: -found[name].value)  # stable: equal ratios keep the paper's order
    assert [(name, found[name].truncated) for name in ranked] == wanted
    assert all(wins + losses <= 95 for wins, losses in VERDICTS)
    assert all(found[name].low < ratio < found[name].high for name, ratio in wanted)
