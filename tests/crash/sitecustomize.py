"""Kills a driver and its worker at a commit: on the PYTHONPATH of a test's Ray cluster and of the runs that attach to it.

A commit in a folder store is one os.link of a manifest. The file that CRASH_CONTROL names says when to die, `before` or
`after` it, and which process the driver is; it is gone once that has happened.
"""

import os
import signal
import threading
from pathlib import Path

_link = os.link
_one_at_a_time = threading.Lock()


def _crash(moment: str) -> None:
    control = Path(os.environ["CRASH_CONTROL"])
    try:
        wanted, driver = control.read_text().split()
        if wanted != moment:
            return
        control.unlink()
    except FileNotFoundError:
        return
    os.kill(int(driver), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _linked(source, target, *args, **kwargs):
    if "/manifests/" not in str(target):
        _link(source, target, *args, **kwargs)
        return
    with _one_at_a_time:  # a worker commits its steps from several threads: none slips through beside the one that is to die
        _crash("before")
        _link(source, target, *args, **kwargs)
        _crash("after")


if "CRASH_CONTROL" in os.environ:
    os.link = _linked
