"""The Batch API of endpoints that have one: questions go as a file and are answered within a day, at a lower price.

A kill at any moment does not submit a batch twice, unless the call that makes it is on its way for longer than the pause
between two polls. The id of its file is in the journal before the file becomes a batch, and the batch's own before it is
waited for; a file that may have become one is first looked for among the endpoint's batches. Answers count as any others
do, once they are journaled. What a batch leaves open (it expired, a line is missing, a passing error) goes into the next one.

OpenAI and Groq document the same protocol: lines of custom_id, method, url and body, POST /files with purpose batch, POST
/batches with a window of 24 h, GET /batches/{id}, GET /files/{id}/content of output_file_id and error_file_id.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import aiohttp

from pipeline.errors import EndpointStopped
from pipeline.journal import Batch, Journal
from pipeline.llm import Completion, LanguageModel, Request
from pipeline.llm.endpoint import RETRIED, AgainError, EndpointModel, Form, FormRefusedError, Reply, body_of, loads
from pipeline.runtime import Runtime

ROUNDS = 4
"""Batches that a row goes into before it is quarantined: each may take a day."""
CALLS = 8
"""At once: they are short, and a stage has a batch for each of its steps."""
PATIENCE_S = 48 * 3600.0
"""How long an endpoint may refuse a batch because too much is queued there: until what is there has had its day."""
PAGE = 100

_ENDED = {"completed", "failed", "expired", "cancelled"}
_FULL = re.compile(r"token_limit|enqueued|queue|rate.?limit|capacity|too many", re.IGNORECASE)


class Batches:
    """How one worker asks one model by batches; any number may be under way."""

    def __init__(self, model: EndpointModel, poll_s: float) -> None:
        self._model, self._poll_s = model, poll_s
        self._calls = asyncio.Semaphore(CALLS)
        self.under_way = 0
        """Questions that this worker has put into batches, or is about to, and has no answers to yet."""

    async def ask(
        self, asked: Mapping[str, Request], journal: Journal, keep: Callable[[str, Completion], Awaitable[None]], may_send: Callable[[], Awaitable[None]]
    ) -> dict[str, Completion]:
        """An answer for each key of `asked`, out of batches of runs before this one where they have it.

        keep: told of each answer, returns when it is in the store. may_send: called before a batch is made, with its questions
        in `under_way`; raises EndpointStopped where the stage has to stop.
        """
        answers: dict[str, Completion] = {}
        reasons: dict[str, str] = {}

        async def collect(batch: Batch, attempt: int) -> None:
            found, failed, stopped = await self._outcome(batch, {key: asked[key] for key in batch.keys if key in asked and key not in answers}, journal)
            found = {key: replace(completion, attempts=attempt, first_byte_s=None, total_s=None) for key, completion in found.items()}
            await asyncio.gather(*itertools.starmap(keep, found.items()))
            await asyncio.to_thread(journal.note, replace(batch, ended=True))
            answers.update(found)
            reasons.update(failed)
            if stopped:
                raise stopped

        for batch in await asyncio.to_thread(journal.batches):
            if not batch.ended:
                with contextlib.suppress(AgainError):
                    await collect(batch if batch.id else await self._start(batch, journal, perhaps_started=True), 1)
        attempt, refused_since = 1, time.monotonic()
        while (missing := {key: request for key, request in asked.items() if key not in answers}) and attempt <= ROUNDS:
            self.under_way += len(missing)
            try:
                await may_send()
                await collect(await self._submit(missing, journal), attempt)
                attempt, refused_since = attempt + 1, time.monotonic()
            except AgainError as error:
                if time.monotonic() - refused_since > PATIENCE_S:
                    raise self._model.stop(f"takes no batch: {error}") from None
                await asyncio.sleep(self._poll_s)
            finally:
                self.under_way -= len(missing)
        lost = {
            key: Completion(
                "", "error", (), 0, outcome="error", reason=f"{reasons.get(key, 'no answer')} (batch {ROUNDS}, the last)", attempts=ROUNDS, prompt_count=0
            )
            for key in missing
        }
        await asyncio.gather(*itertools.starmap(keep, lost.items()))
        return answers | lost

    # ---------------------------------------------------------------- into a batch

    async def _submit(self, asked: Mapping[str, Request], journal: Journal) -> Batch:
        form = self._model.form
        lines = [
            {"custom_id": str(place), "method": "POST", "url": "/v1/chat/completions", "body": body_of(self._model.name, request, form)}
            for place, request in enumerate(asked.values())
        ]
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()

        def upload() -> aiohttp.FormData:  # a form can be sent once
            data = aiohttp.FormData()
            data.add_field("purpose", "batch")
            data.add_field("file", content, filename="datadose.jsonl", content_type="application/jsonl")
            return data

        async with self._calls:
            file = self._object(await self._model.insist("POST", "files", upload), "id")
        batch = Batch(str(file["id"]), list(asked), form)
        await asyncio.to_thread(journal.note, batch)
        return await self._start(batch, journal)

    async def _start(self, batch: Batch, journal: Journal, perhaps_started: bool = False) -> Batch:
        """Make a batch of its file, unless it is one already, which cannot be known after a kill or a call without an answer."""
        body = json.dumps({"input_file_id": batch.file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}).encode()
        found = await self._find(batch) if perhaps_started else None
        failed = 0
        while found is None:
            try:
                async with self._calls:
                    reply = await self._model.call("POST", "batches", body)
                if reply.status not in RETRIED:
                    found = str(self._object(reply, "id")["id"])
                    break
                why = self._model.told(reply)
            except AgainError as error:
                why = str(error)
            failed += 1
            if failed >= self._model.attempts:
                raise self._model.stop(f"takes no batch: {why} (attempt {failed}, the last); run again later, what came back stays")
            found = await self._find(batch)
        batch = replace(batch, id=found)
        await asyncio.to_thread(journal.note, batch)
        return batch

    async def _find(self, batch: Batch) -> str | None:
        """The batch of this file among all that the endpoint has, the newest first."""
        await asyncio.sleep(self._poll_s)  # a call may still be on its way there
        after = ""
        while True:
            listed = self._object(await self._get(f"batches?limit={PAGE}{after}"), "data")
            items = [item for item in listed["data"] if isinstance(item, dict) and "id" in item]
            for item in items:
                if item.get("input_file_id") == batch.file:
                    return str(item["id"])
            if not items or not listed.get("has_more"):
                return None
            after = f"&after={quote(str(items[-1]['id']))}"

    # ---------------------------------------------------------------- out of a batch

    async def _outcome(
        self, batch: Batch, asked: Mapping[str, Request], journal: Journal
    ) -> tuple[dict[str, Completion], dict[str, str], EndpointStopped | None]:
        """Once it has ended: answers, reasons why others got none, and why to stop if a line says so.

        Raises AgainError where the whole batch was refused for now, EndpointStopped where for good.
        """
        while True:
            reply = await self._get(f"batches/{quote(str(batch.id))}")
            if reply.status == 404:
                return {}, dict.fromkeys(asked, "the endpoint knows its batch no more"), None
            state = self._object(reply, "status")
            if state["status"] in _ENDED:
                break
            await asyncio.sleep(self._poll_s)
        if state["status"] == "failed":
            await asyncio.to_thread(journal.note, replace(batch, ended=True))  # nothing of it was asked
            return self._refused(batch, asked, state), {}, None
        answers: dict[str, Completion] = {}
        reasons = dict.fromkeys(asked, f"its batch ended ({state['status']}) without an answer to it")
        stopped: EndpointStopped | None = None
        for file in (state.get(name) for name in ("output_file_id", "error_file_id")):
            content = (await self._get(f"files/{quote(str(file))}/content")) if file else None
            for line in content.body.split(b"\n") if content and content.status == 200 else ():
                said = loads(line)
                key = _key(batch, said)
                if key not in asked or key in answers:
                    continue
                try:
                    answers[key] = self._read(said, asked[key], Form(batch.form))
                except AgainError as error:
                    reasons[key] = str(error)
                except FormRefusedError:
                    reasons[key] = "the endpoint does not take this form of a request"
                    self._model.form = max(self._model.form, Form(batch.form + 1))
                except EndpointStopped as error:
                    stopped = error
        return answers, reasons, stopped

    def _refused(self, batch: Batch, asked: Mapping[str, Request], state: Mapping[str, Any]) -> dict[str, Completion]:
        """A batch that failed its validation: lines that are named are bad by themselves, all else is about the whole of it."""
        errors = [error for error in (state.get("errors") or {}).get("data") or [] if isinstance(error, dict)]
        told = "; ".join(f"{error.get('code')} {error.get('message')}" for error in errors[:3])
        if _FULL.search(told):
            raise AgainError(told)
        lines = {error["line"] - 1: f"{error.get('code')} {error.get('message')}" for error in errors if isinstance(error.get("line"), int)}
        if not lines or len(lines) < len(errors):
            raise self._model.stop(f"did not take a batch of {len(batch.keys)} questions ({told or 'it does not say why'}); mend that and run again")
        bad = {key: lines[place] for place, key in enumerate(batch.keys) if place in lines and key in asked}
        return {key: Completion("", "error", (), 0, outcome="error", reason=reason, prompt_count=0) for key, reason in bad.items()}

    def _read(self, said: Mapping[str, Any], request: Request, form: Form) -> Completion:
        response = said.get("response")
        if not isinstance(response, dict):
            error = said.get("error")
            raise AgainError(str(error.get("message") or error.get("code")) if isinstance(error, dict) else "neither response nor error")
        status = response.get("status_code")
        return self._model.read(Reply(status if isinstance(status, int) else 200, {}, json.dumps(response.get("body")).encode(), 0.0, 0.0), request, form)

    # ---------------------------------------------------------------- calls

    async def _get(self, path: str) -> Reply:
        async with self._calls:
            return await self._model.insist("GET", path)

    def _object(self, reply: Reply, field: str) -> dict[str, Any]:
        found = loads(reply.body)
        if reply.status in (200, 201) and isinstance(found, dict) and field in found:
            return found
        hint = "; where it has no Batch API, unset DATADOSE_ENDPOINT_BATCH" if reply.status in (404, 405, 501) else ""
        raise self._model.stop(f"wanted an object of its Batch API with {field!r}, got {self._model.told(reply)}{hint}")


def batches_for(model: LanguageModel, runtime: Runtime) -> Batches | None:
    """None where questions go one by one."""
    return Batches(model, runtime.endpoint_poll_s) if runtime.endpoint_batch and isinstance(model, EndpointModel) else None


def _key(batch: Batch, said: Any) -> str:
    place = str(said.get("custom_id")) if isinstance(said, dict) else ""
    return batch.keys[int(place)] if place.isdecimal() and int(place) < len(batch.keys) else ""
