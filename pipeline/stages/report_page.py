"""The report as one HTML file that opens without a network: text from a template, charts by Vega-Altair."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import altair as alt
import jinja2

from pipeline.plan import BASE, Plan
from pipeline.stages import report_verdicts
from pipeline.stages.report_pairs import as_json

TEMPLATE, SCRIPT = (Path(__file__).with_name(name) for name in ("report.html.j2", "report.js"))


def page(plan: Plan, results: Mapping[str, Any], curves: list[dict[str, Any]], pairs: Mapping[str, Any] | None) -> str:
    """pairs: what report_pairs gives for the page itself."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"signed": lambda value: f"{value:+.3f}", "interval": interval, "ratio": ratio}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    keys = report_verdicts.keys(plan) if results["judges"] else []
    return template.render(
        plan=plan,
        results=results,
        best=best_cell(results),
        best_score=max((cell for cell in results["cells"] if cell["rows"]), key=lambda cell: float(cell["score"]["mean"]), default=None),
        keys=keys,
        by_ratio=by_ratio(results, keys),
        checks=list(results["cells"][0]["scores"]) if results["cells"] else [],
        pairs=as_json({**pairs, "keys": keys}) if pairs else None,
        charts=charts(plan, results, curves),
        script=_script(),
        browser=SCRIPT.read_text(encoding="utf-8"),
    )


def best_cell(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fine-tune with the lowest held-out loss: what can be told without a judge."""
    cells: list[dict[str, Any]] = [cell for cell in results["cells"] if cell["rows"] and cell["heldout_loss"] is not None]
    return min(cells, key=lambda cell: float(cell["heldout_loss"]), default=None)


def by_ratio(results: Mapping[str, Any], keys: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The cells as Infantino 2024 tables them: the highest performance ratio under the first key first, no losses at all above it."""
    if not keys:
        return []

    def height(cell: Mapping[str, Any]) -> float:
        found = cell["win_rates"].get(keys[0]["key"], {}).get("ratio")
        return -1.0 if found is None else math.inf if found["value"] is None else float(found["value"])

    return sorted((cell for cell in results["cells"] if cell["rows"]), key=height, reverse=True)


def interval(estimate: Mapping[str, Any] | None, digits: int = 2) -> str:
    """`0.61 [0.52, 0.70]`, without the brackets where there is no interval."""
    if estimate is None:
        return "–"
    value = f"{estimate['mean']:.{digits}f}"
    return value if estimate["low"] is None else f"{value} [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"


def ratio(found: Mapping[str, Any] | None) -> str:
    """Truncated to two decimals, as the paper prints it; the interval is rounded. No losses: the wins over none."""
    if found is None:
        return "–"
    value = f"{found['wins']}/0" if found["truncated"] is None else f"{found['truncated']:.2f}"
    if found["low"] is None:
        return value
    return f"{value} [{found['low']:.2f}, {'∞' if found['high'] is None else format(found['high'], '.2f')}]"


@functools.cache
def _script() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script; it defines window.vegaEmbed."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")).replace("</script", "<\\/script")


