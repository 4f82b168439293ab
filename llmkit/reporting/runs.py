"""One run as its directory shows it at this moment: finished, failed, under way or only asked for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit import rundir
from llmkit.config.files import recorded_values
from llmkit.config.schema import FIGURES_OF_RECIPE
from llmkit.reporting.curves import Curve, curve, finite
from llmkit.training.estimate import share
from llmkit.training.metrics import eval_loss_interval, last_tokens, mean_loss, read_metrics, read_records

LOSSES = ("eval_loss", "train_loss")
SHARES = tuple(name for names in FIGURES_OF_RECIPE.values() for name in names)
CURVES = ("loss", "eval_loss", "learning_rate", "grad_norm")
COMPLETED = "completed"
NO_END = ("waiting", "queued", "running", "unknown")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A figure and, where it is known, the interval that covers the true one in 95 of 100 draws of rows."""

    value: float
    low: float | None = None
    high: float | None = None
    rows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """An answer to one of the run's fixed prompts."""

    prompt: str
    expected: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What a run's model answered at one step."""

    step: int
    samples: list[Sample]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a run took; None where it is not known (yet)."""

    seconds: float | None
    device: str
    device_seconds: float | None
    tokens: int | None
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    money: float | None  # in the currency of hardware.price_per_hour


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How a run stands: `status` is waiting, queued, running, unknown, or one of result.json's."""

    status: str
    reason: str = ""  # one line
    steps: int | None = None  # that it will have taken at its end
    was_behind: bool = False  # and stopped therefore, by early_stop


@dataclass(slots=True, kw_only=True, eq=False)
class Run:
    """Everything the page shows of a run."""

    directory: Path
    name: str
    state: State
    step: int = 0
    objective: float | None = None  # finite
    figures: dict[str, Figure] = field(default_factory=dict)  # the latest, by result.json's names
    base: dict[str, Figure] = field(default_factory=dict)  # the same before training
    test: dict[str, Figure] = field(default_factory=dict)  # on data.test
    curves: dict[str, Curve] = field(default_factory=dict)
    answers: list[Answers] = field(default_factory=list)  # by step
    shown_answers: Answers | None = None  # of the weights that were delivered, or the latest
    audit: dict[str, Any] | None = None
    cost: Cost | None = None
    config: dict[str, Any] = field(default_factory=dict)  # by dotted keys; empty before the run was made ready
    fingerprint: str | None = None  # of its training rows
    swept: dict[str, str] = field(default_factory=dict)  # the values that tell it from the others
    rank: int | None = None  # from 1; None for one that is not finished or has no figure to be ranked by

    @property
    def label(self) -> str:
        """What the run is called beside others."""
        return ", ".join(f"{key}={value}" for key, value in self.swept.items()) or self.name

    @property
    def is_completed(self) -> bool:
        """Whether it came to its end."""
        return self.state.status == COMPLETED

    @property
    def is_blank(self) -> bool:
        """Whether it has left nothing to look at, not even its end."""
        return not self.curves and not self.figures and self.state.status in NO_END


def read_run(directory: Path, *, name: str, state: State, objective: str | None) -> Run:
    """Read a run's files; those that are missing are left out.

    Args:
        objective: the figure that runs are compared by, where there is one.

    Raises:
        ConfigError: for a file that is not what it should be.
    """
    run = Run(directory=directory, name=name, state=state)
    if not (directory / rundir.CONFIG).exists():
        return run
    run.config = recorded_values(directory)
    run.audit = rundir.read_json(directory / rundir.DATA_AUDIT)
    result = rundir.read_result(directory) or {}
    records = read_metrics(directory)
    run.curves = {key: found for key in CURVES if (found := curve(records, key)).steps}
    run.step = result.get("steps") or (records[-1]["step"] if records else 0)
    run.fingerprint = result.get("dataset_fingerprint")
    after, before = _latest(records), _at_start(records)
    if run.is_completed:
        after = {name: value for name in (*LOSSES, *SHARES) if (value := finite(result.get(name))) is not None}
        base = result.get("base") or {}
        before |= {name: value for name, given in base.items() if (value := finite(given)) is not None}
    asked = _rows_asked(run)
    evaluated = max((record["step"] for record in records if "eval_loss" in record), default=0)
    interval = result.get("eval_loss_interval") if run.is_completed else eval_loss_interval(records, step=evaluated)
    run.figures = {name: _figure(name, value, asked, interval) for name, value in after.items()}
    interval = eval_loss_interval(records, step=0)
    run.base = {name: _figure(name, value, asked, interval) for name, value in before.items()}
    run.test = {name: _tested(figure) for name, figure in (result.get("test") or {}).items()}
    run.objective = finite(result.get("objective"))
    if run.objective is None and objective in run.figures and not run.is_completed:
        run.objective = run.figures[objective].value
    run.answers = _answers(directory)
    run.shown_answers = _delivered(run, step=result.get("final_step"))
    run.cost = _cost(result, records)
    return run


