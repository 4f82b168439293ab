"""The page: one HTML file that needs nothing else and asks nobody, dark or light as its reader likes."""

import json
import secrets
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmkit import durable
from llmkit.errors import ConfigError
from llmkit.reporting import words
from llmkit.reporting.charts import Chart, colour, dash, loss_chart, objective_charts, training_charts
from llmkit.reporting.collection import Report
from llmkit.reporting.tables import answers_table, audits, config_table, costs, leaderboard

MARK = '<meta name="generator" content="llmkit report">'  # by which a page of ours is known again
# Nothing is fetched, and no script runs but those of this page, whatever the answers of a model may hold.
POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src data: blob:; "
    "form-action 'none'; base-uri 'none'"
)
# Control characters, which HTML does not have, as pictures of themselves.
PICTURES = {number: chr(0x2400 + number) for number in range(32) if chr(number) not in "\n\t"} | {0x7F: "␡"}


def write_page(report: Report, page: Path) -> None:
    """Write the page in one step. Raises ConfigError where it cannot be written; see `check_place`."""
    check_place(page)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        # Half of a surrogate pair, which JSON can hold, is no text.
        durable.write_bytes(page, html(report, page).encode("utf-8", errors="replace"))
    except OSError as error:
        raise ConfigError(f"{page}: cannot be written ({error.strerror}); name another place, to=FILE.html.") from error


def check_place(page: Path) -> None:
    """Raise ConfigError where something lies that is no page of ours."""
    if page.is_dir():
        raise ConfigError(f"to={page}: is a directory; name a file, to={page / 'report.html'}.")
    if page.exists() and MARK.encode() not in page.read_bytes()[:2000]:
        raise ConfigError(f"{page}: is there already and no report of llmkit; name another place, to=FILE.html.")


def html(report: Report, page: Path) -> str:
    """The text of the page, to lie at `page`."""
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    here = files("llmkit.reporting")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = lambda text: str(text).translate(PICTURES)
    template = environment.from_string((here / "page.jinja").read_text(encoding="utf-8"))
    nonce = secrets.token_urlsafe(16)
    losses, objectives, training = loss_chart(report), objective_charts(report), training_charts(report)
    charts = [*([losses] if losses else []), *objectives, *training]
    return template.render(
        report=report,
        words=words,
        mark=MARK,
        policy=POLICY.format(nonce=nonce),
        nonce=nonce,
        style=(here / "style.css").read_text(encoding="utf-8"),
        script=(here / "charts.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs() if charts else "",
        figures=_for_script({chart.id: chart.figure for chart in charts}),
        losses=losses,
        objectives=objectives,
        training=training,
        legend=_legend(report, charts),
        leaderboard=leaderboard(report, page),
        answers=answers_table(report),
        audits=audits(report),
        costs=costs(report),
        config=config_table(report),
    )


def _legend(report: Report, charts: list[Chart]) -> list[dict[str, Any]]:
    """The runs that are drawn: number, name, colour and how their lines are broken."""
    drawn = {trace["meta"]["run"] for chart in charts for trace in chart.figure["data"] if "meta" in trace}
    return [
        {"number": number, "label": run.label, "colour": colour(run, report.runs), "dash": dash(run, report.runs)}
        for number, run in enumerate(report.runs)
        if number in drawn
    ]


def _for_script(value: Any) -> str:
    """JSON that can stand in a script element: `</script>` in a name would end it. Raises ValueError for NaN."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
