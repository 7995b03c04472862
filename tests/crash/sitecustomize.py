"""Kills the driver and its worker at a commit: put on PYTHONPATH by the crash test, loaded by every process it starts.

A commit in a folder store is one os.link of a manifest. DATADOSE_ is the product's; CRASH_* are this test's:
CRASH_AT=before|after, CRASH_DRIVER=file with the driver's process id, CRASH_ONCE=file that exists once it has happened.
"""

import contextlib
import os
import signal
from pathlib import Path

_link = os.link


def _crash() -> None:
    with contextlib.suppress(FileExistsError):
        os.close(os.open(os.environ["CRASH_ONCE"], os.O_CREAT | os.O_EXCL))
        os.kill(int(Path(os.environ["CRASH_DRIVER"]).read_text()), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _linked(source, target, *args, **kwargs):  # type: ignore[no-untyped-def]
    commit = "/manifests/" in str(target)
    if commit and os.environ["CRASH_AT"] == "before":
        _crash()
    _link(source, target, *args, **kwargs)
    if commit and os.environ["CRASH_AT"] == "after":
        _crash()


if "CRASH_AT" in os.environ:
    os.link = _linked
