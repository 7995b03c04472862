"""The `blind` protocol: neutral names, both orders, a fixed choice, disagreement between the orders is a tie.

Text under judgment is data: what looks like a control token of a chat template is made harmless before it is shown.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pipeline.tasks import Conversation, Task

CHOICES = ("A", "B")
SAMPLING_TOKENS = 5
Outcome = Literal["win", "loss", "tie", "unparsed"]

_CONTROL = re.compile(r"<\|[^<>\n]{0,64}\|>|\[/?(?:INST|SYS)\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>", re.IGNORECASE)
_HEADING = re.compile(r"^[^\S\n]*(?:Post[^\S\n]+[AB]|Request)[\s:]*:", re.IGNORECASE | re.MULTILINE)
MAX_CHARS = 6000
"""Of one text; what is longer is cut and says so. About 1,400 tokens, several times the longest post asked for."""


def neutralised(text: str) -> str:
    """The text with control tokens (also in look-alike characters) broken up, and cut at MAX_CHARS."""
    text, cut = text[:MAX_CHARS], len(text) > MAX_CHARS
    folded = "\n".join(unicodedata.normalize("NFKC", text).splitlines())
    if _CONTROL.search(folded) or _HEADING.search(folded):
        text = _CONTROL.sub(lambda match: re.sub(r"[<>|\[\]]", " ", match[0]), folded)
    text = _HEADING.sub(lambda match: match[0].replace(":", " "), text)
    return text[:MAX_CHARS] + " [cut]" if cut or len(text) > MAX_CHARS else text


def question(task: Task, request: str, baseline: str, candidate: str, order: int) -> Conversation:
    """order 0: the baseline is post A; 1: the candidate is."""
    first, second = (baseline, candidate) if order == 0 else (candidate, baseline)
    return task.judge(neutralised(request), neutralised(first), neutralised(second))


def parse_pick(text: str, order: int) -> tuple[str, str | None]:
    """(status, baseline | candidate | None) of a judge's own message: its last letter, if that is all there is."""
    letters = re.findall(r"\b[AB]\b", text)
    if not letters or len(set(letters)) > 1:
        return "unparsed", None
    return "ok", "baseline" if (letters[-1] == "A") == (order == 0) else "candidate"


def outcome(picks: Sequence[Mapping[str, Any]]) -> Outcome:
    """Of one pair, from the candidate's side, given its verdicts in both orders (rows of schemas.VERDICTS)."""
    found = {pick["order"]: pick["pick"] for pick in picks}
    if len(found) < 2 or None in found.values():
        return "unparsed"
    if found[0] != found[1]:
        return "tie"
    return "win" if found[0] == "candidate" else "loss"


def broken(text: str) -> str:
    """An answer spoilt beyond doubt, for the gate: its words in alphabetical order, without any punctuation."""
    return " ".join(sorted(re.findall(r"\w+", text), key=str.casefold))
