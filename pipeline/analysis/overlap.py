"""What of one set of texts stands in another: whether evaluation prompts, or answers, repeat the training rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

NGRAM = 8
"""Words. PaLM's contamination check counts 8-grams (Chowdhery et al. 2022, section 8)."""
CONTAMINATED = 0.7
"""PaLM calls a text contaminated from this share of its 8-grams on."""


class Overlap(NamedTuple):
    """texts: how many were checked. exact: how many stand word for word in the other set.

    shares: of each text with an n-gram of its own, the share of them that the other set holds.
    """

    texts: int
    exact: int
    shares: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        return sum(self.shares) / len(self.shares) if self.shares else None

    @property
    def contaminated(self) -> int:
        return sum(share >= CONTAMINATED for share in self.shares)


def overlap(texts: Sequence[str], others: Sequence[str], n: int = NGRAM) -> Overlap:
    """Of `texts`, what stands in `others`, by words without regard to case and punctuation.

    n-grams that more than half of the texts share are the prompt's template; they say nothing and are left out.
    """
    whole = {_normal(other) for other in others}
    shares = ngram_shares(texts, others, n, template=True)
    return Overlap(len(texts), sum(_normal(text) in whole for text in texts), tuple(share for share in shares if share is not None))


def ngram_shares(texts: Sequence[str], others: Sequence[str], n: int = NGRAM, template: bool = False) -> list[float | None]:
    """Of each text, the share of its distinct n-grams that `others` hold; None for a text too short to have one.

    template: leave out what more than half of the texts share.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    words = CountVectorizer(ngram_range=(n, n), token_pattern=r"(?u)\w+").build_analyzer()
    grams = [set(words(text)) for text in texts]
    if template and len(texts) > 1:
        spread = Counter(gram for found in grams for gram in found)
        grams = [{gram for gram in found if spread[gram] * 2 <= len(texts)} for found in grams]
    wanted = set().union(*grams) if grams else set()
    known = {gram for other in others for gram in words(other) if gram in wanted}
    return [len(found & known) / len(found) if found else None for found in grams]


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())