def charts(plan: Plan, results: Mapping[str, Any], curves: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Title, caption and Vega-Lite JSON of each chart."""
    cells = [cell for cell in results["cells"] if cell["rows"]]
    if not cells:
        return []
    base = next(cell for cell in results["cells"] if cell["name"] == BASE)
    found = []
    if base["heldout_loss"] is not None:
        flat = [{**_identity(cell), "loss": cell["heldout_loss"]} for cell in cells]
        caption = "Mean negative log-likelihood per token of held-out answers; lower is better. The dashed line is the untouched model."
        found.append(("Held-out loss", caption, _by_rows(flat, "loss", "nats per token", base["heldout_loss"])))
    flat = [{**_identity(cell), "score": cell["score"]["mean"], "low": cell["score"]["low"], "high": cell["score"]["high"]} for cell in cells]
    caption = f"{'Exact, answer by answer' if plan.task.measure else 'Share of exact checks that an answer passes'}; higher is better. "
    caption += f"Bars: 95 % intervals over each {plan.task.cluster}. The dashed line is the untouched model."
    title = plan.task.measure.capitalize() if plan.task.measure else "Exact checks passed"
    found.append((title, caption, _by_rows(flat, "score", plan.task.measure or "share", base["score"]["mean"])))
    for judge in results["judges"]:
        found += _judged_charts(cells, judge)
    if len({judge["protocol"] for judge in results["judges"]}) > 1:
        found.append(_protocols_chart(cells, results["judges"]))
    if results["breakdown"]:
        found.append(_breakdown_chart(plan, results, cells))
    named = {cell["name"]: cell for cell in cells}
    losses = [{**_identity(named[row["cell"]]), "step": row["step"], "loss": row["loss"]} for row in curves if row["cell"] in named]
    for name in dict.fromkeys(cell["series"] for cell in cells):
        mine = [row for row in losses if row["series"] == name]
        steps = "cells that train equally long, drawn together" if name.endswith("steps") else "every size for its own number of steps"
        found.append((f"Training loss, {name}", f"Runs of {steps}; equal sizes share a colour.", _loss_chart(mine)))
    return [{"title": title, "caption": caption, "spec": _spec(chart)} for title, caption, chart in found]


def _judged_charts(cells: list[dict[str, Any]], judge: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Win rate and performance ratio of one judge under one protocol, by rows and by epochs."""
    key, name = judge["key"], f"{judge['protocol']}, {judge['judge']}"
    doubt = "" if judge["trusted"] else " This judge failed a gate under this protocol: the chart says nothing about the fine-tunes."
    rated = [(cell, cell["win_rates"][key]) for cell in cells if cell["win_rates"].get(key, {}).get("rate")]
    rates = [{**_identity(cell), "rate": item["rate"]["mean"], "low": item["rate"]["low"], "high": item["rate"]["high"]} for cell, item in rated]
    odds = [
        {**_identity(cell), "ratio": item["ratio"]["value"], "low": item["ratio"]["low"], "high": item["ratio"]["high"]}
        for cell, item in rated
        if item["ratio"] and item["ratio"]["value"]
    ]
    about = "Wins and half the ties, of all parsed pairs; 0.5 is as good as the untouched model. Bars: 95 % intervals." + doubt
    share = "Performance ratio, wins over losses, on a logarithmic scale; 1 is as good as the untouched model." + doubt
    found = [
        (f"Win rate by rows ({name})", about, _by_rows(rates, "rate", "win rate", 0.5)),
        (f"Win rate by epochs ({name})", about, _by_rows(rates, "rate", "win rate", 0.5, x="epochs")),
    ]
    if odds:
        found += [
            (f"Ratio by rows ({name})", share, _by_rows(odds, "ratio", "wins / losses", 1, log=True)),
            (f"Ratio by epochs ({name})", share, _by_rows(odds, "ratio", "wins / losses", 1, x="epochs", log=True)),
        ]
    return found


def _protocols_chart(cells: list[dict[str, Any]], judges: list[dict[str, Any]]) -> tuple[str, str, Any]:
    flat = [
        {**_identity(cell), "protocol": f"{judge['protocol']}, {judge['judge']}", **{part: item["rate"][part] for part in ("mean", "low", "high")}}
        for judge in judges
        for cell in cells
        if (item := cell["win_rates"].get(judge["key"])) and item["rate"]
    ]
    data = alt.Data(values=flat)
    y = alt.Y("cell:N", title=None, sort=None, axis=alt.Axis(labelLimit=190))
    color = alt.Color("protocol:N", title=None, scale=alt.Scale(range=COLORS), legend=alt.Legend(columns=1, labelLimit=320))
    offset = alt.YOffset("protocol:N")
    x = alt.X("low:Q", title="win rate", scale=alt.Scale(domain=[0, 1]))
    chart = alt.layer(
        alt.Chart(alt.Data(values=[{"even": 0.5}])).mark_rule(strokeDash=[5, 4], color="#555").encode(x="even:Q"),
        alt.Chart(data).mark_rule(opacity=0.5).encode(x=x, x2="high:Q", y=y, yOffset=offset, color=color),
        alt.Chart(data)
        .mark_point(filled=True, size=50, opacity=1)
        .encode(x="mean:Q", y=y, yOffset=offset, color=color, tooltip=["cell:N", "protocol:N", alt.Tooltip("mean:Q", format=".2f")]),
    )
    caption = "The same answers under each protocol and judge, with 95 % intervals; 0.5 is as good as the untouched model."
    return "What the protocols say, side by side", caption, chart.properties(height=alt.Step(9))


def _breakdown_chart(plan: Plan, results: Mapping[str, Any], cells: list[dict[str, Any]]) -> tuple[str, str, Any]:
    """For the chosen cell, judge, grouping and measure: wins of total, or win rates."""
    names = {cell["name"] for cell in cells}
    flat = [row for row in results["breakdown"] if row["cell"] in names]
    groupings = list(dict.fromkeys(row["by"] for row in flat))
    keys = {judge["key"]: f"{judge['protocol']}, {judge['judge']}" for judge in results["judges"]}
    best = best_cell(results)

    def choice(name: str, label: str, options: list[str], labels: list[str] | None = None, value: str | None = None) -> Any:
        bound = alt.binding_select(options=options, labels=labels or options, name=f"{label} ")
        return alt.param(name=name, bind=bound, value=value or options[0])

    cell = choice("cell_chosen", "cell", [item["name"] for item in cells], value=best["name"] if best else None)
    key = choice("key_chosen", "judge", list(keys), list(keys.values()))
    by = choice("by_chosen", "by", groupings)
    measure = choice("measure_chosen", "show", ["wins of total", "win rate"])
    chosen = "datum.cell == cell_chosen && datum.key == key_chosen && datum.by == by_chosen"
    data = (
        alt.Chart(alt.Data(values=flat))
        .transform_filter(chosen)
        .transform_calculate(parsed="datum.win + datum.loss + datum.tie")
        .transform_calculate(
            total="measure_chosen == 'win rate' ? 1 : datum.parsed + datum.unparsed",
            shown="measure_chosen == 'win rate' ? (datum.parsed ? (datum.win + datum.tie / 2) / datum.parsed : 0) : datum.win",
        )
    )
    y = alt.Y("value:N", title=None, sort=None, axis=alt.Axis(labelLimit=190))
    tip = ["value:N", "win:Q", "loss:Q", "tie:Q", "unparsed:Q"]
    bars = alt.layer(
        data.mark_bar(color="#dde2e9").encode(x=alt.X("total:Q", title=None), y=y, tooltip=tip),
        data.mark_bar(color="#4c78a8", height={"band": 0.55}).encode(x="shown:Q", y=y, tooltip=tip),
    )
    caption = "Choose a cell, a judge, a grouping and a measure. Dark: pairs that the fine-tune won, or its win rate (ties half). Light: all pairs, or 1."
    return "Where it wins", caption, bars.add_params(cell, key, by, measure).properties(height=alt.Step(18))


def _loss_chart(losses: list[dict[str, Any]]) -> Any:
    line = alt.Chart(alt.Data(values=losses)).mark_line(point=alt.OverlayMarkDef(size=12) if len(losses) < 400 else False, strokeWidth=1.5)
    return line.encode(
        x=alt.X("step:Q", title="optimizer step", axis=alt.Axis(tickMinStep=1)),
        y=alt.Y("loss:Q", title="nats per token", scale=alt.Scale(zero=False)),
        color=alt.Color("rows:O", title="rows", scale=alt.Scale(scheme="viridis", reverse=True)),
        detail="cell:N",
        tooltip=["cell:N", "step:Q", alt.Tooltip("loss:Q", format=".3f")],
    )


COLORS = ["#4c78a8", "#e45756", "#54a24b", "#b279a2", "#f58518"]


def _identity(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {"cell": cell["name"], "rows": cell["rows"], "epochs": round(cell["epochs"], 4), "series": cell["series"]}


def _by_rows(flat: list[dict[str, Any]], measure: str, title: str, base: float, x: str = "rows", log: bool = False) -> Any:
    """A measure with its interval by size, or by passes over the rows; one line per exposure, or per size."""
    data = alt.Data(values=flat)
    series = alt.Color("series:N", title="trained for", sort=None, scale=alt.Scale(range=COLORS))
    sizes = alt.Color("rows:O", title="rows", scale=alt.Scale(scheme="viridis", reverse=True))
    color, axis = (series, alt.Axis(values=sorted({row["rows"] for row in flat}))) if x == "rows" else (sizes, alt.Axis(tickCount=6))
    words = "distinct training rows" if x == "rows" else "epochs"
    across = alt.X(f"{x}:Q", title=words, scale=alt.Scale(type="log", nice=False, padding=24), axis=axis)
    scale = alt.Scale(type="log", nice=False, padding=12) if log else alt.Scale(zero=False)
    y = alt.Y(f"{measure}:Q", title=title, scale=scale)
    tip = ["cell:N", "rows:Q", "epochs:Q", alt.Tooltip(f"{measure}:Q", format=".3f")]
    points = alt.Chart(data).encode(x=across, y=y, color=color, tooltip=tip)
    layers = [
        alt.Chart(alt.Data(values=[{"base": base}])).mark_rule(strokeDash=[5, 4], color="#555").encode(y="base:Q"),
        # One line through a size's mean where several draws or seeds were trained.
        alt.Chart(data).mark_line(strokeWidth=2).encode(x=across, y=alt.Y(f"mean({measure}):Q", title=title, scale=scale), color=color),
        points.mark_point(filled=True, size=50, opacity=1),
    ]
    if bars := [row for row in flat if row.get("low") and row.get("high")]:
        rule = alt.Chart(alt.Data(values=bars)).mark_rule(opacity=0.35)
        layers.insert(1, rule.encode(x=across, y=alt.Y("low:Q", title=title, scale=scale), y2="high:Q", color=color))
    return alt.layer(*layers)


def _spec(chart: Any) -> str:
    height = {} if not isinstance(chart.height, alt.utils.schemapi.UndefinedType) else {"height": 260}
    spec = chart.properties(width="container", **height).configure_legend(orient="bottom").configure_view(stroke=None).to_dict()
    return as_json(spec)
