"""What the answers of endpoints use and cost, and when a stage has to stop. Pure: no store, no model, no clock.

A sum of money is either complete or None: one model without a price leaves it unknown, never too small.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import UserError
from pipeline.study import ModelName, Prices, Study

if TYPE_CHECKING:
    from pipeline.llm import Completion


@dataclass(frozen=True)
class Usage:
    """requests: sent, retries included. Tokens as the endpoint counts them."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.requests + other.requests, self.input_tokens + other.input_tokens, self.output_tokens + other.output_tokens)

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens


Bill = Mapping[str, Usage]
"""A model's name, as the study writes it -> what it used."""


def usage_of(completions: Iterable[Completion]) -> Usage:
    return sum((Usage(item.attempts, item.prompt_tokens, item.completion_tokens) for item in completions), Usage())


def added(bill: Bill, model: str, usage: Usage) -> dict[str, Usage]:
    return {**bill, model: bill.get(model, Usage()) + usage}


def money(prices: Prices, bill: Bill) -> float | None:
    """Tokens times price over 10^6, in prices.currency; None where a model on the bill has no price."""
    if any(model not in prices.models for model in bill):
        return None
    return sum((usage.input_tokens * prices.models[model].input + usage.output_tokens * prices.models[model].output) / 1e6 for model, usage in bill.items())


def require_prices(study: Study) -> None:
    """Raises UserError where the budget has a sum of money and a model behind an endpoint no price."""
    asked = [name for name in (study.synthesis.teacher, *study.judging.judges) if name and ModelName.parse(name).behind_endpoint]
    missing = [name for name in asked if name not in study.prices.models]
    if study.budget.money is not None and missing:
        raise UserError(
            f"budget.money = {study.budget.money:g}: [prices] has no price for {', '.join(missing)}. "
            f'Add "{missing[0]}" = {{ input = ..., output = ... }} (per million tokens, names as the study writes them) or take budget.money out'
        )


def require_room(study: Study, used: Bill, planned: Bill) -> None:
    """Raises UserError where what is used and what is planned are together more than the budget has; nothing planned always fits."""
    if not planned:
        return
    total = dict(used)
    for model, usage in planned.items():
        total = added(total, model, usage)
    for name, (limit, needed) in _against(study, total).items():
        if needed > limit:
            so_far = _against(study, used)[name][1]
            raise UserError(
                f"budget.{name} = {_amount(study, name, limit)}, and the study needs about {_amount(study, name, needed)} "
                f"({_amount(study, name, so_far)} used so far). Raise budget.{name}, or ask for less: fewer rows or judges, a lower max_tokens"
            )


def reached(study: Study, used: Bill, under_way: int = 0) -> str | None:
    """A sentence on the limit of the budget that is used up, None where there is room for one more request.

    under_way: requests sent and not answered yet. They count as requests; what they will have cost is not known, so tokens
    and money can end above the limit by what is under way when it is reached.
    """
    for name, (limit, spent) in _against(study, used).items():
        if spent + (under_way if name == "requests" else 0) >= limit:
            return (
                f"the budget is used up: budget.{name} = {_amount(study, name, limit)}, used {_amount(study, name, spent)}. "
                f"Every answer that came is kept; raise budget.{name} in the study and run it again to go on from here"
            )
    return None


def _against(study: Study, bill: Bill) -> dict[str, tuple[float, float]]:
    """Name of each limit that the budget has -> the limit, and what the bill has of it."""
    total, budget = sum(bill.values(), Usage()), study.budget
    measured: dict[str, tuple[float | None, float | None]] = {
        "tokens": (budget.tokens, float(total.tokens)),
        "requests": (budget.requests, float(total.requests)),
        "money": (budget.money, money(study.prices, bill)),
    }
    return {name: (limit, spent) for name, (limit, spent) in measured.items() if limit is not None and spent is not None}


def _amount(study: Study, name: str, value: float) -> str:
    return f"{value:,.4f} {study.prices.currency}" if name == "money" else f"{value:,.0f}"


class Limit(NamedTuple):
    """The share of a stage's rows that may be quarantined, and the study's name for it."""

    setting: str
    share: float


NO_LIMIT = Limit("", 1.0)


@dataclass
class Tally:
    """What all workers of a stage have used and quarantined: one for all of them. Says when to stop, and keeps the first reason.

    rows: of the whole stage under one model. quarantined: reasons and counts in those that are committed already.
    """

    limit: Limit
    rows: int
    quarantined: Counter[str]
    used: Usage = Usage()
    reason: str | None = None
    held: list[str] = field(default_factory=list)
    """Steps whose own share is above the limit: answered, and committed only once the stage as a whole is within it."""

    def use(self, usage: Usage) -> tuple[Usage, str | None]:
        """Add to what is used -> what all workers have used in this run, and why to stop if they must."""
        self.used += usage
        return self.used, self.reason

    def quarantine(self, step: str, rows: int, reasons: Mapping[str, int], hold: bool) -> bool:
        """Count a step's quarantined rows -> whether to commit it.

        hold: its answers are journaled, so with too many bad rows of its own it waits for the others. Without a journal it is
        committed unless the stage has to stop.
        """
        self.quarantined.update(reasons)
        reason = self.check()
        if not hold:
            return reason is None
        good = sum(reasons.values()) <= self.limit.share * rows
        if not good:
            self.held.append(step)
        return good

    def check(self) -> str | None:
        """Why to stop, where more is quarantined already than the whole stage may have."""
        count = self.quarantined.total()
        if count > self.limit.share * self.rows:
            causes = "; ".join(f"{number:,} x {cause}" for cause, number in self.quarantined.most_common(5))
            self.stop(
                f"{count:,} of {self.rows:,} rows are quarantined, more than {self.limit.setting} = {self.limit.share:g} allows: {causes}. "
                f"What is committed or journaled stays. Mend the cause and run again (rows without an answer are asked again), or raise {self.limit.setting}"
            )
        return self.reason

    def stop(self, reason: str) -> None:
        self.reason = self.reason or reason

    def outcome(self) -> tuple[str | None, list[str]]:
        """Why the stage stopped, if it did, and the steps that wait."""
        return self.reason, self.held
