"""What a cell sees at which step, and at which learning rate."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.training import batches, learning_rate
from pipeline.training.rendering import Rendered, micro_batches

GRIDS = given(count=st.integers(1, 50), steps=st.integers(0, 30), batch=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))


@pytest.mark.fast
@GRIDS
def test_every_step_has_a_full_batch_of_valid_rows(count: int, steps: int, batch: int, seed: int):
    made = batches(count, steps, batch, seed)
    assert [len(rows) for rows in made] == [batch] * steps
    assert all(0 <= row < count for rows in made for row in rows)


@pytest.mark.fast
@GRIDS
def test_every_pass_shows_each_row_once(count: int, steps: int, batch: int, seed: int):
    seen = list(itertools.chain.from_iterable(batches(count, steps, batch, seed)))
    for start in range(0, len(seen), count):
        shown = seen[start : start + count]
        assert len(set(shown)) == len(shown)  # the last pass may end early


@pytest.mark.fast
@GRIDS
def test_rows_are_shown_as_often_as_each_other_but_for_the_pass_under_way(count: int, steps: int, batch: int, seed: int):
    seen = Counter(itertools.chain.from_iterable(batches(count, steps, batch, seed)))
    times = [seen[row] for row in range(count)]
    assert max(times) - min(times) <= 1


@pytest.mark.fast
def test_batch_that_does_not_divide_the_rows_goes_on_into_the_next_pass():
    made = batches(count=10, steps=5, global_batch=4, seed=1)
    seen = list(itertools.chain.from_iterable(made))
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))


@pytest.mark.fast
def test_batch_larger_than_the_rows_shows_each_row_in_turn():
    assert Counter(batches(count=3, steps=1, global_batch=8, seed=1)[0]).most_common()[-1][1] == 2


@pytest.mark.fast
@GRIDS
def test_same_seed_shows_the_same_rows(count: int, steps: int, batch: int, seed: int):
    assert batches(count, steps, batch, seed) == batches(count, steps, batch, seed)


@pytest.mark.fast
def test_more_steps_begin_as_fewer_steps_do():
    assert batches(20, 12, 8, 3407)[:4] == batches(20, 4, 8, 3407)


@pytest.mark.fast
def test_other_seeds_and_passes_show_the_rows_in_another_order():
    orders = {tuple(rows) for seed in range(3) for rows in batches(16, 3, 16, seed)}
    assert len(orders) == 9


@pytest.mark.fast
def test_no_steps_show_nothing():
    assert batches(8, 0, 8, 1) == []


@pytest.mark.fast
@pytest.mark.parametrize("warmup", [0, 3])
def test_constant_rate_stays_at_its_peak_after_the_warmup(warmup: int):
    rates = [learning_rate(step, 8, 1e-3, "constant", warmup) for step in range(8)]
    assert rates[warmup:] == [1e-3] * (8 - warmup)
    assert rates[:warmup] == pytest.approx([1e-3 * step / 3 for step in range(warmup)])


@pytest.mark.fast
def test_rate_without_warmup_starts_at_its_peak_and_falls_to_a_last_step_above_zero():
    rates = [learning_rate(step, 4, 2e-4, "linear", 0) for step in range(4)]
    assert rates == pytest.approx([2e-4, 1.5e-4, 1e-4, 0.5e-4])


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (4, 0), (12, 0), (12, 5), (50, 5), (5, 5), (3, 5), (1, 5), (100, 1)])
@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_rates_are_those_of_transformers(schedule: str, steps: int, warmup: int):
    import torch
    from transformers import get_constant_schedule_with_warmup, get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    linear = schedule == "linear"
    scheduler = get_linear_schedule_with_warmup(optimizer, warmup, steps) if linear else get_constant_schedule_with_warmup(optimizer, warmup)
    wanted = []
    for _ in range(steps):
        wanted.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert [learning_rate(step, steps, 2e-4, schedule, warmup) for step in range(steps)] == pytest.approx(wanted, rel=1e-12)


LENGTHS = given(lengths=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=8), max_size=6), budget=st.integers(1, 120))


@pytest.mark.fast
@LENGTHS
def test_passes_hold_all_rows_in_order_within_the_budget_and_cut_no_cell_that_fits(lengths: list[list[int]], budget: int):
    cells = [
        (f"cell{index}", [Rendered(f"{index}.{place}", [], [0] * length, 0, False) for place, length in enumerate(few)]) for index, few in enumerate(lengths)
    ]
    made = list(micro_batches([(owner, row) for owner, rows in cells for row in rows], budget))
    assert [row for run in made for _, rows in run for row in rows] == [row for _, rows in cells for row in rows]
    for run in made:
        rows = [row for _, few in run for row in few]
        assert len(rows) == 1 or sum(len(row.ids) for row in rows) <= budget
    for owner, rows in cells:
        if sum(len(row.ids) for row in rows) <= budget:
            assert sum(owner == other for run in made for other, _ in run) == 1
