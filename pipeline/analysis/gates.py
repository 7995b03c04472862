"""Checks of the instrument before its readings are believed. A failed gate is shown, it is not an exception."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

EVEN_LEVEL = 0.05
"""Base against base is called uneven below this two-sided p value: it then fails for one sound judge in twenty at most."""
BROKEN_AT_MOST = 0.2
"""Win rate that answers with their words in alphabetical order may reach."""
SAME_LOGPROB = {"float32": 1e-3, "bfloat16": 0.1}
"""Mean absolute difference (nats) between two runs of the same model on one prompt that rounding alone may cause."""


class Gate(NamedTuple):
    name: str
    passed: bool
    detail: str
    about: str
    """machinery, or the key of the protocol and judge."""


def even_gate(key: str, judge: str, same: Mapping[str, Any]) -> Gate:
    """The untouched model against itself (through an adapter of no training): as many wins as losses.

    same: wins, losses, ties, unparsed, and rate with its p value (analysis.rates.Rate), None where nothing was parsed.
    """
    rate = same["rate"]
    p = 0.0 if rate is None else rate["p"]
    if p is None:  # one cluster: prompts are all that there is to count
        from scipy.stats import binomtest

        decided = same["wins"] + same["losses"]
        p = float(binomtest(same["wins"], decided).pvalue) if decided else 1.0
    counts = f"{same['wins']} wins, {same['losses']} losses, {same['ties']} ties, {same['unparsed']} unparsed"
    return Gate(f"base against base comes out even ({judge})", p >= EVEN_LEVEL, f"{counts} of the base against itself (p = {p:.2f})", key)


def broken_gate(key: str, judge: str, spoilt: Mapping[str, Any]) -> Gate:
    """Answers with their words in alphabetical order against the answers themselves."""
    rate = spoilt["rate"]["mean"] if spoilt["rate"] else 1.0
    detail = f"spoilt answers reach a win rate of {rate:.2f}; at most {BROKEN_AT_MOST} is allowed, 0.50 is a judge that does not look"
    return Gate(f"a broken answer loses ({judge})", rate <= BROKEN_AT_MOST, detail, key)


def adapter_gate(base: Sequence[float], zero: Sequence[float], cells: Mapping[str, Sequence[float]], precision: str) -> Gate:
    """Log-probabilities of one prompt's tokens: an untrained adapter gives the base's, every cell's differ."""
    noise = _distance(base, zero)
    moved = {name: _distance(base, values) for name, values in cells.items()}
    dead = sorted(name for name, distance in moved.items() if distance <= 3 * noise)
    passed = noise <= SAME_LOGPROB[precision] and not dead
    least = min(moved.values(), default=0.0)
    detail = f"zero adapter moves the log-probabilities by {noise:.1e} nats, the cells by {least:.1e} or more"
    return Gate("adapters are applied, and only where they should be", passed, detail + (f"; without effect: {', '.join(dead)}" if dead else ""), "machinery")


def template_gate(training: Mapping[str, Sequence[int]], generation: Mapping[str, Sequence[int]]) -> Gate:
    """Token ids of each evaluation prompt as training rendered it and as the engine received it."""
    shared = training.keys() & generation.keys()
    different = sorted(row for row in shared if list(training[row]) != list(generation[row]))
    detail = f"{len(shared) - len(different)} of {len(shared)} prompts have the same token ids"
    return Gate("training and generation render prompts alike", bool(shared) and not different, detail, "machinery")


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    if len(one) != len(other) or not one:
        return float("inf")
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)
