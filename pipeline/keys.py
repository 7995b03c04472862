"""Keys of endpoints. A key is read where it is used, from that process's environment or a mounted file, and goes nowhere else.

`Secret` cannot be printed, logged or pickled; what an endpoint says is scrubbed of it before anybody sees it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NoReturn

from pipeline.errors import UserError
from pipeline.runtime import Runtime
from pipeline.study import ModelName

GROQ_KEY = "GROQ_API_KEY"
KEY_FILE = "DATADOSE_ENDPOINT_KEY_FILE"


class Secret:
    """A key whose repr and str are '***'. `reveal` is for the one place that sends it."""

    __slots__ = ("__value",)

    def __init__(self, value: str) -> None:
        self.__value = value

    def reveal(self) -> str:
        return self.__value

    def __len__(self) -> int:
        return len(self.__value)

    def scrub(self, text: str) -> str:
        return text.replace(self.__value, "***")

    def scrub_bytes(self, data: bytes) -> bytes:
        return data.replace(self.__value.encode(), b"***")

    def __repr__(self) -> str:
        return "***"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key does not travel: read it where it is used")


def read_key(model: ModelName, runtime: Runtime) -> Secret | None:
    """The key that belongs to the model's endpoint; None where an `openai-compatible` one has none set.

    Variable GROQ_API_KEY for groq; Runtime.endpoint_key_file, else the variable Runtime.endpoint_key_name for the others.
    Raises UserError where a key must be there and is not, or cannot be one; the message never holds it.
    """
    source = key_source(model, runtime)
    file = runtime.endpoint_key_file if source == KEY_FILE else None
    value = (_read(file) if file else os.environ.get(source, "")).strip()  # files end in a newline
    if not value and model.provider == "groq":
        raise UserError(f"{GROQ_KEY} is not set, and {model} wants a key; put it into the environment of this process and of its workers")
    if not value:
        return None
    if not re.fullmatch(r"[!-~]+", value):
        raise UserError(f"the key in {source} is none: wanted printable ASCII characters without a space; look at how it got there")
    return Secret(value)


def key_source(model: ModelName, runtime: Runtime) -> str:
    """The variable that holds the key, or that names its file. Not the file's own name: a key put there by mistake would show."""
    if model.provider == "groq":
        return GROQ_KEY
    return runtime.endpoint_key_name if runtime.endpoint_key_file is None else KEY_FILE


def _read(path: Path) -> str:
    try:
        value = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # RuntimeError: ~ of nobody
        why = (error.strerror or "an error") if isinstance(error, OSError) else "not text" if isinstance(error, UnicodeDecodeError) else "no such home"
        raise UserError(f"the file that {KEY_FILE} names cannot be read ({why}); it wants the path of a mounted file that holds the key, not the key") from None
    if not value.strip():
        raise UserError(f"the file that {KEY_FILE} names is empty; put the key into it")
    return value
