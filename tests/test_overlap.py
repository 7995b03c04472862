"""Repetition is found whatever its case and punctuation, and a template in every text is not called repetition."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.analysis.overlap import overlap

pytestmark = pytest.mark.fast

POEM = "one two three four five six seven eight nine ten eleven twelve"


def test_text_that_stands_in_the_other_set_is_exact_and_all_its_ngrams_are_known():
    found = overlap([POEM, "something else entirely with more than eight words in it"], ["first", POEM.upper().replace(" ", "  ")])
    assert (found.texts, found.exact) == (2, 1)
    assert found.shares == (1.0, 0.0)
    assert found.contaminated == 1


def test_half_of_a_text_counts_as_its_share_of_ngrams():
    found = overlap([POEM], ["Zero, one two three four five -- six seven eight!", "five six"])
    assert found.exact == 0
    assert found.shares == (1 / 5,)


def test_template_that_all_texts_share_is_left_out():
    template = "please write a post for the product of my company and make it "
    texts = [template + " ".join(f"{letter}{index}" for index in range(9)) for letter in "abcd"]
    found = overlap(texts, [template + "something"])
    assert found.shares == (0.0,) * 4


def test_texts_too_short_for_an_ngram_have_no_share_and_still_an_exact_match():
    found = overlap(["Buy now"], ["buy  NOW"])
    assert (found.exact, found.shares, found.mean) == (1, (), None)


def test_nothing_overlaps_with_nothing():
    assert overlap([], []) == (0, 0, ())
    assert overlap([POEM], []).mean == 0.0


@given(st.lists(st.text(string.ascii_lowercase + " .", max_size=80), max_size=6), st.lists(st.text(string.ascii_lowercase + " .", max_size=80), max_size=6))
def test_shares_are_between_none_and_all_and_a_set_holds_itself(texts, others):
    found = overlap(texts, others)
    assert all(0 <= share <= 1 for share in found.shares)
    assert all(share == 1 for share in overlap(texts, texts).shares)
    assert overlap(texts, texts).exact == len(texts)
