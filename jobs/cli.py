"""`datadose`: plan, run, status, report, companies, doctor; on a cluster setup, submit, logs, cancel."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.session import FAILED, PARTLY_BUILT, console, exit_codes, plan_of, runtime_from, store_trouble
from pipeline.artifacts import done_keys, open_store
from pipeline.plan import Plan, describe
from pipeline.study import known_studies, load_study

app = typer.Typer(
    help="How much data does a fine-tune need? STUDY is the name of a file in jobs/studies or a path that ends in .toml.",
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
)  # fmt: skip

StudyName = Annotated[str, typer.Argument(metavar="STUDY", help=f"{', '.join(known_studies())}, or a .toml file")]
Rehearse = Annotated[bool, typer.Option("--rehearse", help="the same study with scripted models: shows that it runs, measures nothing")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Context = Annotated[str | None, typer.Option("--context", metavar="CONTEXT", help="a cluster, by its context in the kubeconfig")]
OnCluster = Annotated[str, typer.Option("--context", metavar="CONTEXT", help="the cluster, by its context in the kubeconfig")]


@app.command()
def plan(
    study: StudyName,
    as_json: AsJson = False,
    rehearse: Rehearse = False,
    gpus: Annotated[int | None, typer.Option(metavar="N", min=1, help="show which of N GPUs trains which cells, and when")] = None,
    speed: Annotated[Path | None, typer.Option(metavar="FILE", help="speed of a GPU as `make bench-gpu` measured it")] = None,
) -> None:
    """What would run, what it costs, what is done and what is missing; with --gpus, the training's schedule."""
    made, runtime = plan_of(study, rehearse), runtime_from(os.environ)
    described = describe(made, done_keys(open_store(runtime.store)))
    from jobs.schedule import gpu_hours, print_gpu_hours, print_schedule, schedule_of

    described["gpu_hours"] = gpu_hours(made, described["cost"]["tokens_estimated"], runtime, speed)
    if gpus:
        described["schedule"] = schedule_of(made, gpus, runtime, speed)
    if as_json:
        typer.echo(json.dumps(described, indent=1))
        return
    from rich.table import Table

    _warn_simulated(described)
    console.print(f"{study}: {described['prompts']} training rows, {described['evaluation_prompts']} evaluation prompts, {len(described['cells'])} cells")
    table = Table()
    for column in ("cell", "rows", "steps", "epochs", "done"):
        table.add_column(column, justify="left" if column == "cell" else "right")
    for cell in described["cells"]:
        table.add_row(cell["name"], str(cell["rows"]), str(cell["steps"]), f"{cell['epochs']:.3g}", "yes" if cell["done"] else "")
    console.print(table)
    _print_stages(described)
    tokens, requests = described["cost"]["tokens_estimated"], described["cost"]["requests"]
    for stage, count in tokens.items():
        asked = f"{requests[stage]:,} requests" if stage in requests else f"{described['cost']['training_rows']:,} rows in {described['cost']['steps']:,} steps"
        console.print(f"{stage:<11} {asked}, about {count:,} tokens")
    print_gpu_hours(described["gpu_hours"], speed)
    if endpoints := described["cost"]["endpoints"]:
        _print_prices(endpoints)
    if limits := described["detectable"]:
        alone, corrected = (f"{limits[key]:.2f}" if limits[key] else "none" for key in ("one_cell", "all_cells"))
        console.print(
            f"smallest win rate that {limits['prompts']} prompts in {limits['clusters']} clusters tell from 0.50 (power 0.8, intracluster correlation "
            f"{limits['assumed_icc']} assumed): {alone} for one cell, {corrected} for all {len(described['cells'])} after Holm's correction"
        )
    if gpus:
        print_schedule(described["schedule"])


