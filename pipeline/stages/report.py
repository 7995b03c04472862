"""What the study found: tables, results.json and one HTML page, out of committed steps alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from pipeline.analysis import estimates, gates
from pipeline.analysis.overlap import NGRAM, ngram_shares, overlap
from pipeline.artifacts import Manifest, Step, Store, commit, provenance, read_manifest, read_table
from pipeline.ledger import ledger
from pipeline.plan import BASE, BROKEN, ZERO, Plan, cost, detectable, steps_of
from pipeline.schemas import STATUSES
from pipeline.stages import Context, Failed, Steps, report_pairs, report_verdicts
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
    scored = [row for name, rows in answers.items() for row in _scored(plan, name, rows)]
    judged = report_verdicts.read(plan, store, [step for step in plan.stage("judge") if step in found])

    overall, tiers = report_verdicts.by_candidate(plan, judged), report_verdicts.by_tier(plan, judged)
    lengths = {name: {row["row_id"]: len(row["raw"]) for row in rows} for name, rows in answers.items()}
    controlled = report_verdicts.length_controlled(plan, judged, lengths, BASE) if BASE in answers else {}
    checks = _gates(plan, answers, heldout, overall)
    copied = _copied(store, plan, found, answers)
    cells = []
    for name in (BASE, ZERO, *(cell.name for cell in plan.cells)):
        if name in answers:
            cell = _cell(plan, name, [row for row in scored if row["cell"] == name], heldout, logs)
            rated = overall.get(name, {})
            cell["win_rates"] = {
                item["key"]: rated[item["key"]] | {"length_controlled": controlled.get(name, {}).get(item["key"])}
                for item in report_verdicts.keys(plan)
                if item["key"] in rated
            }
            for tier, part in cell["tiers"].items():
                part["win_rates"] = tiers.get(tier, {}).get(name, {})
            cells.append(cell | {"copied": copied.get(name)})
    trusted = {item["key"]: all(gate.passed for gate in checks if gate.about == item["key"]) for item in report_verdicts.keys(plan)}
    results = {
        "study": plan.study.name,
        "simulated": list(plan.study.simulated),
        "gates": [gate._asdict() for gate in checks],
        "measure": plan.task.measure,
        "judge_trusted": any(trusted.values()) if trusted else None,
        "judges": [item | {"trusted": trusted[item["key"]]} for item in report_verdicts.habits(plan, judged)],
        "agreement": report_verdicts.alphas(judged),
        "cells": cells,
        "missing_cells": [cell.name for cell in plan.cells if cell.name not in answers],
        "breakdown": report_verdicts.breakdown(plan, judged),
        "doubling": _doubling(plan, cells),
        "same_rows_seen": [
            {"steps": steps, "sizes": sizes}
            for steps, sizes in estimates.confounded((cell.rows, cell.steps, plan.study.training.global_batch) for cell in plan.cells)
        ],
        "overlap": _prompt_overlap(store, plan, found),
        "detectable": detectable(plan),
        "rows": _row_counts(plan, store, found),
        "subsets": {step.name: {"drawn": found[step].facts["drawn"], "rows": found[step].facts["rows"]} for step in plan.stage("subset") if step in found},
        "ledger": ledger(plan, found),
        "cost_planned": cost(plan),
        "resolved_study": plan.study.model_dump(mode="json"),
        "provenance": dict(provenance()),
    }
    curves = [
        {"cell": name, **{key: row[key] for key in ("step", "loss", "learning_rate", "grad_norm", "tokens")}} for name, rows in logs.items() for row in rows
    ]
    tables: Report = {
        "results.json": json.dumps(results, indent=1).encode(),
        "answers.parquet": pa.Table.from_pylist(scored),
        "train_log.parquet": pa.Table.from_pylist(curves),
    }
    if judged is not None:
        tables["verdicts.parquet"] = judged.verdicts
    pairs, beside = report_pairs.pairs(plan, answers, judged)
    return {"report.html": page(plan, results, curves, pairs).encode(), **beside, **tables}


def _rows(store: Store, step: Step, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(store, step, f"{name}.parquet").to_pylist(maps_as_pydicts="strict")
    return rows


def _scored(plan: Plan, name: str, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Answers with their exact scores; an answer that is not there fails every check."""
    for row in rows:
        scores = plan.task.scores(row["fields"], row["answer"] or "") if row["answer"] else dict.fromkeys(plan.task.scores(row["fields"], "x"), 0.0)
        kept = {key: row[key] for key in ("row_id", "raw", "status", "finish_reason", "prompt_tokens", "completion_tokens")}
        yield {"cell": name, **kept, **{column: row["fields"][column] for column in plan.task.columns}, **scores}


