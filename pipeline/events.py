"""What happened, as it happens: listeners draw it, and one JSON-lines log per run keeps it in the store."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from pipeline.artifacts import Store

Listener = Callable[[dict[str, Any]], None]
FLUSH_EVERY_S = 5.0


class Events:
    """Collects events and passes them on.

    The log is first written when something is built, so that a finished study stays untouched by a rerun.
    """

    def __init__(self, store: Store | None, key: str, listeners: tuple[Listener, ...] = ()) -> None:
        self._store, self._key, self._listeners = store, key, listeners
        self._lines: list[str] = []
        self._flushed_at, self._worth_keeping = 0.0, False

    def emit(self, kind: str, **fields: Any) -> None:
        event = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind, **fields}
        if kind != "progress":
            self._lines.append(json.dumps(event))
            self._worth_keeping |= kind in ("stage_start", "step_failed")
            if time.monotonic() - self._flushed_at > FLUSH_EVERY_S:
                self.flush()
        for listener in self._listeners:
            listener(event)

    def flush(self) -> None:
        if self._store is not None and self._worth_keeping:
            self._store.replace(self._key, ("\n".join(self._lines) + "\n").encode())
            self._flushed_at = time.monotonic()
