"""The charts of a page as plotly.js takes them: plain dicts of traces and layout.

Colours of text and grid are the page's (style.css), so that a chart is dark or light as its reader likes.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from llmkit.reporting.collection import Report
from llmkit.reporting.curves import Curve
from llmkit.reporting.runs import Figure, Run

# Okabe and Ito's colours for all kinds of sight (jfly.uni-koeln.de/color), but black and yellow, which vanish on dark
# and light; and a few of the same strength.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6bb1", "#7f9f3f", "#b5651d", "#708090")
DASHES = ("solid", "dash", "dot", "dashdot")  # once the colours are used up
LOG_FROM = 10  # times the least value that the greatest must be for a logarithmic axis
LONGEST_NAME = 28  # characters of a value below an axis


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One drawing: `title` is HTML-free text, `figure` what plotly.js gets."""

    id: str
    title: str
    figure: dict[str, Any]


def colour(run: Run, runs: Sequence[Run]) -> str:
    """The colour of a run in every chart."""
    return COLOURS[runs.index(run) % len(COLOURS)]


def dash(run: Run, runs: Sequence[Run]) -> str:
    """How the lines of a run are broken, in every chart."""
    return DASHES[runs.index(run) // len(COLOURS) % len(DASHES)]


def loss_chart(report: Report) -> Chart | None:
    """Training loss as thin lines, evaluation loss with markers."""
    traces = []
    for run in report.runs:
        if (training := run.curves.get("loss")) is not None:
            traces.append(_line(run, report, training, "train") | {"opacity": 0.55})
        if (evaluation := run.curves.get("eval_loss")) is not None:
            marked = {"mode": "lines+markers", "marker": {"size": 7, "color": colour(run, report.runs)}}
            traces.append(_line(run, report, evaluation, "evaluation", width=2) | marked)
    return _over_steps("losses", "Loss: training thin, evaluation with markers", "loss", traces)


def training_charts(report: Report) -> list[Chart]:
    """Learning rate and gradient norm."""
    charts = []
    for key, title in (("learning_rate", "Learning rate"), ("grad_norm", "Gradient norm before clipping")):
        traces = [_line(run, report, run.curves[key], title.lower()) for run in report.runs if key in run.curves]
        if chart := _over_steps(key, title, key.replace("_", " "), traces, log=key != "learning_rate"):
            charts.append(chart)
    return charts


def objective_charts(report: Report) -> list[Chart]:
    """For each swept key the objective against its values; the points above one value differ in the other keys."""
    runs = [run for run in report.runs if run.objective is not None]
    charts = []
    for number, key in enumerate(report.swept_keys):
        having = [run for run in runs if key in run.swept]
        if len({run.swept[key] for run in having}) > 1:
            charts.append(_against(report, key, having, f"objective-{number}"))
    return charts


def _against(report: Report, key: str, runs: Sequence[Run], chart_id: str) -> Chart:
    places, axis = _places([run.swept[key] for run in runs])
    assert report.objective is not None, "runs without a common figure have no objective"
    on_top_last = sorted(runs, key=lambda run: run is report.winner)
    points = [_point(run, report, places[run.swept[key]]) for run in on_top_last]
    objectives = [run.objective for run in runs if run.objective is not None]
    layout = _layout(key, report.objective, log_y=_spans_decades(objectives))
    layout["xaxis"] |= axis
    return Chart(
        id=chart_id,
        title=f"{report.objective} against {key}",
        figure={"data": [*_middle(runs, key, places, is_line="type" in axis), *points], "layout": layout},
    )


def _places(values: Sequence[str]) -> tuple[dict[str, float], dict[str, Any]]:
    """Where each value stands on the axis, and the axis: numbers where all are, else one place after the other."""
    distinct = list(dict.fromkeys(values))
    try:
        places = {value: float(value) for value in distinct}
    except ValueError:
        places = {value: float(number) for number, value in enumerate(distinct)}
        names = [escape(_shortened(value), quote=False) for value in distinct]
        return places, {"tickvals": list(places.values()), "ticktext": names, "range": [-0.5, len(distinct) - 0.5]}
    axis: dict[str, Any] = {"type": "log" if _spans_decades(places.values()) else "linear"}
    if len(places) <= 12:
        axis |= {"tickvals": sorted(places.values()), "ticktext": [f"{x:g}" for x in sorted(places.values())]}
    return places, axis


def _middle(runs: Sequence[Run], key: str, places: dict[str, float], *, is_line: bool) -> Iterable[dict[str, Any]]:
    """A line through the medians of the runs above each value: what the key does, whatever the others are."""
    above: dict[float, list[float]] = {}
    for run in runs:
        if run.objective is not None:
            above.setdefault(places[run.swept[key]], []).append(run.objective)
    if is_line and len(above) > 1:
        xs = sorted(above)
        yield {
            "type": "scatter",
            "mode": "lines",
            "x": xs,
            "y": [statistics.median(above[x]) for x in xs],
            "line": {"color": "#888", "width": 1.5, "dash": "dot"},
            "hoverinfo": "skip",
        }


def _point(run: Run, report: Report, x: float) -> dict[str, Any]:
    """One run; with its interval where it is known, hollow while the run is not finished."""
    assert report.objective is not None
    assert run.objective is not None
    own, number = colour(run, report.runs), report.runs.index(run)
    marker: dict[str, Any] = {"size": 10, "color": own, "symbol": "circle" if run.is_completed else "circle-open"}
    if run is report.winner:
        marker |= {"symbol": "star", "size": 15}
    trace: dict[str, Any] = {"type": "scatter", "mode": "markers", "x": [x], "y": [run.objective], "marker": marker}
    figure = run.figures.get(report.objective)
    if figure is not None and figure.low is not None and figure.high is not None:
        bars = {"arrayminus": [run.objective - figure.low], "array": [figure.high - run.objective]}
        trace["error_y"] = {"type": "data", "symmetric": False, "color": own, "thickness": 1, "width": 4} | bars
    text = f"{escape(run.label, quote=False)}<br>{report.objective} {_between(run.objective, figure)}"
    return trace | {"meta": {"run": number}, "text": [text], "hovertemplate": "%{text}<extra></extra>"}


def _between(value: float, figure: Figure | None) -> str:
    known = figure is not None and figure.low is not None and figure.high is not None
    return f"{value:.4g} ({figure.low:.4g} to {figure.high:.4g})" if known and figure else f"{value:.4g}"


def _line(run: Run, report: Report, curve: Curve, what: str, *, width: float = 1.2) -> dict[str, Any]:
    number = report.runs.index(run)
    text = f"{escape(run.label, quote=False)}, {what}"
    return {
        "type": "scatter",
        "mode": "lines" if len(curve.steps) > 1 else "markers",
        "x": curve.steps,
        "y": curve.values,
        "line": {"color": colour(run, report.runs), "dash": dash(run, report.runs), "width": width},
        "marker": {"color": colour(run, report.runs)},
        "meta": {"run": number},
        "text": text,
        "hovertemplate": "%{text}<br>step %{x}: %{y:.4g}<extra></extra>",
    }


def _over_steps(chart_id: str, title: str, y: str, traces: list[dict[str, Any]], *, log: bool = True) -> Chart | None:
    if not traces:
        return None
    values = [value for trace in traces for value in trace["y"] if value is not None]
    layout = _layout("step", y, log_y=log and _spans_decades(values))
    return Chart(id=chart_id, title=title, figure={"data": traces, "layout": layout})


def _spans_decades(values: Iterable[float]) -> bool:
    known = list(values)
    return bool(known) and min(known) > 0 and max(known) >= LOG_FROM * min(known)


def _layout(x: str, y: str, *, log_y: bool) -> dict[str, Any]:
    quiet = {"zeroline": False, "automargin": True, "gridcolor": "#888"}
    log = {"type": "log", "dtick": "D2", "exponentformat": "power"} if log_y else {"type": "linear"}
    return {
        "xaxis": quiet | {"title": {"text": escape(x, quote=False)}},
        "yaxis": quiet | log | {"title": {"text": f"{y}{' (log)' if log_y else ''}"}},
        "margin": {"l": 60, "r": 20, "t": 30, "b": 50},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#888", "activecolor": COLOURS[0]},
        "showlegend": False,
        "hovermode": "closest",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "inherit", "size": 13},
    }


def _shortened(value: str) -> str:
    return value if len(value) <= LONGEST_NAME else f"…{value[1 - LONGEST_NAME :]}"
