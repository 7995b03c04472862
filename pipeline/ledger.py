"""The ledger: what a study has used so far, by stage, by cell and by model, out of what is committed and journaled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.artifacts import Manifest, Step, Store, done_keys, read_manifest
from pipeline.budget import Bill, Usage, added, money, require_room, usage_of
from pipeline.journal import Journal, journaled_steps
from pipeline.plan import STAGES, Plan, asked_model, paid, planned_use
from pipeline.study import Budget

SHARED = "shared"
"""In the place of a cell: steps that all cells rest on."""

_FACTS = {
    "input_tokens": ("prompt_tokens", "tokens"), "output_tokens": ("completion_tokens",), "requests": ("requests",), "seconds": ("seconds",),
    "gpu_seconds": ("gpu_seconds",),
}  # fmt: skip


def spent(plan: Plan, store: Store, journals: bool = True) -> Bill:
    """What the plan's models behind endpoints have used: in committed steps and, with `journals`, in answers that wait for their step."""
    bill: dict[str, Usage] = {}
    done, waiting = done_keys(store), journaled_steps(store) if journals else set()
    for step in filter(paid, plan.steps):
        if step.key in done and (manifest := read_manifest(store, step)) is not None:
            bill = added(bill, str(asked_model(step)), _usage(manifest))
        elif step.key in waiting:
            bill = added(bill, str(asked_model(step)), usage_of(Journal(store, step).load().values()))
    return bill


def require_budget(plan: Plan, store: Store) -> None:
    """Raises UserError where the steps that are not committed, every answer at its longest, exceed what the study's budget has left."""
    if plan.study.budget != Budget():
        require_room(plan.study, spent(plan, store, journals=False), planned_use(plan, done_keys(store)))


def ledger(plan: Plan, found: Mapping[Step, Manifest]) -> dict[str, Any]:
    """Of the committed steps: tokens in (read, or trained on) and out, requests, seconds of workers, GPU-seconds, money.

    Under `stages` by stage, under `cells` by who is trained, answers or is judged (SHARED: steps of all cells), both with the
    same `total`. A number is None where no step knows it, money also where a model behind an endpoint has no price.
    """
    stages = {stage: [item for item in found.items() if item[0].stage == stage] for stage in STAGES}
    cells: dict[str, list[tuple[Step, Manifest]]] = {}
    for step, manifest in found.items():
        cells.setdefault(_cell(step), []).append((step, manifest))
    prices = plan.study.prices
    return {
        "currency": prices.currency,
        "prices_of": prices.date.isoformat() if prices.date else None,
        "stages": _entries(plan, stages),
        "cells": _entries(plan, cells),
        "total": _entry(plan, found.items()),
    }


def _cell(step: Step) -> str:
    if step.stage in ("train", "generate"):
        return step.name
    return str(step.config["candidate"]) if step.stage == "judge" else SHARED


def _entries(plan: Plan, groups: Mapping[str, list[tuple[Step, Manifest]]]) -> dict[str, dict[str, float | None]]:
    entries = {name: _entry(plan, group) for name, group in groups.items()}
    return {name: entry for name, entry in entries.items() if any(value is not None for value in entry.values())}


def _entry(plan: Plan, group: Iterable[tuple[Step, Manifest]]) -> dict[str, float | None]:
    entry: dict[str, float | None] = dict.fromkeys((*_FACTS, "money"))
    bill: dict[str, Usage] = {}
    for step, manifest in group:
        for name, facts in _FACTS.items():
            for value in (manifest.facts[fact] for fact in facts if manifest.facts.get(fact) is not None):
                entry[name] = (entry[name] or 0) + value
        if paid(step):
            bill = added(bill, str(asked_model(step)), _usage(manifest))
    return entry | {"money": money(plan.study.prices, bill) if bill else None}


def _usage(manifest: Manifest) -> Usage:
    facts = manifest.facts
    return Usage(facts["requests"], facts["prompt_tokens"], facts["completion_tokens"])
