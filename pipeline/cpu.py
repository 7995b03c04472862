"""Libraries that a CPU worker preloads: an allocator that keeps large blocks, and Intel's OpenMP.

glibc's malloc gives every large tensor back to the kernel and faults it in anew. Both libraries come with the laptop
lock, so nothing has to be installed on the machine.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def preload_environment() -> Mapping[str, str]:
    site = next((Path(entry) for entry in sys.path if (Path(entry) / "cmeel.prefix").is_dir()), None)
    found = [path for path in ((site / "cmeel.prefix/lib/libmimalloc.so") if site else None, Path(sys.prefix) / "lib/libiomp5.so") if path and _loads(path)]
    # Blocks that mimalloc hands back after 10 ms are faulted in again at the next step: 250 tokens/s, 360 if it keeps them.
    return {"LD_PRELOAD": ":".join(map(str, found)), "MIMALLOC_PURGE_DELAY": "-1"} if found else {}


def _loads(library: Path) -> bool:
    """Whether it is there with what it needs: mimalloc wants libatomic, and a process that preloads it without does not start."""
    return (
        library.is_file()
        and subprocess.run(["true"], env={"LD_PRELOAD": str(library), "PATH": "/usr/bin:/bin"}, capture_output=True, check=False).returncode == 0
    )
