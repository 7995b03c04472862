"""Cells on devices: whatever the cells, every one is trained once, no device does two things at once, and the bound holds."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.plan import make_plan
from pipeline.planner import Device, Load, place
from pipeline.study import load_study

pytestmark = pytest.mark.fast

ROWS = Device(((1.0, 1.0),))
"""A row a second, however many: times are rows on the critical path."""
MEASURED = Device(((500, 4000.0), (1000, 6000.0), (2000, 8000.0), (4000, 10000.0), (8000, 12000.0)), sync_s=0.02, memory_gib=80, base_gib=8)
"""The shape of a real curve: short passes are slow."""

LOADS = st.lists(
    st.builds(Load, st.just(""), st.integers(1, 300), st.sampled_from([1, 4, 8]), st.sampled_from([1.0, 100.0, 600.0]), st.sampled_from([0.0, 0.5, 20.0])),
    max_size=30,
).map(lambda loads: [Load(f"c{index}", load.steps, load.batch_rows, load.tokens_per_row, load.memory_gib) for index, load in enumerate(loads)])


@given(loads=LOADS, devices=st.integers(1, 20), gang=st.sampled_from([1, 2, 3, 8]), share=st.integers(1, 5), device=st.sampled_from([ROWS, MEASURED]))
def test_schedule_trains_every_cell_once_and_nothing_overlaps(loads, devices, gang, share, device):
    made = place(loads, devices, device, gang, share)
    assert sorted(key for item in made.placed for key in item.keys) == sorted(load.key for load in loads)
    assert all(len(item.devices) <= gang and set(item.devices) <= set(range(devices)) for item in made.placed)
    assert all(len(item.keys) == 1 for item in made.placed if len(item.devices) > 1)
    for number in range(devices):
        mine = made.of(number)
        assert all(before.end_s <= after.start_s + 1e-9 for before, after in itertools.pairwise(mine))
    assert made.makespan_s == pytest.approx(max((item.end_s for item in made.placed), default=0.0))
    assert made.makespan_s >= made.lower_bound_s * (1 - 1e-9)


@given(loads=LOADS, devices=st.integers(1, 20))
def test_one_cell_a_device_is_within_four_thirds_of_the_bound(loads, devices):
    """Graham (1969): longest first ends within 4/3 - 1/(3m) of the best schedule; the bound may lie below that by the longest cell."""
    made = place(loads, devices, ROWS)
    longest = max((load.steps * load.batch_rows * load.tokens_per_row for load in loads), default=0.0)
    assert made.makespan_s <= made.lower_bound_s + longest + 1e-6


@given(loads=LOADS, devices=st.integers(1, 20), share=st.integers(1, 5))
def test_gangs_never_end_later_than_none(loads, devices, share):
    without = place(loads, devices, MEASURED, 1, share)
    assert place(loads, devices, MEASURED, 8, share).makespan_s <= without.makespan_s * 1.25


@given(loads=LOADS, gang=st.sampled_from([1, 8]))
def test_one_device_does_everything(loads, gang):
    made = place(loads, 1, ROWS, gang)
    assert made.makespan_s == pytest.approx(made.lower_bound_s) == pytest.approx(made.busy_s)


def grid():
    plan = make_plan(load_study("paper"))
    return [Load(cell.name, cell.steps, plan.study.training.global_batch, 1.0) for cell in plan.cells]


def test_reference_grid_on_fifteen_gpus_keeps_the_critical_path_short():
    assert place(grid(), 15, ROWS).makespan_s == 17_600  # one cell a GPU
    made = place(grid(), 15, ROWS, 8)
    assert made.makespan_s <= 3_400
    assert made.lower_bound_s == pytest.approx(36_424 / 15)


@pytest.mark.parametrize("devices", [1, 2, 4, 8, 32, 64])
def test_reference_grid_gets_no_slower_with_more_devices(devices):
    assert place(grid(), devices * 2, ROWS, 8).makespan_s <= place(grid(), devices, ROWS, 8).makespan_s


@pytest.mark.parametrize(("gang", "share"), [(1, 1), (8, 1), (8, 4)])
def test_hundred_thousand_cells_on_a_thousand_devices_are_placed_in_seconds_near_the_bound(gang, share):
    dice = random.Random(1)
    loads = [Load(f"c{index}", dice.choice((11, 22, 50, 150, 220, 1100, 2200)), 8, 500.0, 0.5) for index in range(100_000)]
    started = time.process_time()
    made = place(loads, 1000, MEASURED, gang, share)
    assert time.process_time() - started <= 5
    assert made.makespan_s <= 1.02 * made.lower_bound_s


def test_sharing_pays_where_short_passes_are_slow_and_memory_bounds_it():
    small = [Load(f"c{index}", 50, 1, 100.0, 30.0) for index in range(8)]
    alone, three = (place(small, 1, MEASURED, share=share).makespan_s for share in (1, 3))
    assert three < 0.6 * alone
    assert place(small, 1, MEASURED, share=2) == place(small, 1, MEASURED, share=8)  # 8 + 3 x 30 GiB are more than 80


def test_cells_of_other_lengths_share_a_device_until_each_has_ended():
    """By hand: passes of 2, 2 and then 1 row at a row a second, the third cell beginning when the first has ended."""
    loads = [Load("a", 3, 1, 1.0), Load("b", 2, 1, 1.0), Load("c", 2, 1, 1.0)]
    flat = Device(((1.0, 1.0), (2.0, 2.0)))  # a pass takes a second whether it has one row or two
    (placed,) = place(loads, 1, flat, share=2).placed
    assert placed.keys == ("a", "b", "c")
    assert placed.end_s == 4.0


def test_large_cell_gets_a_gang_and_small_ones_do_not():
    made = place([Load("large", 800, 8, 1.0), *(Load(f"small{index}", 10, 8, 1.0) for index in range(20))], 9, ROWS, 8)
    widths = {item.keys[0]: len(item.devices) for item in made.placed}
    assert widths.pop("large") == 8
    assert set(widths.values()) == {1}


def test_cell_that_no_device_holds_is_named():
    with pytest.raises(UserError, match=r"cell big needs 98\.0 GiB and a device has 80\.0"):
        place([Load("big", 1, 8, 1.0, 90.0)], 2, MEASURED)


def test_no_devices_are_refused():
    with pytest.raises(UserError, match="wanted at least one"):
        place([], 0, ROWS)
