"""Tests of the whole project; run them with `python -m pytest` from the repository's root."""
