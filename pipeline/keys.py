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
    if model.provider == "groq":
        name, value = GROQ_KEY, os.environ.get(GROQ_KEY, "")
        if not value.strip():
            raise UserError(f"{GROQ_KEY} is not set, and {model} wants a key; put it into the environment of this process and of its workers")
    elif runtime.endpoint_key_file is not None:
        name, value = str(runtime.endpoint_key_file), _read(runtime.endpoint_key_file)
    else:
        name, value = runtime.endpoint_key_name, os.environ.get(runtime.endpoint_key_name, "")
    value = value.strip()  # files end in a newline
    if not value:
        return None
    if not re.fullmatch(r"[!-~]+", value):
        raise UserError(f"the key in {name} is none: wanted printable ASCII characters without a space; look at how it got there")
    return Secret(value)


def _read(path: Path) -> str:
    try:
        value = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(f"the key file {path} cannot be read ({why}); mount it, or set DATADOSE_ENDPOINT_KEY_FILE to where it is") from None
    if not value.strip():
        raise UserError(f"the key file {path} is empty; put the key into it")
    return value
