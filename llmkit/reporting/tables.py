"""The tables of a page: texts in cells, in the order they are read."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llmkit import rundir
from llmkit.data.preview.tables import audit_tables
from llmkit.reporting.cells import (
    NOT_KNOWN,
    Cell,
    Table,
    count,
    duration,
    from_to,
    kind_of,
    memory,
    money,
    number,
    shown,
    words,
)
from llmkit.reporting.charts import colour
from llmkit.reporting.collection import Report, differences
from llmkit.reporting.runs import LOSSES, SHARES, Answers, Cost, Figure, Run

ByPrompt = dict[tuple[str, str], str]  # prompt and expected answer -> the model's
MOST_WINNERS = 3  # whose answers stand side by side
MOST_SIDE_BY_SIDE = 4  # runs that have a column each; more have a row


def leaderboard(report: Report, page: Path) -> Table:
    """Every run, the best first: what was swept, its figures, how it stands."""
    names = figure_names(report)
    tested = list(dict.fromkeys(name for run in report.runs for name in run.test))
    has_adapter = any(run.config.get("lora.r") for run in report.runs)
    rows = [
        [
            number(str(run.rank) if run.rank else ""),
            Cell(text=run.name, link=_link(run, page), colour=colour(run, report.runs), kind="run"),
            _state(run),
            *(Cell(text=run.swept.get(key, ""), kind=kind_of(run.swept.get(key, ""))) for key in report.swept_keys),
            *(_figure_cell(name, run.figures.get(name), run.base.get(name)) for name in names),
            *(_figure_cell(name, run.test.get(name)) for name in tested),
            *([number(scale(run))] if has_adapter else []),
            number(str(run.config.get("seed", ""))),
            number(_steps(run)),
        ]
        for run in report.runs
    ]
    heading = ["#", "run", "status", *report.swept_keys]
    heading += [_named(name, [run.figures for run in report.runs]) for name in names]
    heading += [_named(name, [run.test for run in report.runs], where=" on data.test") for name in tested]
    heading += [*(["alpha / r"] if has_adapter else []), "seed", "steps"]
    winner = report.winner
    strong = report.runs.index(winner) if winner is not None and len(report.runs) > 1 else None
    return Table(heading=heading, rows=rows, strong=strong)


def _named(name: str, figures: Sequence[Mapping[str, Figure]], *, where: str = "") -> str:
    """The heading of a figure's column: how many rows it is of, where all runs have the same."""
    rows = {known[name].rows for known in figures if name in known}
    same = rows.pop() if len(rows) == 1 else None
    return f"{name}{where}{f' ({same:,} rows)' if same else ''}"


def figure_names(report: Report) -> list[str]:
    """The figures that any run has, the objective first."""
    found = {name for run in report.runs for name in run.figures}
    ordered = [name for name in (*LOSSES, *SHARES) if name in found]
    return sorted(ordered, key=lambda name: name != report.objective)


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
        "tokens": lambda cost: count(cost.tokens),
        "tokens/s": lambda cost: count(cost.tokens_per_second),
        "peak memory": lambda cost: memory(cost.peak_memory_bytes),
    }
    if priced:
        columns["money"] = lambda cost: money(cost.money)
    rows = []
    for run in report.runs:
        cells = [NOT_KNOWN] * len(columns) if run.cost is None else [show(run.cost) for show in columns.values()]
        rows.append([_run_cell(run, report), *(number(text) for text in cells)])
    if len(report.runs) > 1:
        rows.append([Cell(text="all"), *(number(text) for text in _totals(report.runs, priced=priced))])
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
        count(total(cost.tokens for cost in known)),
        "",
        f"{memory(max(peaks))} at most" if peaks else NOT_KNOWN,
    ]
    return [*texts, money(total(cost.money for cost in known))] if priced else texts


def config_table(report: Report) -> Table:
    """Only what differs: between the runs, or, of a single run, from what holds where nothing is set."""
    runs = [run for run in report.runs if run.config]
    found = differences(runs) if len(runs) == len(report.runs) or len(runs) > 1 else []
    if found and len(runs) > max(MOST_SIDE_BY_SIDE, len(found)):
        by_run = zip(runs, zip(*(one.values for one in found), strict=True), strict=True)
        rows = [[_run_cell(run, report), *map(_value_cell, values)] for run, values in by_run]
        return Table(heading=["run", *(one.key for one in found)], rows=rows)
    heading = ["key", *(["unless set", "here"] if len(runs) == 1 else [run.label for run in runs])]
    return Table(heading=heading, rows=[[Cell(text=one.key), *map(_value_cell, one.values)] for one in found])


def answers_table(report: Report) -> Table | None:
    """The base model's answers beside those of the best runs; None where nobody was asked."""
    asked = [(run, run.shown_answers) for run in report.ranked or report.runs if run.shown_answers is not None]
    best = asked[:MOST_WINNERS]
    if not best:
        return None
    columns = _base_columns([run for run, _ in best])
    columns += [(f"{run.label} (step {answers.step:,})", _by_prompt(answers)) for run, answers in best]
    prompts = list(dict.fromkeys(prompt for _, column in columns for prompt in column))
    rows = [
        [*map(words, prompt), *(words(column.get(prompt, NOT_KNOWN)) for _, column in columns)] for prompt in prompts
    ]
    return Table(heading=["prompt", "expected", *(heading for heading, _ in columns)], rows=rows)


def _base_columns(runs: Sequence[Run]) -> list[tuple[str, ByPrompt]]:
    """What was answered before training: one column, unless the runs started from models that answer differently."""
    before = [(f"base of {run.label}", _by_prompt(run.answers[0])) for run in runs if run.answers[0].step == 0]
    together: ByPrompt = {}
    for _, answers in before:
        together |= answers
    agree = all(together[prompt] == answer for _, answers in before for prompt, answer in answers.items())
    return [("base model", together)] if together and agree else before


def _by_prompt(answers: Answers) -> ByPrompt:
    return {(one.prompt, one.expected): one.answer for one in answers.samples}


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


def _figure_cell(name: str, figure: Figure | None, before: Figure | None = None) -> Cell:
    if figure is None:
        return number(NOT_KNOWN)
    notes = [] if figure.low is None or figure.high is None else [from_to(name, figure.low, figure.high)]
    if before is not None:
        notes.append(f"before {shown(name, before.value)}")
    return Cell(text=shown(name, figure.value), notes=notes, kind="number")


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


def _value_cell(value: Any) -> Cell:
    return words("unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value))
