"""The journal of a step: every answer of an endpoint is in the store before it counts, so none is paid for twice.

Objects `journal/<step>/<attempt>/<number>.jsonl`, a line per answer, each written whole under a name of its own: attempts
that run at the same time never meet. Answers that wait are written together, one write at a time. The journal goes when
its step is committed: the table then holds all of it. Models in process need none; what is lost with them is time, a
shard at most, and the same seed gives the same answer again. What a batch at the endpoint needs to be found again is
`journal/<step>/<digest of its file's id>/batch.json`.

A folder store syncs an object's bytes before it gets its name: a kill of the process loses nothing, a power failure at
most what the file system had not yet named.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.artifacts import NotFoundError, Step, Store, digest
from pipeline.errors import UserError
from pipeline.llm import Completion, Request

FOLDER = "journal/"
BATCH = "batch.json"


def keys_of(requests: Iterable[Request]) -> list[str]:
    """A key for each request: the digest of what it asks, and a number where the same is asked more than once."""
    seen: Counter[str] = Counter()
    keys = []
    for request in requests:
        asked = digest([request.conversation, request.sampling, request.seed, request.choices])
        seen[asked] += 1
        keys.append(asked if seen[asked] == 1 else f"{asked}-{seen[asked]}")
    return keys


def journaled_steps(store: Store) -> set[str]:
    """Keys of the steps that have a journal, by one listing."""
    return {name.removeprefix(FOLDER).rsplit("/", 2)[0] for name in store.list(FOLDER)}


@dataclass(frozen=True)
class Batch:
    """Questions that went to an endpoint as one file."""

    file: str
    """Its id at the endpoint."""
    keys: list[str]
    """Of the questions; the place of one is its custom id."""
    form: int
    """How they were written (llm.endpoint.Form)."""
    id: str | None = None
    """None: whether the file became a batch is not known."""
    ended: bool = False
    """Its answers are in the journal, or there is no such batch."""


class Journal:
    """One attempt's hold on a step's journal. To be used from one event loop; the store is written in a thread."""

    def __init__(self, store: Store, step: Step) -> None:
        self._store, self._folder = store, f"{FOLDER}{step.key}/"
        self._attempt, self._number = secrets.token_hex(4), 0
        self._waiting: list[tuple[bytes, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None

    def batches(self) -> list[Batch]:
        """Those of all attempts."""
        found = []
        for name in sorted(self._store.list(self._folder)):
            if name.endswith(BATCH):
                with contextlib.suppress(NotFoundError):  # another attempt has committed the step and cleared its journal
                    found.append(Batch(**json.loads(self._store.read(name))))
        return found

    def note(self, batch: Batch) -> None:
        """Returns when what is known of the batch is in the store."""
        self._store.replace(f"{self._folder}{digest(batch.file)[:16]}/{BATCH}", json.dumps(vars(batch)).encode())

    def load(self) -> dict[str, Completion]:
        """Answers of all attempts by the key of their request. Of two the first counts, and an answer before a failure.

        A line without its end was torn by a kill and is left out. Raises UserError for a line that cannot be read.
        """
        found: dict[str, Completion] = {}
        for name in sorted(self._store.list(self._folder)):
            if name.endswith(BATCH):
                continue
            try:
                *lines, _torn = self._store.read(name).split(b"\n")
            except NotFoundError:  # another attempt has committed the step and cleared its journal
                continue
            for number, line in enumerate(lines):
                try:
                    key, completion = _parsed(line)
                except (ValueError, TypeError, KeyError) as error:
                    raise UserError(
                        f"line {number + 1} of {name} in {self._store.uri} is no journaled answer ({error}); "
                        "delete that object, and its answers are asked again, or run the version that wrote it"
                    ) from error
                if key not in found or (failed(found[key]) and not failed(completion)):
                    found[key] = completion
        return found

    async def put(self, key: str, completion: Completion) -> None:
        """Returns when the answer is in the store. Raises what the store raises, for every answer of that write."""
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((_line(key, completion), durable))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.ensure_future(self._write())
        await durable

    async def close(self) -> None:
        """Returns when everything that was put has been written, or has failed."""
        if self._writer is not None:
            await self._writer

    def discard(self) -> None:
        """Delete the journal of all attempts, as far as that goes: of a committed step nobody reads it, so what stays does no harm."""
        with contextlib.suppress(Exception):
            for name in list(self._store.list(self._folder)):
                self._store.delete(name)

    async def _write(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            name = f"{self._folder}{self._attempt}/{self._number:08d}.jsonl"
            self._number += 1
            try:
                await asyncio.to_thread(self._store.replace, name, b"".join(line for line, _ in batch))
            except Exception as error:  # noqa: BLE001  # whatever a store raises is told to those whose answers it was to keep
                for _, durable in batch:
                    if not durable.done():
                        durable.set_exception(error)
            else:
                for _, durable in batch:
                    if not durable.done():  # a put can be cancelled while its answer is being written
                        durable.set_result(None)


def failed(completion: Completion) -> bool:
    """Whether this stands for an answer that never came."""
    return completion.status == "error"


def _line(key: str, completion: Completion) -> bytes:
    return json.dumps({"key": key, **vars(completion)}).encode() + b"\n"


def _parsed(line: bytes) -> tuple[str, Completion]:
    fields: dict[str, Any] = dict(json.loads(line))
    key = fields.pop("key")
    lists: dict[str, Any] = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return str(key), Completion(**fields | lists)