def _gates(plan: Plan, answers: Mapping[str, Any], heldout: Mapping[str, Any], judged: Mapping[str, Mapping[str, Any]]) -> list[gates.Gate]:
    found = []
    for item in report_verdicts.keys(plan):
        key, judge = item["key"], f"{item['judge']}, protocol {item['protocol']}"
        if key in judged.get(ZERO, {}) and key in judged.get(BROKEN, {}):
            found += [gates.even_gate(key, judge, judged[ZERO][key]), gates.broken_gate(key, judge, judged[BROKEN][key])]
    if BASE in answers and ZERO in answers:
        probes = {name: rows[0]["prompt_logprobs"] or [] for name, rows in answers.items()}
        base, zero = probes.pop(BASE), probes.pop(ZERO)
        found.append(gates.adapter_gate(base, zero, probes, plan.study.precision))
    if BASE in answers and ZERO in heldout:
        training = {row_id: row["prompt_ids"] for row_id, row in heldout[ZERO].items()}
        found.append(gates.template_gate(training, {row["row_id"]: row["prompt_ids"] for row in answers[BASE]}))
    return found


def _cell(plan: Plan, name: str, mine: list[dict[str, Any]], heldout: Mapping[str, Any], logs: Mapping[str, Any]) -> dict[str, Any]:
    cell = plan.cell_of(plan.by_name["generate", name])
    tiers = {row.row_id: row.tier for row in plan.evaluation_rows}
    # An adapter of no training is the base, so its held-out loss is the base's.
    own, base = heldout.get(ZERO if name == BASE else name, {}), heldout.get(ZERO, {})
    return {
        "name": name,
        "rows": cell.rows if cell else 0,
        "steps": cell.steps if cell else 0,
        "epochs": cell.epochs if cell else 0.0,
        "draw": cell.draw if cell else None,
        "seed": cell.seed if cell else None,
        "series": series(plan, cell.rows, cell.steps) if cell else name,
        **_measures(plan, mine, own, base),
        "tiers": {tier: _measures(plan, [row for row in mine if tiers[row["row_id"]] == tier], own, base) for tier in sorted(set(tiers.values()))},
        "answer_tokens": sum(row["completion_tokens"] for row in mine) / len(mine),
        "answer_status": {status: sum(row["status"] == status for row in mine) for status in STATUSES if any(row["status"] == status for row in mine)},
        "train_loss_last": logs[name][-1]["loss"] if logs.get(name) else None,
    }


