"""The tables of a page: texts in cells, in the order they are read."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llmkit import rundir
from llmkit.data.preview.tables import audit_tables
from llmkit.reporting.charts import colour
from llmkit.reporting.collection import Report, differences
from llmkit.reporting.runs import LOSSES, SHARES, Answers, Cost, Figure, Run

NOT_KNOWN = "-"
MOST_WINNERS = 3  # whose answers stand side by side
MOST_SIDE_BY_SIDE = 4  # runs that have a column each; more have a row


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One field: a text, and smaller lines below it."""

    text: str
    notes: list[str] = field(default_factory=list)
    link: str = ""
    colour: str = ""  # of the run that it names
    kind: str = ""  # its class in style.css: number, run, state, or words, whose line breaks and spaces are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of cells below a heading; `strong` is the number of the row to be seen first."""

    heading: list[str]
    rows: list[list[Cell]]
    caption: str = ""
    strong: int | None = None


def leaderboard(report: Report, page: Path) -> Table:
    """Every run, the best first: what was swept, its figures, how it stands."""
    names = figure_names(report)
    tested = list(dict.fromkeys(name for run in report.runs for name in run.test))
    has_adapter = any(run.config.get("lora.r") for run in report.runs)
    rows = [
        [
            _number(str(run.rank) if run.rank else ""),
            Cell(text=run.name, link=_link(run, page), colour=colour(run, report.runs), kind="run"),
            _state(run),
            *(Cell(text=run.swept.get(key, ""), kind=_kind(run.swept.get(key, ""))) for key in keys(report)),
            *(_figure_cell(name, run.figures.get(name), run.base.get(name)) for name in names),
            *(_figure_cell(name, run.test.get(name)) for name in tested),
            *([_number(scale(run))] if has_adapter else []),
            _number(str(run.config.get("seed", ""))),
            _number(_steps(run)),
        ]
        for run in report.runs
    ]
    heading = ["#", "run", "status", *keys(report)]
    heading += [_named(name, [run.figures for run in report.runs]) for name in names]
    heading += [_named(name, [run.test for run in report.runs], where=" on data.test") for name in tested]
    heading += [*(["alpha / r"] if has_adapter else []), "seed", "steps"]
    winner = report.winner
    strong = report.runs.index(winner) if winner is not None and len(report.runs) > 1 else None
    return Table(heading=heading, rows=rows, strong=strong)


def _named(name: str, figures: Sequence[Mapping[str, Figure]], *, where: str = "") -> str:
    """The heading of a figure's column: how many rows it is of, where all runs have the same."""
    rows = {known[name].rows for known in figures if name in known}
    count = rows.pop() if len(rows) == 1 else None
    return f"{name}{where}{f' ({count:,} rows)' if count else ''}"


def keys(report: Report) -> list[str]:
    """The columns of swept values; one that only repeats the run's name would say nothing."""
    return report.swept_keys if len(report.runs) > 1 or report.sweep else []


def figure_names(report: Report) -> list[str]:
    """The figures that any run has, the objective first."""
    found = {name for run in report.runs for name in run.figures}
    ordered = [name for name in (*LOSSES, *SHARES) if name in found]
    return sorted(ordered, key=lambda name: name != report.objective)


def in_words(name: str, figure: Figure) -> str:
    """`97.2% (95%: 85.8% to 99.5%, 36 rows)`, or `0.0777` where no interval is known."""
    if figure.low is None or figure.high is None:
        return shown(name, figure.value)
    rows = f", {figure.rows:,} rows" if figure.rows else ""
    return f"{shown(name, figure.value)} (95%: {_from_to(name, figure.low, figure.high)}{rows})"


