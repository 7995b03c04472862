"""The whole study: the stages in order, then the results as a table. Run as `python -m jobs.grid STUDY`.

With DATADOSE_NAMESPACE each stage is a job of its own in that namespace, and this process is their launcher.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from jobs.session import build, console, exit_codes, plan_of, runtime_from
from pipeline.artifacts import Store, open_store, read_manifest
from pipeline.errors import UserError
from pipeline.ledger import require_budget
from pipeline.network import enforce
from pipeline.plan import Plan
from pipeline.preflight import preflight
from pipeline.runtime import Runtime


def run(plan: Plan, runtime: Runtime, only: str | None = None) -> None:
    started = time.monotonic()
    built = _as_jobs(plan, runtime) if runtime.namespace else _here(plan, runtime, only)
    if only is None:
        show_report(plan, open_store(runtime.store), runtime)
    what = f"{built} steps built" if built else "nothing to build: the study is finished" if only is None else f"nothing to build: {only} is finished"
    console.print(f"{what}, {time.monotonic() - started:.0f} s")


def _here(plan: Plan, runtime: Runtime, only: str | None) -> int:
    preflight(plan, runtime)
    return build(plan, runtime, only=only)


def _as_jobs(plan: Plan, runtime: Runtime) -> int:
    """In a pod of the namespace that Runtime names. The pods of the stages check their own machine."""
    from jobs.cluster import connect, drive

    assert runtime.namespace is not None
    enforce(runtime)
    store = open_store(runtime.store)
    require_budget(plan, store)
    return drive(connect(None, runtime.namespace), plan, store, lambda text: print(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {text}", flush=True))


def show_report(plan: Plan, store: Store, runtime: Runtime) -> None:
    """The committed report as a table, and where the page is. Raises UserError where there is none yet."""
    (step,) = plan.stage("report")
    manifest = read_manifest(store, step)
    if manifest is None:
        raise UserError(f"no report of {plan.study.name} in {store.uri} yet; run `datadose run {plan.study.name}` first")
    paths = {name: store.path(artifact.key, runtime.cache_dir) for name, artifact in manifest.objects.items()}
    print_results(json.loads(paths["results.json"].read_bytes()))
    console.print(f"report: {_short(paths['report.html'])}", soft_wrap=True)


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def print_results(results: dict[str, object]) -> None:
    for gate in results["gates"]:  # type: ignore[attr-defined]  # JSON
        color, word = ("green", "passed") if gate["passed"] else ("bold red", "FAILED")
        console.print(f"[{color}]{word}[/{color}] {gate['name']}: {gate['detail']}")
    if results["simulated"]:
        console.print(f"[bold red]Simulated: {', '.join(results['simulated'])} played by a scripted model[/bold red]")  # type: ignore[arg-type]
    if results["judge_trusted"] is False:
        console.print("[bold red]The judge cannot be trusted; read the held-out loss and the checks, which need no judge.[/bold red]")
    keys = [judge["key"] for judge in results["judges"]]  # type: ignore[attr-defined]
    table = Table(title=f"study {results['study']}", box=None, padding=(0, 1, 0, 0))  # fits 80 columns with one judge
    measure = str(results["measure"] or "checks")
    for column in ("cell", "rows", "steps", "epochs", "loss", "vs base", measure, *(f"win rate W/L/T/? {key}" for key in keys)):
        table.add_column(column, justify="left" if column == "cell" else "right", no_wrap=not column.startswith("win"))
    for cell in results["cells"]:  # type: ignore[attr-defined]
        table.add_row(
            cell["name"], str(cell["rows"] or "–"), str(cell["steps"] or "–"), f"{cell['epochs']:.3g}" if cell["rows"] else "–",
            "–" if cell["heldout_loss"] is None else f"{cell['heldout_loss']:.3f}",
            f"{cell['heldout_change']['mean']:+.3f}" if cell["rows"] and cell["heldout_change"] else "–",
            f"{cell['score']['mean']:.2f}",
            *(_rate(cell["win_rates"].get(key)) for key in keys),
        )  # fmt: skip
    console.print(table)
    console.print("loss: held-out nats per token; checks: share of exact checks passed; W/L/T/?: won, lost, tied, unparsed")


def _rate(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    rate = f"{found['rate']['mean']:.2f}" if found["rate"] else "–"
    return f"{rate} {found['wins']}/{found['losses']}/{found['ties']}/{found['unparsed']}"


if __name__ == "__main__":
    with exit_codes():
        if len(sys.argv) != 2:
            raise UserError(f"usage: python -m jobs.grid STUDY (a name in jobs/studies or a .toml file), got {sys.argv[1:]}")
        run(plan_of(sys.argv[1]), runtime_from(os.environ))
