"""The report as one HTML file that opens without a network: text from a template, charts by Vega-Altair."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import altair as alt
import jinja2

from pipeline.plan import BASE, Plan

TEMPLATE = Path(__file__).with_name("report.html.j2")


def page(plan: Plan, results: Mapping[str, Any], curves: list[dict[str, Any]], answers: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["signed"] = lambda value: f"{value:+.3f}"
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    best = best_cell(results)
    return template.render(
        plan=plan,
        results=results,
        best=best,
        checks=list(results["cells"][0]["scores"]) if results["cells"] else [],
        pairs=_pairs(plan, answers, best["name"]) if best else [],
        charts=charts(results, curves),
        script=_script(),
    )


def best_cell(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fine-tune with the lowest held-out loss: what can be told without a judge."""
    cells: list[dict[str, Any]] = [cell for cell in results["cells"] if cell["rows"] and cell["heldout_loss"] is not None]
    return min(cells, key=lambda cell: float(cell["heldout_loss"]), default=None)


def _pairs(plan: Plan, answers: Mapping[str, Any], best: str) -> list[dict[str, Any]]:
    fine = {row["row_id"]: row for row in answers[best]}
    return [
        {"fields": {column: row["fields"][column] for column in plan.task.columns}, "base": row["raw"], "fine": fine[row["row_id"]]["raw"]}
        for row in answers[BASE][:100]
    ]


@functools.cache
def _script() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script; it defines window.vegaEmbed."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")).replace("</script", "<\\/script")


def charts(results: Mapping[str, Any], curves: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Title, caption and Vega-Lite JSON of each chart."""
    cells = [cell for cell in results["cells"] if cell["rows"]]
    if not cells:
        return []
    base = next(cell for cell in results["cells"] if cell["name"] == BASE)
    found = []
    if base["heldout_loss"] is not None:
        flat = [{**_identity(cell), "loss": cell["heldout_loss"]} for cell in cells]
        caption = "Mean negative log-likelihood per token of held-out posts; lower is better. The dashed line is the untouched model."
        found.append(("Held-out loss", caption, _by_rows(flat, "loss", "nats per token", base["heldout_loss"])))
    flat = [{**_identity(cell), "score": cell["score"]["mean"], "low": cell["score"]["low"], "high": cell["score"]["high"]} for cell in cells]
    caption = "Share of exact checks that an answer passes; higher is better. Bars: 95 % intervals over companies."
    found.append(("Exact checks passed", caption, _by_rows(flat, "score", "share", base["score"]["mean"])))
    for name in cells[0]["win_rates"]:
        rates = [(cell, cell["win_rates"][name]["rate"]) for cell in cells if cell["win_rates"].get(name, {}).get("rate")]
        flat = [{**_identity(cell), "rate": rate["mean"], "low": rate["low"], "high": rate["high"]} for cell, rate in rates]
        caption = "Wins and half the ties, of all pairs; 0.5 is as good as the untouched model." + (
            "" if results["judge_trusted"] else " The judge failed its gates: this chart says nothing about the fine-tunes."
        )
        found.append((f"Win rate against the base ({name.rpartition('-')[0]})", caption, _by_rows(flat, "rate", "win rate", 0.5)))
    named = {cell["name"]: cell for cell in cells}
    losses = [{**_identity(named[row["cell"]]), "step": row["step"], "loss": row["loss"]} for row in curves if row["cell"] in named]
    line = alt.Chart(alt.Data(values=losses)).mark_line(point=alt.OverlayMarkDef(size=18), strokeWidth=1.5)
    line = line.encode(
        x=alt.X("step:Q", title="optimizer step", axis=alt.Axis(tickMinStep=1)),
        y=alt.Y("loss:Q", title="nats per token", scale=alt.Scale(zero=False)),
        color=alt.Color("rows:O", title="rows", scale=alt.Scale(scheme="viridis", reverse=True)),
        detail="cell:N",
        tooltip=["cell:N", "step:Q", alt.Tooltip("loss:Q", format=".3f")],
    )
    found.append(("Training loss", "Each line is a cell; equal sizes share a colour.", line))
    return [{"title": title, "caption": caption, "spec": _spec(chart)} for title, caption, chart in found]


def _identity(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {"cell": cell["name"], "rows": cell["rows"], "series": cell["series"]}


def _by_rows(flat: list[dict[str, Any]], measure: str, title: str, base: float) -> Any:
    data = alt.Data(values=flat)
    x = alt.X(
        "rows:Q",
        title="distinct training rows",
        scale=alt.Scale(type="log", nice=False, padding=24),
        axis=alt.Axis(values=sorted({row["rows"] for row in flat})),
    )
    y = alt.Y(f"{measure}:Q", title=title, scale=alt.Scale(zero=False))
    color = alt.Color("series:N", title="trained for", scale=alt.Scale(range=["#4c78a8", "#e45756", "#54a24b", "#b279a2", "#f58518"]))
    tip = ["cell:N", "rows:Q", "series:N", alt.Tooltip(f"{measure}:Q", format=".3f")]
    layers = [
        alt.Chart(alt.Data(values=[{"base": base}])).mark_rule(strokeDash=[5, 4], color="#555").encode(y="base:Q"),
        alt.Chart(data).mark_line(point=alt.OverlayMarkDef(size=55), strokeWidth=2).encode(x=x, y=y, color=color, tooltip=tip),
    ]
    if any(row.get("low") is not None for row in flat):
        bars = alt.Chart(alt.Data(values=[row for row in flat if row["low"] is not None])).mark_rule(opacity=0.35)
        layers.insert(1, bars.encode(x=x, y=alt.Y("low:Q", title=title), y2="high:Q", color=color))
    return alt.layer(*layers)


def _spec(chart: Any) -> str:
    spec = chart.properties(width="container", height=260).configure_legend(orient="bottom").configure_view(stroke=None).to_dict()
    return json.dumps(spec).replace("</", "<\\/")
