"""What the study found: tables, results.json and one HTML page, out of committed steps alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from pipeline import judging
from pipeline.analysis import estimates, gates
from pipeline.artifacts import Manifest, Step, Store, commit, provenance, read_manifest, read_table
from pipeline.plan import BASE, BROKEN, STAGES, ZERO, Plan, cost, steps_of
from pipeline.schemas import STATUSES
from pipeline.stages import Context, Failed, Steps
from pipeline.stages.report_page import page

Report = dict[str, bytes | pa.Table]


def build(context: Context, steps: Steps) -> Failed:
    (step,) = steps
    report = make_report(context.plan, context.store)
    manifest = commit(context.store, step, report, {"objects": len(report)})
    context.committed(step, objects=len(manifest.objects))
    return {}


def make_report(plan: Plan, store: Store) -> Report:
    """report.html, results.json and the tables. Cells that are not built are left out and counted as missing."""
    found = {step: manifest for step in plan.steps if (manifest := read_manifest(store, step)) is not None}
    answers = {step.name: _rows(store, step, "generations") for step in plan.stage("generate") if step in found}
    trained = [step for step in plan.stage("train") if step in found]
    heldout = {step.name: {row["row_id"]: row for row in _rows(store, step, "heldout")} for step in trained}
    logs = {step.name: _rows(store, step, "train_log") for step in trained}
    verdicts = {step.name: (step, _rows(store, step, "verdicts")) for step in plan.stage("judge") if step in found}
    scored = [row for name, rows in answers.items() for row in _scored(plan, name, rows)]

    wins = {name: _win_rate(plan, rows) for name, (_, rows) in verdicts.items()}
    checks = _gates(plan, answers, heldout, wins)
    cells = [_cell(plan, name, scored, heldout, wins, logs) for name in (BASE, ZERO, *(cell.name for cell in plan.cells)) if name in answers]
    results = {
        "study": plan.study.name,
        "simulated": list(plan.study.simulated),
        "gates": [gate._asdict() for gate in checks],
        "judge_trusted": all(gate.passed for gate in checks if gate.about == "judge"),
        "judges": [_judge_habits(judge, [rows for step, rows in verdicts.values() if step.config["judge"] == judge]) for judge in plan.study.judging.judges],
        "cells": cells,
        "missing_cells": [cell.name for cell in plan.cells if cell.name not in answers],
        "doubling": _doubling(plan, cells),
        "same_rows_seen": [
            {"steps": steps, "sizes": sizes}
            for steps, sizes in estimates.confounded((cell.rows, cell.steps, plan.study.training.global_batch) for cell in plan.cells)
        ],
        "rows": _row_counts(plan, store, found),
        "subsets": {step.name: found[step].facts["drawn"] for step in plan.stage("subset") if step in found},
        "ledger": _ledger(found),
        "cost_planned": cost(plan),
        "resolved_study": plan.study.model_dump(mode="json"),
        "provenance": dict(provenance()),
    }
    curves = [
        {"cell": name, **{key: row[key] for key in ("step", "loss", "learning_rate", "grad_norm", "tokens")}} for name, rows in logs.items() for row in rows
    ]
    every_verdict = [{"candidate": step.config["candidate"], **_flat(plan, row)} for step, rows in verdicts.values() for row in rows]
    return {
        "report.html": page(plan, results, curves, answers).encode(),
        "results.json": json.dumps(results, indent=1).encode(),
        "answers.parquet": pa.Table.from_pylist(scored),
        "verdicts.parquet": pa.Table.from_pylist(every_verdict),
        "train_log.parquet": pa.Table.from_pylist(curves),
    }


def _rows(store: Store, step: Step, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(store, step, f"{name}.parquet").to_pylist(maps_as_pydicts="strict")
    return rows


def _flat(plan: Plan, row: Mapping[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in row.items() if key != "fields"}, **{column: row["fields"][column] for column in plan.task.columns}}


def _scored(plan: Plan, name: str, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Answers with their exact scores; an answer that is not there fails every check."""
    for row in rows:
        scores = plan.task.scores(row["fields"], row["answer"] or "") if row["answer"] else dict.fromkeys(plan.task.scores(row["fields"], "x"), 0.0)
        kept = {key: row[key] for key in ("row_id", "raw", "status", "finish_reason", "prompt_tokens", "completion_tokens")}
        yield {"cell": name, **kept, **{column: row["fields"][column] for column in plan.task.columns}, **scores}


def _win_rate(plan: Plan, rows: list[dict[str, Any]]) -> estimates.WinRate:
    pairs: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        pairs.setdefault(row["row_id"], []).append(row)
    outcomes = {row_id: judging.outcome(picks) for row_id, picks in pairs.items()}
    return estimates.win_rate(outcomes, {row_id: picks[0]["fields"][plan.task.cluster] for row_id, picks in pairs.items()})


