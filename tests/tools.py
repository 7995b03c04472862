"""Programs that tests need and no Python package carries. `python -m tests.tools` builds them beforehand and says where they are."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

VERSITYGW = "v1.8.0"
"""An S3 server in Go (Apache-2.0) whose conditional put is atomic, as a store of this project must have it."""


class MissingToolError(Exception):
    """The program is not here and cannot be built here."""


def tools_folder() -> Path:
    return Path(os.environ.get("DATADOSE_TOOLS") or "~/.cache/datadose/tools").expanduser()


def versitygw() -> Path:
    """The server's program: from PATH, else from the tools folder, else built there (one to ten minutes) where Go is.

    Raises MissingToolError with the reason.
    """
    if found := shutil.which("versitygw"):
        return Path(found)
    program = tools_folder() / "bin" / "versitygw"
    built = program.with_name("versitygw.version")  # what is built of an older pin is not what was asked for
    if program.is_file() and built.is_file() and built.read_text(encoding="utf-8") == VERSITYGW:
        return program
    if not shutil.which("go"):
        raise MissingToolError(f"versitygw is neither on PATH nor at {program}, and there is no go to build it")
    program.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=program.parent) as folder:
        command = ["go", "install", f"github.com/versity/versitygw/cmd/versitygw@{VERSITYGW}"]
        done = subprocess.run(command, env=os.environ | {"GOBIN": folder}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MissingToolError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        Path(folder, "versitygw").replace(program)
    built.write_text(VERSITYGW, encoding="utf-8")
    return program


if __name__ == "__main__":
    print(versitygw())