@app.command()
def run(
    study: StudyName,
    only: Annotated[str | None, typer.Option(metavar="STAGE_OR_CELL", help="build only this stage or this cell")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the steps that would be built, and build nothing")] = False,
    rehearse: Rehearse = False,
) -> None:
    """Build what is missing of a study, from synthesis to report. A finished study builds nothing."""
    made, runtime = plan_of(study, rehearse), runtime_from(os.environ)
    keys = made.select(only)
    if dry_run:
        done = done_keys(open_store(runtime.store))
        missing = [step.key for step in made.steps if step.key in keys and step.key not in done]
        for key in missing:
            typer.echo(key)
        typer.echo(f"{len(missing)} of {len(keys)} steps would be built")
        return
    from jobs import grid

    grid.run(made, runtime, only)


@app.command()
def status(study: StudyName, as_json: AsJson = False, rehearse: Rehearse = False, context: Context = None) -> None:
    """What of a study is done; with a cluster also what is under way there, and what it waits for."""
    made = plan_of(study, rehearse)
    if context is not None:
        _status_on(context, made, as_json)
        return
    described = describe(made, done_keys(open_store(runtime_from(os.environ).store)))
    if as_json:
        typer.echo(json.dumps({key: described[key] for key in ("study", "stages", "cells", "missing")}, indent=1))
        return
    _warn_simulated(described)
    _print_stages(described)


@app.command()
def report(
    study: StudyName,
    out: Annotated[Path | None, typer.Option(help="copy the report and its tables into this folder")] = None,
    rehearse: Rehearse = False,
    context: Context = None,
) -> None:
    """The results as a table and the report's path. Of an unfinished study: what there is so far, in STUDY-report/."""
    from jobs import grid
    from pipeline.artifacts import read_manifest

    made = plan_of(study, rehearse)
    if context is not None:
        _take_store_of(context)
    runtime = runtime_from(os.environ)
    store = open_store(runtime.store)
    (step,) = made.stage("report")
    manifest = read_manifest(store, step)
    if manifest is not None:
        grid.show_report(made, store, runtime)
        files: dict[str, Any] = {name: store.read(item.key) for name, item in manifest.objects.items()} if out else {}
    else:
        from pipeline.artifacts import parquet_bytes
        from pipeline.stages.report import make_report

        files = {name: item if isinstance(item, bytes) else parquet_bytes(item) for name, item in make_report(made, store).items()}
        out = out or Path(f"{made.study.name}-report")
        console.print("[yellow]the study is not finished: this is what there is so far[/yellow]")
        grid.print_results(json.loads(files["results.json"]))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (out / name).write_bytes(data)
        console.print(f"report: {out / 'report.html'}")


@app.command()
def companies(
    count: Annotated[int, typer.Option(min=1, help="how many companies the file is to hold")],
    study: StudyName = "laptop",
    seed: Annotated[int, typer.Option(help="the same study, count and seed give the same companies")] = 3407,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="where they go; STUDY-companies.toml if not given. What is there already counts")] = None,
) -> None:
    """The study's teacher writes more companies for the task `posts`, for a study with companies_file in [task]."""
    from pipeline.companies import write_companies

    loaded = load_study(study)
    path = out or Path(f"{loaded.name}-companies.toml")
    outcome = write_companies(loaded, runtime_from(os.environ), count, seed, path, console.print)
    for reason, times in outcome.refused.most_common():
        console.print(f"refused {times} times: {reason}", markup=False)
    if outcome.there < count:
        console.print(f"[red]{outcome.there} of {count} companies were accepted[/red]; run again with another --seed for the rest. They are in {path}")
        raise typer.Exit(PARTLY_BUILT)
    done = f"{outcome.added} companies written" if outcome.added else "nothing to write"
    console.print(f'{done}: {path} holds {outcome.there}. A study names it in [task]: companies_file = "{path.name}"', markup=False)


@app.command()
def setup(overlay: Annotated[str, typer.Argument(metavar="OVERLAY", help="a folder of k8s/overlays")], context: OnCluster) -> None:
    """Make what studies need on a cluster, once: namespace, accounts, network, limits, settings and the templates of the jobs."""
    from jobs import cluster

    cluster.setup(cluster.connect(context), overlay, _line)


@app.command()
def submit(study: StudyName, context: OnCluster, rehearse: Rehearse = False) -> None:
    """Run a study on a cluster. It goes on without this machine; a second submit finds the first."""
    from jobs import cluster

    made = plan_of(study, rehearse)
    cluster.submit(cluster.connect(context), made, _line)
    _line(f"see `datadose status {study} --context {context}` and `datadose logs {study} --context {context} -f`")


