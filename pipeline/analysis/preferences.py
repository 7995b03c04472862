"""Models of preference fitted by maximum likelihood: win rates at equal length, and one scale for all candidates.

Invariant: whatever the verdicts, an estimate is finite or it is None.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

PRIOR_WINS = 0.5
"""Added to both sides of every pair that was compared (Haldane 1956; Firth 1993: it takes the first-order bias from a
logit): strengths stay finite where one side won everything."""


class Controlled(NamedTuple):
    """Win rate at equal length. low, high: None with fewer than two clusters. per_length: logits per unit of tanh."""

    value: float
    low: float | None
    high: float | None
    per_length: float


def length_controlled(worth: Floats, longer: Floats, clusters: npt.NDArray[np.int64], level: float = 0.95) -> Controlled | None:
    """What the win rate would be were both answers equally long; as in AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475).

    worth: 1 win, 0.5 tie, 0 loss of each parsed pair. longer: length of the candidate's answer less the base's, any unit.
    clusters: number of each pair's cluster. All of shape (pairs,). Logistic regression of worth on a constant and
    tanh(longer / its standard deviation), read at longer = 0. Interval on the logit scale from the cluster-robust variance
    (Liang & Zeger 1986) with Student's t of clusters - 1 degrees of freedom.
    None where the likelihood has no maximum (Albert & Anderson 1984): all pairs won or all lost, lengths that separate
    wins from losses, or length differences that do not vary. Raises ValueError for other shapes or values.
    """
    if not len(worth) == len(longer) == len(clusters) or not np.isin(worth, (0, 0.5, 1)).all() or not np.isfinite(longer).all():
        raise ValueError(
            f"wanted equally many worths (0, 0.5 or 1), finite length differences and clusters, got {len(worth)}, {len(longer)} and {len(clusters)}"
        )
    won, lost = longer[worth > 0], longer[worth < 1]
    if not len(won) or not len(lost) or won.min() >= lost.max() or lost.min() >= won.max():
        return None
    import statsmodels.api as sm
    from scipy.special import expit
    from statsmodels.tools.sm_exceptions import PerfectSeparationWarning

    length = np.tanh(longer / longer.std())
    model = sm.GLM(worth, np.column_stack([np.ones(len(worth)), length]), family=sm.families.Binomial())
    alone = len(np.unique(clusters)) < 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerfectSeparationWarning)  # separation is ruled out above; ties alone are fitted without error too
        fit = model.fit() if alone else model.fit(cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True)
    if alone:
        return Controlled(float(expit(fit.params[0])), None, None, float(fit.params[1]))
    low, high = expit(fit.conf_int(1 - level)[0])
    return Controlled(float(expit(fit.params[0])), float(low), float(high), float(fit.params[1]))


def against_base(counts: npt.NDArray[np.int64]) -> Floats:
    """Tallies (candidates, clusters, 4) of one judge and protocol -> wins (candidates + 1, candidates + 1), ties as half wins.

    wins[i, j]: how often i beat j. 0 is the base, i + 1 the candidate i.
    """
    totals = counts.sum(1)
    wins = np.zeros((len(totals) + 1, len(totals) + 1))
    wins[1:, 0] = totals[:, 0] + totals[:, 2] / 2
    wins[0, 1:] = totals[:, 1] + totals[:, 2] / 2
    return wins


def strengths(wins: Floats) -> list[float | None]:
    """Bradley-Terry strengths in logits (times 400 / ln 10: Elo points) with the base, number 0, at 0.

    wins: (players, players), how often i beat j, ties as half a win to each. The odds of i against j are
    exp(strength i - strength j) (Bradley & Terry 1952; Hunter 2004), fitted as a logistic regression without a constant
    on the counts of each pair (Agresti 2013, section 11.6). None for players that no chain of comparisons joins with the base.
    Raises ValueError for anything but a square of numbers from zero up.
    """
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1] or not len(wins) or not np.all(wins >= 0):
        raise ValueError(f"wanted wins as a square of numbers from zero up, got {wins.shape}")
    import statsmodels.api as sm
    from scipy.sparse.csgraph import connected_components

    met = wins + wins.T > 0
    _, part = connected_components(met, directed=False)
    joined = np.flatnonzero(part == part[0])
    first, second = np.nonzero(np.triu(met, 1))
    here = part[first] == part[0]
    first, second = first[here], second[here]
    made: list[float | None] = [None] * len(wins)
    made[0] = 0.0
    if len(first):
        design = np.zeros((len(first), len(wins)))
        design[np.arange(len(first)), first], design[np.arange(len(first)), second] = 1, -1
        design = np.concatenate([design, design])[:, joined[1:]]
        won = np.repeat([1.0, 0.0], len(first))
        times = np.concatenate([wins[first, second], wins[second, first]]) + PRIOR_WINS
        fitted = sm.GLM(won, design, family=sm.families.Binomial(), freq_weights=times).fit()
        for player, strength in zip(joined[1:], fitted.params, strict=True):
            made[player] = float(strength)
    return made