def _measures(plan: Plan, mine: list[dict[str, Any]], own: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """What needs no judge, of one cell's answers: exact checks, and the held-out loss where the teacher's answer was usable."""
    checks = list(plan.task.scores(mine[0], "x"))
    clusters = {row["row_id"]: row[plan.task.cluster] for row in mine}
    shared = sorted(own.keys() & base.keys() & clusters.keys())
    loss = change = None
    if shared:
        loss = sum(own[row]["nll"] for row in shared) / sum(own[row]["tokens"] for row in shared)
        change = estimates.cluster_mean([(own[row]["nll"] - base[row]["nll"]) / own[row]["tokens"] for row in shared], [clusters[row] for row in shared])
    drawn = [plan.task.measure] if plan.task.measure else checks
    total = estimates.cluster_mean([sum(row[check] for check in drawn) / len(drawn) for row in mine], list(clusters.values()))
    return {
        "prompts": len(mine),
        "heldout_loss": loss,
        "heldout_rows": len(shared),
        "heldout_change": change._asdict() if change else None,
        "scores": {check: sum(row[check] for row in mine) / len(mine) for check in checks},
        "score": total._asdict(),
    }


def _prompt_overlap(store: Store, plan: Plan, found: Mapping[Step, Manifest]) -> dict[str, Any] | None:
    """Evaluation prompts in the training rows: word for word among their prompts, and by n-grams in prompts and answers."""
    rows = _training_rows(store, plan, found)
    if not rows:
        return None
    prompts = [plan.task.plain(row.fields)[-1]["content"] for row in plan.evaluation_rows]
    trained = [json.loads(row["conversation"])[-1]["content"] for row in rows]
    exact, repeated = overlap(prompts, trained).exact, overlap(prompts, [f"{prompt} {row['answer']}" for prompt, row in zip(trained, rows, strict=True)])
    return {"prompts": len(prompts), "training_rows": len(rows), "exact": exact, "ngram": NGRAM, "mean": repeated.mean, "contaminated": repeated.contaminated}


def _copied(store: Store, plan: Plan, found: Mapping[Step, Manifest], answers: Mapping[str, list[dict[str, Any]]]) -> dict[str, float | None]:
    """Of each cell's answers, the mean share of n-grams that stand in the largest subset's answers."""
    trained = [row["answer"] for row in _training_rows(store, plan, found)]
    names, texts = list(answers), [[row["raw"] for row in rows] for rows in answers.values()]
    # One look for all cells; a phrase that many answers share is then not taken for a template, as each text counts once.
    shares = ngram_shares([text for part in texts for text in part], trained) if trained else []
    made: dict[str, float | None] = {}
    for name, part in zip(names, texts, strict=True):
        mine, shares = [share for share in shares[: len(part)] if share is not None], shares[len(part) :]
        made[name] = sum(mine) / len(mine) if mine else None
    return made


def _training_rows(store: Store, plan: Plan, found: Mapping[Step, Manifest]) -> list[dict[str, Any]]:
    """Of the largest subset that is built."""
    built = [step for step in plan.stage("subset") if step in found]
    return _rows(store, max(built, key=lambda step: int(step.config["size"])), "subset") if built else []


def series(plan: Plan, rows: int, steps: int) -> str:
    """What cells of different sizes have in common: a step count, or a number of epochs."""
    if steps in plan.study.grid.steps:
        return f"{steps} steps"
    epochs = next(epochs for epochs in plan.study.grid.epochs if steps_of(epochs, rows, plan.study.training.global_batch) == steps)
    return f"{epochs:g} epoch" + ("s" if epochs != 1 else "")


def _doubling(plan: Plan, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What another doubling of the distinct rows changes, of cells that train equally long: in loss, and in the task's measure."""
    found = []
    for name in dict.fromkeys(cell["series"] for cell in cells if cell["rows"]):
        mine = [cell for cell in cells if cell["series"] == name]
        lost = [cell for cell in mine if cell["heldout_loss"] is not None]
        measured = {"held-out loss": (lost, [cell["heldout_loss"] for cell in lost], -1)}
        if plan.task.measure:
            measured[plan.task.measure] = (mine, [cell["score"]["mean"] for cell in mine], 1)
        for measure, (points, values, better) in measured.items():
            slope = estimates.per_doubling([cell["rows"] for cell in points], values)
            if slope is not None:
                sure = slope.low > 0 or slope.high < 0
                found.append({"series": name, "measure": measure, **slope._asdict(), "helps": slope.slope * better > 0 if sure else None})
    return found


REASONS = 20


def _row_counts(plan: Plan, store: Store, found: Mapping[Step, Manifest]) -> dict[str, dict[str, Any]]:
    """rows in = ok + quarantined, by split, by status, with the first reasons."""
    counts: dict[str, dict[str, Any]] = {}
    for step in plan.stage("synthesize"):
        if step in found:
            split = counts.setdefault(step.name.partition("-")[0], {"asked": 0, "ok": 0, "quarantined": 0, "by_status": {}, "reasons": []})
            for row in _rows(store, step, "examples"):
                split["asked"] += 1
                split["ok" if row["status"] == "ok" else "quarantined"] += 1
                if row["status"] != "ok":
                    split["by_status"][row["status"]] = split["by_status"].get(row["status"], 0) + 1
                if row["reason"] and len(split["reasons"]) < REASONS:
                    split["reasons"].append(row["reason"])
    return counts
