"""What a page says in sentences: what was done, which run is best, how far that is to be trusted, what to type next."""

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmkit import rundir
from llmkit.launchers.sweep import MAXIMIZED
from llmkit.reporting.cells import in_words
from llmkit.reporting.collection import Report
from llmkit.reporting.curves import MOST_POINTS
from llmkit.reporting.runs import SHARES, Figure, Run

STATUSES = ("completed", "running", "queued", "waiting", "failed", "preempted", "stopped", "unknown")
MOST_VALUES = 12  # of a key that are named


def title(report: Report) -> str:
    """What the page is called."""
    kind = "sweep" if report.sweep else "run" if len(report.runs) == 1 else "runs"
    return f"{kind} {', '.join(map(str, report.places))}"


def facts(report: Report) -> Iterator[tuple[str, str]]:
    """Name and content of each line of the summary."""
    for key in report.swept_keys:
        yield key, _values([run.swept[key] for run in report.runs if key in run.swept])
    counted = [f"{count} {status}" for status in STATUSES if (count := report.count(status))]
    if len(report.runs) > 1:
        yield "runs", f"{len(report.runs)}: {', '.join(counted)}"
    else:
        yield "status", " ".join(filter(None, [report.runs[0].state.status, report.runs[0].state.reason]))
    if report.objective and len(report.runs) > 1:
        better = "higher is better" if report.objective in MAXIMIZED else "lower is better"
        yield "ranked by", f"{report.objective} ({better})"
    if (winner := report.winner) is None:
        return
    if len(report.runs) > 1:
        yield "winner", winner.label
    for name in winner.figures if len(report.runs) == 1 else [report.objective or ""]:
        if figure := winner.figures.get(name):
            before = winner.base.get(name)
            yield name, in_words(name, figure) + (f"; before training {in_words(name, before)}" if before else "")
    for name, figure in winner.test.items():
        yield f"{name} on data.test", in_words(name, figure)


def cautions(report: Report) -> Iterator[str]:
    """What a reader should know before believing the ranking."""
    if report.objective is None:
        yield "The runs were to be compared by different figures, so they are not ranked."
    elif not report.ranked and len(report.runs) > 1:
        yield f"No finished run has a figure for {report.objective} yet, so none is ranked."
    behind = sum(run.state.was_behind for run in report.runs)
    if report.winner is not None and (compared := len(report.ranked) + behind) > 1:
        yield _chosen(report, report.winner, compared)
        yield from _overlap(report, report.winner)
    if len({run.fingerprint for run in report.runs if run.fingerprint}) > 1:
        yield "The runs were trained on different rows; figures measured on different rows do not compare."
    if behind:
        yield (
            f"{behind} of {len(report.runs)} runs were stopped early, behind the others by then (early_stop): one that "
            "learns slowly at first may be among them."
        )
    if under_way := report.count("waiting", "queued", "running"):
        yield f"{under_way} of {len(report.runs)} runs were not at their end when this was written: ranks may change."


def _chosen(report: Report, winner: Run, compared: int) -> str:
    """The winner's curse, and where it does not reach."""
    assert report.objective is not None
    rows = "the rows it was trained on" if report.objective.startswith("train_") else "the evaluation rows"
    said = (
        f"The winner was chosen by {report.objective} on {rows}, out of {compared} runs: the best of many is "
        "partly the luckiest, so expect it to do a little worse on new rows."
    )
    if winner.test:
        tested = "; ".join(f"{name} {in_words(name, figure)}" for name, figure in winner.test.items())
        return f"{said} On data.test, which chose nothing: {tested}."
    return f"{said} There is no data.test to say how much worse: set data.test= to rows that choose nothing."


def _overlap(report: Report, winner: Run) -> Iterator[str]:
    assert report.objective is not None
    own = winner.figures.get(report.objective)
    others = [run.figures.get(report.objective) for run in report.ranked if run is not winner]
    if own is None or own.low is None:
        if report.objective not in SHARES:
            yield f"How far chance may move {report.objective} is not measured: small differences may mean nothing."
        return
    close = sum(_meet(own, other) for other in others if other is not None)
    if close:
        which = f"{close} of the {len(others)} others" if len(others) > 1 else "the other"
        yield f"The winner's 95% interval meets that of {which}: it would take more rows to tell them apart."


def _meet(one: Figure, other: Figure) -> bool:
    known = None not in (one.low, one.high, other.low, other.high)
    return known and one.low <= other.high and other.low <= one.high  # type: ignore[operator]


def thinning(runs: Sequence[Run]) -> str:
    """What was left out of the curves; empty where nothing was."""
    thinned = [run for run in runs if any(curve.is_thinned for curve in run.curves.values())]
    if not thinned:
        return ""
    most = max(curve.logged for run in thinned for curve in run.curves.values())
    return (
        f"{len(thinned)} of {len(runs)} runs logged more than {MOST_POINTS:,} points (up to {most:,}): of each stretch "
        "of steps the lowest and the highest are drawn. metrics.jsonl has them all."
    )


def commands(report: Report) -> list[tuple[str, str]]:
    """What to do next, each with its exact command."""
    winner, found = report.winner, []
    if winner is not None:
        run = f"run={winner.directory}"
        what = "the winner" if len(report.runs) > 1 else "it"
        found = [
            (f"serve {what}", shlex.join(["llmkit", "serve", run])),
            (f"talk to {what}, beside its base", shlex.join(["llmkit", "chat", run, "compare=true"])),
            (f"measure {what}", shlex.join(["llmkit", "evaluate", run])),
            (f"repeat {what}", shlex.join(["llmkit", "train", str(winner.directory / rundir.CONFIG)])),
        ]
    again = shlex.join(["llmkit", "report", *map(str, report.places)])
    return [*found, ("write this page anew", again)]


def seen_from(report: Report) -> str:
    """Where the commands are to be typed, if it matters."""
    return "" if all(place.is_absolute() for place in report.places) else str(Path.cwd())


def _values(values: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(values))
    with contextlib.suppress(ValueError):
        distinct.sort(key=float)
    if len(distinct) > MOST_VALUES:
        return f"{len(distinct)} values from {distinct[0]} to {distinct[-1]}"
    return ", ".join(distinct)