def _judge_habits(judge: str, tables: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """How often the judge takes the first post, and how often it changes its mind when the posts change places."""
    rows = [row for table in tables for row in table if row["pick"] is not None]
    first = sum((row["pick"] == "baseline") == (row["order"] == 0) for row in rows)
    pairs: dict[tuple[int, str], set[str]] = {}
    for index, table in enumerate(tables):
        for row in table:
            pairs.setdefault((index, row["row_id"]), set()).add(row["pick"])
    flips = sum(len(picks) > 1 for picks in pairs.values())
    return {
        "judge": judge,
        "verdicts": sum(len(table) for table in tables),
        "unparsed": sum(len(table) for table in tables) - len(rows),
        "first_position_share": first / len(rows) if rows else None,
        "flip_rate": flips / len(pairs) if pairs else None,
    }


def _gates(plan: Plan, answers: Mapping[str, Any], heldout: Mapping[str, Any], wins: Mapping[str, estimates.WinRate]) -> list[gates.Gate]:
    found = []
    for index, judge in enumerate(plan.study.judging.judges):
        for protocol in plan.study.judging.protocols:
            names = f"{ZERO}-{protocol}-{index}", f"{BROKEN}-{protocol}-{index}"
            if all(name in wins for name in names):
                found += [gates.even_gate(judge, wins[names[0]]), gates.broken_gate(judge, wins[names[1]])]
    if BASE in answers and ZERO in answers:
        probes = {name: rows[0]["prompt_logprobs"] or [] for name, rows in answers.items()}
        base, zero = probes.pop(BASE), probes.pop(ZERO)
        found.append(gates.adapter_gate(base, zero, probes, plan.study.precision))
    if BASE in answers and ZERO in heldout:
        training = {row_id: row["prompt_ids"] for row_id, row in heldout[ZERO].items()}
        found.append(gates.template_gate(training, {row["row_id"]: row["prompt_ids"] for row in answers[BASE]}))
    return found


def _cell(
    plan: Plan, name: str, scored: list[dict[str, Any]], heldout: Mapping[str, Any], wins: Mapping[str, estimates.WinRate], logs: Mapping[str, Any]
) -> dict[str, Any]:
    cell = plan.cell_of(plan.by_name["generate", name])
    mine = [row for row in scored if row["cell"] == name]
    checks = list(plan.task.scores(mine[0], "x"))
    cluster = plan.task.cluster
    scores = {check: sum(row[check] for row in mine) / len(mine) for check in checks}
    total = estimates.cluster_mean([sum(row[check] for check in checks) / len(checks) for row in mine], [row[cluster] for row in mine])
    # An adapter of no training is the base, so its held-out loss is the base's.
    own, base = heldout.get(ZERO if name == BASE else name, {}), heldout.get(ZERO, {})
    shared = sorted(own.keys() & base.keys())
    clusters = {row["row_id"]: row[cluster] for row in mine}
    loss = change = None
    if shared:
        loss = sum(own[row]["nll"] for row in shared) / sum(own[row]["tokens"] for row in shared)
        change = estimates.cluster_mean([(own[row]["nll"] - base[row]["nll"]) / own[row]["tokens"] for row in shared], [clusters[row] for row in shared])
    return {
        "name": name,
        "rows": cell.rows if cell else 0,
        "steps": cell.steps if cell else 0,
        "epochs": cell.epochs if cell else 0.0,
        "series": series(plan, cell.rows, cell.steps) if cell else name,
        "heldout_loss": loss,
        "heldout_rows": len(shared),
        "heldout_change": change._asdict() if change else None,
        "scores": scores,
        "score": total._asdict(),
        "answer_tokens": sum(row["completion_tokens"] for row in mine) / len(mine),
        "answer_status": {status: sum(row["status"] == status for row in mine) for status in STATUSES if any(row["status"] == status for row in mine)},
        "train_loss_last": logs[name][-1]["loss"] if logs.get(name) else None,
        "win_rates": {
            f"{protocol}-{index}": {**wins[key]._asdict(), "rate": rate._asdict() if (rate := wins[key].rate) else None}
            for index in range(len(plan.study.judging.judges))
            for protocol in plan.study.judging.protocols
            if (key := f"{name}-{protocol}-{index}") in wins
        },
    }


def series(plan: Plan, rows: int, steps: int) -> str:
    """What cells of different sizes have in common: a step count, or a number of epochs."""
    if steps in plan.study.grid.steps:
        return f"{steps} steps"
    epochs = next(epochs for epochs in plan.study.grid.epochs if steps_of(epochs, rows, plan.study.training.global_batch) == steps)
    return f"{epochs:g} epoch" + ("s" if epochs != 1 else "")


def _doubling(plan: Plan, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for name in dict.fromkeys(cell["series"] for cell in cells if cell["rows"]):
        mine = [cell for cell in cells if cell["series"] == name and cell["heldout_loss"] is not None]
        slope = estimates.per_doubling([cell["rows"] for cell in mine], [cell["heldout_loss"] for cell in mine])
        if slope is not None:
            found.append({"series": name, **slope._asdict()})
    return found


def _row_counts(plan: Plan, store: Store, found: Mapping[Step, Manifest]) -> dict[str, dict[str, int]]:
    """rows in = ok + quarantined, by split, with the reasons."""
    counts: dict[str, dict[str, int]] = {}
    for step in plan.stage("synthesize"):
        if step in found:
            split = counts.setdefault(step.name.partition("-")[0], {"asked": 0, "ok": 0, "quarantined": 0})
            for row in _rows(store, step, "examples"):
                split["asked"] += 1
                split["ok" if row["status"] == "ok" else "quarantined"] += 1
                if row["status"] != "ok":
                    split[row["status"]] = split.get(row["status"], 0) + 1
    return counts


def _ledger(found: Mapping[Step, Manifest]) -> dict[str, dict[str, float]]:
    ledger: dict[str, dict[str, float]] = {stage: {} for stage in STAGES}
    for step, manifest in found.items():
        for fact in ("requests", "prompt_tokens", "completion_tokens", "tokens", "seconds"):
            if fact in manifest.facts:
                ledger[step.stage][fact] = ledger[step.stage].get(fact, 0) + manifest.facts[fact]
    return {stage: facts for stage, facts in ledger.items() if facts}
