"""Which devices train which cells, and when: large cells on several at once, small ones several to a device, longest first.

A gang splits each global batch over 2, 4 or 8 devices, which is worth it where a cell alone would outlast the rest. Gangs
come first and the widest of them before the others, on devices next to each other, so no device ever waits for another in
the middle of its list. Cells on one device are started in order, `share` of them at once over one frozen base.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError

WIDTHS = (1, 2, 4, 8)
CLOSE = 1.005
"""A makespan within this factor of the lower bound is not searched further."""
FINER = 16
"""Widths are tried for bounds on a cell's time of 2^(-i/4) times the lower bound on the makespan, i below this number."""


@dataclass(frozen=True)
class Load:
    """A cell as devices see it: steps of batch_rows rows of tokens_per_row tokens. memory_gib: its adapter, gradient and optimizer state."""

    key: str
    steps: int
    batch_rows: int
    tokens_per_row: float
    memory_gib: float = 0.0


@dataclass(frozen=True)
class Device:
    """points: tokens of one forward and backward pass -> tokens per second, as measured; between points the time is interpolated.

    sync_s: what a step of a gang costs on top. memory_gib: of the device; base_gib: of the frozen base and a pass's activations.
    """

    points: tuple[tuple[float, float], ...]
    sync_s: float = 0.0
    memory_gib: float = float("inf")
    base_gib: float = 0.0

    def seconds(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of passes of so many tokens each. Under the first point a pass takes as long as there, beyond the last it has that speed."""
        sizes = np.array([size for size, _ in self.points])
        times = sizes / np.array([speed for _, speed in self.points])
        return np.where(tokens > sizes[-1], tokens * times[-1] / sizes[-1], np.interp(tokens, sizes, times))


@dataclass(frozen=True)
class Placed:
    """Cells that these devices train from start_s to end_s: one cell on a gang, or one or more on a single device."""

    keys: tuple[str, ...]
    devices: tuple[int, ...]
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Schedule:
    """placed: for each device in the order in which it comes to them. busy_s: over all devices."""

    placed: tuple[Placed, ...]
    makespan_s: float
    lower_bound_s: float
    busy_s: float

    def of(self, device: int) -> list[Placed]:
        return [item for item in self.placed if device in item.devices]


def place(loads: Sequence[Load], devices: int, device: Device, gang: int = 1, share: int = 1) -> Schedule:
    """gang: devices that may train one cell together. share: cells that one device may train at once.

    The lower bound holds for every schedule of these cells: no device is ever idle and each cell's tokens pass at the best
    speed that sharing allows or on the gang that costs least; or the longest cell at the width at which it is fastest.
    Raises UserError where a cell does not fit.
    """
    if devices < 1:
        raise UserError(f"{devices} devices were given; wanted at least one")
    _require_memory(loads, device)
    if not loads:
        return Schedule((), 0.0, 0.0, 0.0)
    share = _share(loads, device, share)
    widths = [width for width in WIDTHS if width <= min(gang, devices)]
    steps, batch, tokens = (np.array(column, float) for column in zip(*((load.steps, load.batch_rows, load.tokens_per_row) for load in loads), strict=True))
    alone = [steps * (device.seconds(np.ceil(batch / width) * tokens) + (device.sync_s if width > 1 else 0.0)) for width in widths]
    times = np.stack([steps * device.seconds(share * batch * tokens) / share, *alone[1:]])
    least = alone[0] if share == 1 else steps * batch * tokens / _best_speed(device, share * float((batch * tokens).max()))
    area = np.minimum.reduce([least, *(seconds * width for seconds, width in zip(alone[1:], widths[1:], strict=True))]).sum() / devices
    bound = float(max(area, np.minimum.reduce(alone).max()))
    best: tuple[float, list[tuple[int, int, int]]] | None = None
    for index in range(FINER if len(widths) > 1 else 1):
        found = _place_within(times, widths, devices, bound * 2 ** (-index / 4))
        if best is None or found[0] < best[0]:
            best = found
        if best[0] <= CLOSE * bound:
            break
    assert best is not None
    placed = _timed(loads, times, widths, best[1], device, share)
    makespan = max(item.end_s for item in placed)
    return Schedule(placed, makespan, bound, sum((item.end_s - item.start_s) * len(item.devices) for item in placed))


def _require_memory(loads: Sequence[Load], device: Device) -> None:
    for load in loads:
        if device.base_gib + load.memory_gib > device.memory_gib:
            raise UserError(
                f"cell {load.key} needs {device.base_gib + load.memory_gib:.1f} GiB and a device has {device.memory_gib:.1f}; take a smaller base or rank"
            )


def _share(loads: Sequence[Load], device: Device, share: int) -> int:
    """How many of the largest cells a device holds at once, at most `share`."""
    room, held = device.memory_gib - device.base_gib, 0.0
    for count, load in enumerate(sorted(loads, key=lambda load: -load.memory_gib)[:share]):
        held += load.memory_gib
        if held > room:
            return count
    return share


def _best_speed(device: Device, most: float) -> float:
    """Tokens per second of the best pass of at most so many tokens."""
    sizes = np.array([most, *(size for size, _ in device.points if size < most)])
    return float((sizes / device.seconds(sizes)).max())


def _place_within(times: NDArray[np.float64], widths: list[int], devices: int, limit: float) -> tuple[float, list[tuple[int, int, int]]]:
    """Each cell at the least width at which it takes no longer than `limit`, longest first on the device that is free first.

    The makespan, and (cell, place of its width, first device) in the order in which they are placed.
    """
    fits = times <= limit
    chosen = np.where(fits.any(0), fits.argmax(0), times.argmin(0))
    loads = [0.0] * devices
    placed = []
    for place in reversed(range(len(widths))):
        width = widths[place]
        members = np.flatnonzero(chosen == place)
        if not len(members):
            continue
        members = members[np.argsort(-times[place, members], kind="stable")]
        # Wider gangs lie on aligned blocks, so all devices of a block of this width are free at the same time.
        free = [(loads[first], first) for first in range(0, devices - width + 1, width)]
        heapq.heapify(free)
        for cell, seconds in zip(members.tolist(), times[place, members].tolist(), strict=True):
            load, first = free[0]
            heapq.heapreplace(free, (load + seconds, first))
            placed.append((cell, place, first))
        for load, first in free:
            loads[first : first + width] = [load] * width
    return max(loads), placed


def _timed(
    loads: Sequence[Load], times: NDArray[np.float64], widths: list[int], cells: list[tuple[int, int, int]], device: Device, share: int
) -> tuple[Placed, ...]:
    """With the times that the cells really have: one that shares a device ends when its steps are taken."""
    clock: dict[int, float] = {}
    alone: dict[int, list[Load]] = {}
    placed = []
    for cell, place, first in cells:
        if widths[place] == 1:
            alone.setdefault(first, []).append(loads[cell])
            continue
        members = tuple(range(first, first + widths[place]))
        start = clock.get(first, 0.0)
        end = start + float(times[place, cell])
        clock |= dict.fromkeys(members, end)
        placed.append(Placed((loads[cell].key,), members, start, end))
    for first, queue in sorted(alone.items()):
        start = clock.get(first, 0.0)
        placed.append(Placed(tuple(load.key for load in queue), (first,), start, start + _shared_seconds(queue, device, share)))
    return tuple(placed)


def _shared_seconds(queue: list[Load], device: Device, share: int) -> float:
    """Of a device that trains these cells in order, `share` at once: each pass takes a step of all that are under way."""
    if share == 1:
        lengths = np.array([load.batch_rows * load.tokens_per_row for load in queue])
        return float((np.array([load.steps for load in queue]) * device.seconds(lengths)).sum())
    waiting = iter(queue)
    running = [(load.steps, index, load.batch_rows * load.tokens_per_row) for index, load in enumerate(itertools.islice(waiting, share))]
    heapq.heapify(running)
    tokens, ended = math.fsum(size for _, _, size in running), 0
    passes: list[tuple[int, float]] = []
    for index, following in enumerate(itertools.chain(waiting, itertools.repeat(None, len(running))), len(running)):
        until, _, size = running[0]
        passes.append((until - ended, tokens))
        ended, tokens = until, tokens - size
        if following is None:
            heapq.heappop(running)
        else:
            size = following.batch_rows * following.tokens_per_row
            heapq.heapreplace(running, (ended + following.steps, index, size))
            tokens += size
    counts, sizes = np.array(passes).T
    return float((counts * device.seconds(sizes)).sum())
