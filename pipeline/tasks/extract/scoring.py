"""Exact checks of an answer that should be one JSON object of known keys, field by field. No text makes them raise."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

CHECKS = ("valid JSON", "nothing but JSON", "no unknown keys", "accuracy", "F1")
"""Beside one check for each attribute, under the attribute's own name."""

_NUMBER = re.compile(
    r"[0-9]{1,3}(?P<group>[ .,'’])[0-9]{3}(?:(?P=group)[0-9]{3})*(?![0-9])(?P<cents>[.,][0-9]{1,2}(?![0-9]))?"
    r"|(?P<whole>[0-9]+)(?:[.,](?P<part>[0-9]+))?"
)


def scores(truth: Mapping[str, str | None], answer: str) -> dict[str, float]:
    """Checks in [0, 1] of an answer, given the value of each attribute (None: not on the page).

    The first JSON object in the answer counts; without one every check is 0. An attribute is right where its key is there
    and both values are the same in normal form; null and blank text are the same. `accuracy` is the mean over
    attributes. `F1` is 2 TP / (2 TP + FP + FN) over values that are not null, where a wrong value is both a false
    positive and a false negative (slot filling, as in MUC-5), and 1 where neither side has a value.
    """
    found = first_object(answer)
    if found is None:
        return dict.fromkeys((*CHECKS[:3], *truth, *CHECKS[3:]), 0.0)
    given, rest = found
    right = {name: name in given and _same(given[name], value) for name, value in truth.items()}
    hits = sum(right[name] for name, value in truth.items() if value is not None)
    claimed = sum(not _blank(given.get(name)) for name in truth)
    wanted = sum(value is not None for value in truth.values())
    return {
        "valid JSON": 1.0,
        "nothing but JSON": float(not rest),
        "no unknown keys": float(given.keys() <= truth.keys()),
        **{name: float(hit) for name, hit in right.items()},
        "accuracy": sum(right.values()) / len(right),
        "F1": 2 * hits / (claimed + wanted) if claimed + wanted else 1.0,
    }


def first_object(text: str) -> tuple[dict[str, Any], str] | None:
    """The first JSON object in a text and what stands around it, stripped; None where there is none. Numbers stay text."""
    decoder = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=str)
    for brace in re.finditer(r"\{", text):
        try:
            value, end = decoder.raw_decode(text, brace.start())
        except RecursionError:
            return None  # thousands of open braces: to try each of them would take quadratic time
        except json.JSONDecodeError:
            continue
        return value, (text[: brace.start()] + text[end:]).strip()
    return None


def normal(value: str) -> str:
    """Normal form of a value: Unicode NFKC, case folded, white space single and none beside numbers, numbers as 1234.5.

    Three digits after a comma, space or apostrophe are thousands (`1,249`), unless after `0,`; three digits after the only
    point are decimals (`1.249`), as in JSON; of two different marks the last is that of the decimals (`1.249,00`).
    """
    text = _NUMBER.sub(_plain_number, " ".join(unicodedata.normalize("NFKC", value).casefold().split()))
    return re.sub(r"(?<=[0-9]) (?=[^0-9])|(?<=[^0-9]) (?=[0-9])", "", text)


def _plain_number(match: re.Match[str]) -> str:
    number, group, cents = match.group(), match["group"], match["cents"]
    if group is None:
        whole, part = match["whole"], match["part"] or ""
    elif cents is None and number.count(group) == 1 and (group == "." or (group == "," and number.startswith("0"))):
        whole, _, part = number.partition(group)
    else:
        whole, part = number.removesuffix(cents or "").replace(group, ""), (cents or "")[1:]
    part = part.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{part}" if part else "")


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _same(given: Any, truth: str | None) -> bool:
    if truth is None or _blank(given):
        return truth is None and _blank(given)
    if isinstance(given, bool):
        given = "true" if given else "false"
    return isinstance(given, str) and normal(given) == normal(truth)
