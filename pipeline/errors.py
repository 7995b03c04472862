"""Errors that teach: what was given, what was wanted, what to do. The command line prints them without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can mend: a study, a setting, a file, a full disk."""


class WriteError(UserError):
    """The store took nothing more: what is committed stays, and a rerun goes on once it can be written again."""


class EndpointStopped(UserError):  # noqa: N818  # what it tells is that the work stopped, not that it was wrong
    """An endpoint will answer nothing more for now (key refused, model gone, quota or budget used up): what came back stays."""


class StageError(Exception):
    """Some steps of a stage failed; the others are committed and a rerun builds only what is missing."""

    def __init__(self, stage: str, failed: dict[str, str], built: int) -> None:
        self.stage, self.failed, self.built = stage, failed, built
        alike: dict[str, list[str]] = {}
        for step, reason in sorted(failed.items()):
            alike.setdefault(reason, []).append(step)
        lines = "\n".join(f"  {', '.join(steps)}: {reason}" for reason, steps in alike.items())
        super().__init__(f"{stage}: {len(failed)} of {len(failed) + built} steps failed (a rerun builds only these):\n{lines}")


def nearest(given: str, valid: Iterable[str]) -> str:
    """A hint `, did you mean 'x'?` or the list of what is valid."""
    names = sorted(valid)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(names)}"
