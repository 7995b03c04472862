"""What tallies of pairs say: win rates, ratios, bounds, comparisons with the base, and what a study can detect at all.

Invariant: prompts of one cluster are never taken for independent, and a rate differs from one half at a level exactly where
its interval at that level leaves one half out. Tallies are integers (cells, clusters, 4): win, loss, tie, unparsed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

DRAWS = 2000
"""Of the bootstrap: their standard deviation is known to 1 / sqrt(2 * 2000) = 1.6 %."""
SEED = 3407
PRIOR = 0.5
"""Wins and losses added to every cell, each as a cluster of its own (Jeffreys)."""
BLOCK = 2**22
"""Numbers that the bootstrap holds at a time (32 MiB)."""
ICC = 0.05
"""Intracluster correlation assumed before there are data. It lies above three quarters of the 1,039 that Adams et al. 2004
(J Clin Epidemiol 57:785, quartiles 0 and 0.032) collected in primary care: cautious, but of another field."""


class Rate(NamedTuple):
    """value: wins plus half the ties, of the parsed pairs. low, high, p: None with fewer than two clusters."""

    value: float
    low: float | None
    high: float | None
    p: float | None
    """Two-sided, of the hypothesis that the candidate is no better and no worse than the base (0.5)."""
    pairs: int
    """Parsed."""


def win_rates(counts: Counts, level: float = 0.95, seed: int = SEED) -> list[Rate | None]:
    """One per cell, None where no pair was parsed. Intervals by a Bayesian bootstrap of clusters (Rubin 1981).

    Each draw weighs the clusters by exponential (Dirichlet) weights, together with two more clusters, of half a win and half
    a loss (Jeffreys' prior), so that no draw is 0 or 1 and even an unbroken row of wins has an interval. The draws' standard
    deviation on the variance-stabilizing scale arcsin(sqrt(rate)) (Brown, Cai & DasGupta 2001; a logit has no power left near
    1: Hauck & Donner 1977), scaled to the unbiased variance of K clusters with G of them real, ((K + 1) / K * G / (G - 1)) ** 0.5,
    times Student's t. Degrees of freedom: Kish's effective number of clusters, (sum of their pairs)^2 / sum of squares, less
    one (Kish 1965; Carter, Schnepel & Steigerwald 2017 on why G - 1 is too many for unequal clusters).
    Where all pairs are won or all lost the data say nothing of their variance: the interval then reaches at least to Clopper
    & Pearson's end for pairs / (design effect at ICC) independent pairs, (alpha / 2) ** (1 / that), and p at least to theirs.
    Simulated coverage of 95 % for 15 clusters and 95 prompts, rates from 0.5 to 0.95 and an ICC from 0 to 0.1: 94 to 97 %.
    """
    pairs = _checked(counts)[..., :3].sum(-1)
    points = counts[..., 0] + counts[..., 2] / 2
    low, high, p = _clustered(points, pairs, level, seed)
    made: list[Rate | None] = []
    for cell in range(len(counts)):
        number = int(pairs[cell].sum())
        value = float(points[cell].sum() / number) if number else 0.0
        made.append(Rate(value, _known(low[cell]), _known(high[cell]), _known(p[cell]), number) if number else None)
    return made


class Ratio(NamedTuple):
    """wins / losses of the decided pairs (the performance ratio of Infantino 2024).

    value and truncated are None without losses. high is None where the interval has no upper end; low then still says how
    much the ratio is at least. Both are None with fewer than two clusters.
    """

    value: float | None
    truncated: float | None
    """value cut (not rounded) to two decimals, as it was published."""
    low: float | None
    high: float | None
    wins: int
    losses: int


def ratios(counts: Counts, level: float = 0.95, seed: int = SEED) -> list[Ratio | None]:
    """One per cell, None where no pair was decided. The interval is that of `win_rates` for wins / (wins + losses), as odds."""
    decided = _checked(counts)[..., :2].sum(-1)
    low, high, _ = _clustered(counts[..., 0].astype(np.float64), decided, level, seed)
    made: list[Ratio | None] = []
    for cell in range(len(counts)):
        wins, losses = (int(total) for total in counts[cell, :, :2].sum(0))
        ends = [float(share / (1 - share)) if share < 1 else None for share in (low[cell], high[cell])]
        value, truncated = (wins / losses, wins * 100 // losses / 100) if losses else (None, None)
        made.append(Ratio(value, truncated, ends[0], ends[1], wins, losses) if wins + losses else None)
    return made


def bounds(counts: Counts) -> list[tuple[float, float] | None]:
    """Win rate of each cell had all its unparsed pairs been lost, and had all been won; None without pairs.

    Worst-case bounds of Manski 1990 (Am Econ Rev 80:319): no assumption about why a verdict could not be parsed.
    """
    made: list[tuple[float, float] | None] = []
    for wins, losses, ties, unparsed in _checked(counts).sum(1).tolist():
        pairs = wins + losses + ties + unparsed
        made.append(((wins + ties / 2) / pairs, (wins + ties / 2 + unparsed) / pairs) if pairs else None)
    return made


class Comparison(NamedTuple):
    """p: of one candidate against the base. p_holm: adjusted for all that were compared. different: p_holm below the level."""

    p: float
    p_holm: float
    different: bool


def compare(rates: Sequence[Rate | None], level: float = 0.05) -> list[Comparison | None]:
    """Holm's step-down correction (Holm 1979) over one family: the candidates of one judge and protocol.

    Where nothing differs, anything is called different in at most `level` of studies, however the candidates depend on each
    other. None for a rate without a p value; it was not compared and does not count in the family.
    """
    from statsmodels.stats.multitest import multipletests

    tested = [(index, rate.p) for index, rate in enumerate(rates) if rate is not None and rate.p is not None]
    made: list[Comparison | None] = [None] * len(rates)
    if tested:
        refused, adjusted, *_ = multipletests([p for _, p in tested], alpha=level, method="holm")
        for (index, p), holm, different in zip(tested, adjusted, refused, strict=True):
            made[index] = Comparison(p, float(holm), bool(different))
    return made


def smallest_detectable(prompts: int, clusters: int, comparisons: int = 1, *, icc: float = ICC, power: float = 0.8, level: float = 0.05) -> float | None:
    """Smallest distance of a win rate from 0.5 that is called different with probability `power`, or None if there is none.

    (t(1 - level / (2 * comparisons)) + t(power)) * sqrt(deff / (4 * prompts)), t with clusters - 1 degrees of freedom; the
    first step of Holm's correction is Bonferroni's; deff = 1 + (prompts / clusters - 1) * icc (Kish 1965, section 5.4).
    1 / 4 is the variance of an outcome without ties, the largest there is. None: one cluster, or more than 0.5 is wanted.
    Raises ValueError for counts below one, more clusters than prompts, and shares outside [0, 1).
    """
    from scipy.special import stdtrit

    if not 1 <= clusters <= prompts or comparisons < 1:
        raise ValueError(f"wanted 1 <= clusters <= prompts and at least one comparison, got {clusters} clusters, {prompts} prompts, {comparisons} comparisons")
    if not (0 <= icc <= 1 and 0.5 <= power < 1 and 0 < level < 1):
        raise ValueError(f"wanted icc in [0, 1], power in [0.5, 1) and level in (0, 1), got {icc}, {power} and {level}")
    if clusters == 1:
        return None
    design_effect = 1 + (prompts / clusters - 1) * icc
    reach = stdtrit(clusters - 1, 1 - level / (2 * comparisons)) + stdtrit(clusters - 1, power)
    deviation = float(reach) * math.sqrt(design_effect / (4 * prompts))
    return deviation if deviation <= 0.5 else None


# ---------------------------------------------------------------- the clustered interval


def _checked(counts: Counts) -> Counts:
    if counts.ndim != 3 or counts.shape[2] != 4 or not np.issubdtype(counts.dtype, np.integer) or np.any(counts < 0):
        raise ValueError(f"wanted counts as integers (cells, clusters, 4) from zero up, got {counts.dtype} {counts.shape}")
    return counts


def _clustered(points: Floats, pairs: Counts, level: float, seed: int) -> tuple[Floats, Floats, Floats]:
    """(low, high, p against one half) of sum(points) / sum(pairs) per cell; nan with fewer than two clusters. See win_rates."""
    from scipy.special import stdtr, stdtrit

    groups = np.count_nonzero(pairs, axis=1)
    known = groups >= 2
    low, high, p = (np.full(len(pairs), np.nan) for _ in range(3))
    points, sizes, groups = points[known], pairs[known].astype(np.float64), groups[known]
    centre = _angle((points.sum(1) + PRIOR) / (sizes.sum(1) + 2 * PRIOR))
    scale = np.sqrt((groups + 3) / (groups + 2) * groups / (groups - 1))
    error = _deviation(points, sizes, centre, seed) * scale
    freedom = sizes.sum(1) ** 2 / (sizes**2).sum(1) - 1
    reach = stdtrit(freedom, 0.5 + level / 2) * error
    share = points.sum(1) / sizes.sum(1)
    # The prior draws the interval inwards; its own estimate belongs to it nevertheless (Brown, Cai & DasGupta 2001, 4.1.2).
    low[known], high[known] = np.minimum(_share(centre - reach), share), np.maximum(_share(centre + reach), share)
    p[known] = 2 * stdtr(freedom, -np.abs(centre - np.pi / 4) / error)
    effective = sizes.sum(1) / (1 + (sizes.sum(1) / groups - 1) * ICC)
    end = (0.5 - level / 2) ** (1 / effective)
    low[known] = np.where(share == 1, np.minimum(low[known], end), low[known])
    high[known] = np.where(share == 0, np.maximum(high[known], 1 - end), high[known])
    p[known] = np.where((share == 0) | (share == 1), np.maximum(p[known], 2 * 0.5**effective), p[known])
    return low, high, p


def _deviation(points: Floats, pairs: Floats, centre: Floats, seed: int) -> Floats:
    """Standard deviation over the draws of the angle of weighted points / weighted pairs, the prior's two clusters included."""
    cells, clusters = points.shape
    numerator = np.concatenate([points.T, np.full((1, cells), PRIOR), np.zeros((1, cells))])
    denominator = np.concatenate([pairs.T, np.full((2, cells), PRIOR)])
    generator = np.random.default_rng(seed)
    step = max(1, BLOCK // max(cells, clusters + 2))
    total, squares = np.zeros(cells), np.zeros(cells)
    for start in range(0, DRAWS, step):
        weights = generator.standard_exponential((min(step, DRAWS - start), clusters + 2))
        away = _angle((weights @ numerator) / (weights @ denominator)) - centre
        total += away.sum(0)
        squares += (away**2).sum(0)
    return np.sqrt(squares / DRAWS - (total / DRAWS) ** 2)


def _angle(share: Floats) -> Floats:
    angle: Floats = np.arcsin(np.sqrt(share))
    return angle


def _share(angle: Floats) -> Floats:
    share: Floats = np.sin(np.clip(angle, 0, np.pi / 2)) ** 2
    return share


def _known(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)