def _latest(records: list[dict[str, Any]]) -> dict[str, float]:
    """The figures of a run that has no result, as it last logged them."""
    found: dict[str, float] = {}
    for record in records:
        if record["step"]:
            found |= {name: value for name in ("eval_loss", *SHARES) if (value := finite(record.get(name))) is not None}
    mean = finite(mean_loss(records))
    return found if mean is None else found | {"train_loss": mean}


def _at_start(records: list[dict[str, Any]]) -> dict[str, float]:
    return {
        name: value
        for record in records
        if record["step"] == 0
        for name in ("eval_loss", *SHARES)
        if (value := finite(record.get(name))) is not None
    }


def _rows_asked(run: Run) -> dict[str, int]:
    """How many rows each share is of: the first of a split, as many as evaluation.examples says; see training/figures.

    Empty where the audit does not tell, or rows were split, so that several examples are of one row.
    """
    if run.audit is None or any(source["split"] for source in run.audit["sources"]):
        return {}
    most = run.config.get("evaluation.examples") or 0
    used = {name: min(split["used"], most) for name, split in run.audit["splits"].items()}
    counts = {name: used.get("train" if name.startswith("train_") else "validation", 0) for name in SHARES}
    return {name: count for name, count in counts.items() if count}


def _figure(name: str, value: float, asked: Mapping[str, int], of_loss: Sequence[float] | None) -> Figure:
    """With the interval recorded `of_loss`, or Wilson's where it is a share of so many rows.

    A share that cannot be of so many is of fewer rows than are known.
    """
    if name == "eval_loss" and of_loss is not None:
        return Figure(value=value, low=of_loss[0], high=of_loss[1])
    rows = asked.get(name)
    if rows is None:
        return Figure(value=value)
    hits = round(value * rows)
    if not math.isclose(hits, value * rows, abs_tol=1e-6):
        return Figure(value=value)
    interval = share(hits, rows)
    return Figure(value=value, low=interval.low, high=interval.high, rows=rows)


def _tested(figure: Mapping[str, Any]) -> Figure:
    return Figure(value=figure["value"], low=figure["low"], high=figure["high"], rows=figure["n"])


def _answers(directory: Path) -> list[Answers]:
    by_step: dict[int, list[Sample]] = {}
    for record in read_records(directory / rundir.SAMPLES):
        texts = {key: str(record.get(key) or "") for key in ("prompt", "expected", "answer")}
        by_step.setdefault(record["step"], []).append(Sample(**texts))
    return [Answers(step=step, samples=samples) for step, samples in sorted(by_step.items())]


def _delivered(run: Run, *, step: int | None) -> Answers | None:
    """The answers of the weights in `final/`, or the last there are."""
    trained = [answers for answers in run.answers if answers.step]
    delivered = [answers for answers in trained if answers.step == step] or trained
    return delivered[-1] if delivered else None


def _cost(result: Mapping[str, Any], records: list[dict[str, Any]]) -> Cost:
    speeds = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    return Cost(
        seconds=result.get("seconds"),
        device=result.get("device") or "",
        device_seconds=result.get("device_seconds"),
        tokens=result.get("tokens") or last_tokens(records) or None,
        tokens_per_second=result.get("tokens_per_second") or (speeds[-1] if speeds else None),
        peak_memory_bytes=result.get("peak_memory_bytes"),
        money=result.get("cost"),
    )
