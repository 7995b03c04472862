"""Means with intervals that respect clusters, and what another doubling of data would change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean and its 95 % interval; low and high are None where fewer than two clusters give no interval."""

    mean: float
    low: float | None
    high: float | None
    n: int


def cluster_mean(values: Sequence[float], clusters: Sequence[str], level: float = 0.95) -> Estimate:
    """Mean of `values` with a cluster-robust interval: answers for one company are not independent of each other.

    Variance G/(G-1) * sum over clusters of (sum of residuals)^2 / n^2 (Liang & Zeger 1986), Student's t with G-1
    degrees of freedom for G clusters (Cameron & Miller 2015, section VI).
    """
    count = len(values)
    if count == 0 or count != len(clusters):
        raise ValueError(f"wanted as many values as clusters and at least one, got {count} and {len(clusters)}")
    mean = math.fsum(values) / count
    sums: dict[str, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    groups = len(sums)
    if groups < 2:
        return Estimate(mean, None, None, count)
    from scipy.stats import t

    error = math.sqrt(groups / (groups - 1) * math.fsum(total**2 for total in sums.values())) / count
    reach = float(t.ppf(0.5 + level / 2, groups - 1)) * error
    return Estimate(mean, mean - reach, mean + reach, count)


class Doubling(NamedTuple):
    """Change of a measure per doubling of distinct rows, with its 95 % interval."""

    slope: float
    low: float
    high: float
    points: int


def per_doubling(rows: Iterable[int], measure: Iterable[float]) -> Doubling | None:
    """Least-squares slope of the measure on log2(rows) (scipy.stats.linregress), Student's t with n-2 degrees of freedom.

    None for fewer than three sizes, where a line has no error left to judge it by.
    """
    x, y = [math.log2(count) for count in rows], list(measure)
    if len(set(x)) < 3:
        return None
    from scipy.stats import linregress, t

    fit = linregress(x, y)
    reach = float(t.ppf(0.975, len(x) - 2) * fit.stderr)
    return Doubling(float(fit.slope), float(fit.slope) - reach, float(fit.slope) + reach, len(x))


def confounded(cells: Iterable[tuple[int, int, int]]) -> list[tuple[int, list[int]]]:
    """Which step counts show equally many distinct rows to several sizes, given (rows, steps, global batch).

    A cell of few steps sees only steps * batch of its rows; sizes above that differ in name alone.
    """
    seen: dict[tuple[int, int], set[int]] = {}
    for rows, steps, batch in cells:
        if steps * batch <= rows:
            seen.setdefault((steps, steps * batch), set()).add(rows)
    return [(steps, sorted(sizes)) for (steps, _), sizes in sorted(seen.items()) if len(sizes) > 1]
