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
    from sklearn.feature_extraction.text import CountVectorizer

    words = CountVectorizer(ngram_range=(n, n), token_pattern=r"(?u)\w+").build_analyzer()
    grams = [set(words(text)) for text in texts]
    spread = Counter(gram for found in grams for gram in found)
    if len(texts) > 1:
        grams = [{gram for gram in found if spread[gram] * 2 <= len(texts)} for found in grams]
    wanted = set().union(*grams) if grams else set()
    known = {gram for other in others for gram in words(other) if gram in wanted}
    whole = {_normal(other) for other in others}
    return Overlap(len(texts), sum(_normal(text) in whole for text in texts), tuple(len(found & known) / len(found) for found in grams if found))


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())