def shown(name: str, value: float) -> str:
    """A figure by itself: a share in percent, a loss with four digits behind the point."""
    return f"{value:.1%}" if name in SHARES else f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def scale(run: Run) -> str:
    """What LoRA's update is multiplied by, and of what it is made: `16 / 8 = 2`."""
    r = run.config.get("lora.r")
    if not r:
        return NOT_KNOWN
    alpha = run.config.get("lora.lora_alpha") or 2 * r
    root = bool(run.config.get("lora.use_rslora"))
    return f"{alpha} / {'√' if root else ''}{r} = {alpha / (math.sqrt(r) if root else r):.3g}"


def costs(report: Report) -> Table:
    """What each run took, and all of them together."""
    priced = any(run.cost is not None and run.cost.money is not None for run in report.runs)
    columns: dict[str, Callable[[Cost], str]] = {
        "time": lambda cost: duration(cost.seconds),
        "device time": lambda cost: duration(cost.device_seconds),
        "device": lambda cost: cost.device or NOT_KNOWN,
        "tokens": lambda cost: _count(cost.tokens),
        "tokens/s": lambda cost: _count(cost.tokens_per_second),
        "peak memory": lambda cost: _bytes(cost.peak_memory_bytes),
    }
    if priced:
        columns["money"] = lambda cost: _money(cost.money)
    rows = []
    for run in report.runs:
        cells = [NOT_KNOWN] * len(columns) if run.cost is None else [show(run.cost) for show in columns.values()]
        rows.append([_run_cell(run, report), *(_number(text) for text in cells)])
    if len(report.runs) > 1:
        rows.append([Cell(text="all"), *(_number(text) for text in _totals(report.runs, priced=priced))])
    strong = len(rows) - 1 if len(report.runs) > 1 else None
    return Table(heading=["run", *columns], rows=rows, strong=strong)


def _totals(runs: Sequence[Run], *, priced: bool) -> list[str]:
    known = [run.cost for run in runs if run.cost is not None]

    def total(values: Iterable[float | None]) -> float | None:
        found = [value for value in values if value is not None]
        return sum(found) if found else None

    peaks = [cost.peak_memory_bytes for cost in known if cost.peak_memory_bytes is not None]
    texts = [
        duration(total(cost.seconds for cost in known)),
        duration(total(cost.device_seconds for cost in known)),
        "",
        _count(total(cost.tokens for cost in known)),
        "",
        f"{_bytes(max(peaks))} at most" if peaks else NOT_KNOWN,
    ]
    return [*texts, _money(total(cost.money for cost in known))] if priced else texts


def config_table(report: Report) -> Table:
    """Only what differs: between the runs, or, of a single run, from what holds where nothing is set."""
    runs = [run for run in report.runs if run.config]
    found = differences(runs) if len(runs) == len(report.runs) or len(runs) > 1 else []
    if len(runs) > MOST_SIDE_BY_SIDE and found:
        by_run = zip(runs, zip(*(one.values for one in found), strict=True), strict=True)
        rows = [[_run_cell(run, report), *map(_value_cell, values)] for run, values in by_run]
        return Table(heading=["run", *(one.key for one in found)], rows=rows)
    heading = ["key", *(["unless set", "here"] if len(runs) == 1 else [run.label for run in runs])]
    return Table(heading=heading, rows=[[Cell(text=one.key), *map(_value_cell, one.values)] for one in found])


def answers_table(report: Report) -> Table | None:
    """The base model's answers beside those of the best runs; None where nobody was asked."""
    best = [run for run in (report.ranked or report.runs) if run.shown_answers is not None][:MOST_WINNERS]
    if not best:
        return None
    columns = [_by_prompt(run.shown_answers) for run in best]
    base_of = next((run for run in best if run.answers[0].step == 0), None)
    base = _by_prompt(base_of.answers[0]) if base_of is not None else {}
    prompts = list(dict.fromkeys(prompt for column in columns for prompt in column))
    rows = [
        [
            _words(prompt[0]),
            _words(prompt[1]),
            *([_words(base.get(prompt, NOT_KNOWN))] if base else []),
            *(_words(column.get(prompt, NOT_KNOWN)) for column in columns),
        ]
        for prompt in prompts
    ]
    heading = ["prompt", "expected", *(["base model"] if base else [])]
    heading += [f"{run.label} (step {run.shown_answers.step:,})" for run in best if run.shown_answers is not None]
    return Table(heading=heading, rows=rows)