@app.command()
def cancel(study: StudyName, context: OnCluster, rehearse: Rehearse = False) -> None:
    """Take a study off a cluster. What it has committed stays in the store."""
    from jobs import cluster

    cluster.cancel(cluster.connect(context), plan_of(study, rehearse), _line)


@app.command()
def logs(
    study: StudyName,
    context: OnCluster,
    stage: Annotated[str, typer.Option(metavar="STAGE", help="of which stage; the launcher's own without it")] = "grid",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="stay until it ends")] = False,
    rehearse: Rehearse = False,
) -> None:
    """What the launcher, or a stage, has printed on a cluster."""
    from jobs import cluster

    for line in cluster.log_lines(cluster.connect(context), plan_of(study, rehearse), stage, follow):
        typer.echo(line)


@app.command()
def doctor(
    study: StudyName = "laptop",
    context: Context = None,
    store_only: Annotated[bool, typer.Option("--store", help="only whether the store can be written, and by one writer at a time")] = False,
) -> None:
    """Check store, models, memory, disk, ports and versions, or a cluster, and say what to do about each finding."""
    if context is not None:
        from jobs import cluster, cluster_doctor

        checks = cluster_doctor.diagnose(cluster.connect(context), plan_of(study))
    else:
        from pipeline import preflight

        runtime = runtime_from(os.environ)
        checks = preflight.store_checks(open_store(runtime.store)) if store_only else preflight.diagnose(plan_of(study), runtime)
    bad = 0
    for check in checks:
        console.print(f"[green]ok  [/green] {check.name}: {check.found}" if check.passed else f"[red]FAIL[/red] {check.name}: {check.found}. {check.remedy}")
        bad += not check.passed
    if bad:
        raise typer.Exit(FAILED)


def _line(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _take_store_of(context: str) -> None:
    """The store of the cluster's settings, where the environment names none. Keys come from here, as boto3 takes them."""
    from jobs import cluster

    for name, value in cluster.settings(cluster.connect(context)).items():
        if name == "DATADOSE_STORE" or name.startswith("AWS_"):
            os.environ.setdefault(name, value)


def _status_on(context: str, made: Plan, as_json: bool) -> None:
    """State comes from the store first; the objects say what is under way. A store out of reach from here is said, and is no error."""
    from jobs import cluster

    _take_store_of(context)
    described, trouble = None, None
    try:
        described = describe(made, done_keys(open_store(runtime_from(os.environ).store)))
    except Exception as error:
        if (trouble := store_trouble(error)) is None:
            raise
    lines = cluster.under_way(cluster.connect(context), made)
    if as_json:
        kept = {key: described[key] for key in ("study", "stages", "cells", "missing")} if described else {"study": made.study.name}
        typer.echo(json.dumps(kept | {"store_problem": trouble, "under_way": lines}, indent=1))
        return
    if described:
        _warn_simulated(described)
        _print_stages(described)
    else:
        _line(str(trouble))
    for line in lines or [f"nothing of {made.study.name} is on this cluster"]:
        _line(line)


def _warn_simulated(described: dict[str, Any]) -> None:
    if described["simulated"]:
        console.print(f"[red]Simulated: {', '.join(described['simulated'])} played by a scripted model[/red]")


def _print_prices(endpoints: dict[str, Any]) -> None:
    def priced(money: float | None) -> str:
        return "no price in \\[prices]" if money is None else f"at most about {money:,.4f} {endpoints['currency']}"

    for model, use in endpoints["models"].items():
        console.print(
            f"{model}: {use['requests']:,} requests, about {use['input_tokens']:,} tokens in and {use['output_tokens']:,} out: {priced(use['money'])}"
        )
    day = f" (prices of {endpoints['prices_of']})" if endpoints["prices_of"] else ""
    console.print(f"endpoints altogether: {priced(endpoints['money'])}{day}")


def _print_stages(described: dict[str, Any]) -> None:
    for stage, counts in described["stages"].items():
        console.print(f"{stage:<11} {counts['done']}/{counts['steps']} steps done")


def main() -> None:
    with exit_codes():
        app()


if __name__ == "__main__":
    main()