def _by_prompt(answers: Answers | None) -> dict[tuple[str, str], str]:
    return {(one.prompt, one.expected): one.answer for one in answers.samples} if answers is not None else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Audited:
    """The audit of the data of some runs."""

    runs: list[Run]
    tables: list[Table]
    problems: list[str]
    warnings: list[str]


def audits(report: Report) -> list[Audited]:
    """The audits, each once for all runs that share it."""
    shared: list[tuple[dict[str, Any], list[Run]]] = []
    for run in report.runs:
        if run.audit is None:
            continue
        having = next((runs for audit, runs in shared if audit == run.audit), None)
        if having is None:
            shared.append((run.audit, [run]))
        else:
            having.append(run)
    return [
        Audited(runs=runs, tables=_audit_tables(audit), problems=audit["problems"], warnings=audit["warnings"])
        for audit, runs in shared
    ]


def _audit_tables(audit: dict[str, Any]) -> list[Table]:
    tables = []
    for table in audit_tables(audit):
        kinds = [""] * table.left + ["number"] * (len(table.heading) - table.left)
        rows = [[Cell(text=text, kind=kind) for text, kind in zip(row, kinds, strict=True)] for row in table.rows]
        tables.append(Table(caption=table.title, heading=table.heading, rows=rows))
    return tables


def duration(seconds: float | None) -> str:
    """`12.3 s`, and from two minutes on `1:02:03`."""
    if seconds is None:
        return NOT_KNOWN
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _figure_cell(name: str, figure: Figure | None, before: Figure | None = None) -> Cell:
    if figure is None:
        return _number(NOT_KNOWN)
    notes = [] if figure.low is None or figure.high is None else [_from_to(name, figure.low, figure.high)]
    if before is not None:
        notes.append(f"before {shown(name, before.value)}")
    return Cell(text=shown(name, figure.value), notes=notes, kind="number")


def _from_to(name: str, low: float, high: float) -> str:
    return f"{shown(name, low)} to {shown(name, high)}"


def _state(run: Run) -> Cell:
    notes = [run.state.reason] if run.state.reason else []
    if run.is_completed and run.rank is None and run.objective is None:
        notes.append("has no figure to be ranked by")
    return Cell(text=run.state.status, notes=notes, kind="state")


def _steps(run: Run) -> str:
    if not run.config:
        return ""
    return f"{run.step:,}{f' of {run.state.steps:,}' if run.state.steps and not run.is_completed else ''}"


def _run_cell(run: Run, report: Report) -> Cell:
    return Cell(text=run.label, colour=colour(run, report.runs), kind="run")


def _link(run: Run, page: Path) -> str:
    """Where a run's directory is, seen from the page; empty while there is none."""
    if not (run.directory / rundir.CONFIG).exists():
        return ""
    return f"{quote(os.path.relpath(run.directory.resolve(), page.parent.resolve()))}/"


def _number(text: str) -> Cell:
    return Cell(text=text, kind="number")


def _words(text: str) -> Cell:
    return Cell(text=text, kind="words")


def _value_cell(value: Any) -> Cell:
    return _words("unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value))


def _count(number: float | None) -> str:
    return NOT_KNOWN if number is None else f"{number:,.0f}"


def _bytes(size: int | None) -> str:
    if size is None:
        return NOT_KNOWN
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _money(amount: float | None) -> str:
    return NOT_KNOWN if amount is None else f"{amount:,.4f}" if amount < 1 else f"{amount:,.2f}"


def _kind(text: str) -> str:
    try:
        float(text)
    except ValueError:
        return ""
    return "number"
