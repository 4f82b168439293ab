"""The runs of one page: which they are, how each stands, what tells them from each other, and which is best."""

import dataclasses
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit import rundir
from llmkit.config.files import NOT_COMPARED, flat_values, recorded_values
from llmkit.config.nodes import OPTIONAL_NODES
from llmkit.config.schema import TrainConfig
from llmkit.errors import ConfigError
from llmkit.launchers.cluster import SCHEDULERS
from llmkit.launchers.job_record import ENDED, JobRecord
from llmkit.launchers.overview import Overview
from llmkit.launchers.sweep import MAXIMIZED, swept_values
from llmkit.reporting.runs import COMPLETED, Run, State, read_run

MOST_COLUMNS = 6  # keys that runs which are no sweep may differ in and still be told apart by them
PLACES = ("name", "run_dir", "derived", "checkpoint.remote", "tracking.group")  # each run has its own
LOSABLE = ("running", "unknown")  # what a record may still say of a run whose process is gone
LOST = "nothing runs it, and it left no result"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A key of the config that is not the same in all runs, or not what it is without being set."""

    key: str
    values: list[Any]  # of each run; in front of that of a single run the default


@dataclass(slots=True, kw_only=True)
class Report:
    """What a page shows."""

    places: list[Path]  # as they were named
    sweep: Path | None  # if all runs are of one
    objective: str | None  # None where the runs do not have the same
    runs: list[Run]  # ranked ones first, the best at the top
    written: datetime.datetime

    @property
    def ranked(self) -> list[Run]:
        """The finished runs with a figure to rank them by, the best first."""
        return [run for run in self.runs if run.rank is not None]

    @property
    def winner(self) -> Run | None:
        """The best run; of runs that cannot be ranked none, unless there is only one."""
        if len(self.runs) == 1:
            return self.runs[0] if self.runs[0].is_completed else None
        return next(iter(self.ranked), None)

    @property
    def swept_keys(self) -> list[str]:
        """What the runs differ in, in the order it was asked for."""
        return list(dict.fromkeys(key for run in self.runs for key in run.swept))

    def count(self, *statuses: str) -> int:
        """How many runs are in one of these states."""
        return sum(run.state.status in statuses for run in self.runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A run that is to be read: where it is, and what its sweep's record says of it."""

    directory: Path
    sweep: Path | None = None
    overrides: tuple[str, ...] = ()
    status: str = "unknown"
    error: str = ""


def read_report(places: Sequence[Path]) -> Report:
    """Read the runs and sweeps in these directories, as they are now.

    Raises ConfigError for what is neither, and where there is nothing to show yet.
    """
    jobs = list({job.directory.resolve(): job for place in places for job in _jobs(place)}.values())
    sweeps = {job.sweep for job in jobs}
    sweep = places[0] if len(places) == 1 and sweeps != {None} else None
    objective = _objective(jobs)
    states = _states(jobs)
    runs = [
        read_run(job.directory, name=name, state=state, objective=objective)
        for job, name, state in zip(jobs, _names(jobs), states, strict=True)
    ]
    if all(run.is_blank for run in runs):
        what = f"none of its {len(runs)} runs has" if len(runs) > 1 else "the run has not"
        raise ConfigError(f"{' '.join(map(str, places))}: nothing to show yet; {what} logged a step.")
    _tell_apart(runs, jobs if sweep else None)
    return Report(
        places=list(places),
        sweep=sweep,
        objective=objective,
        runs=_rank(runs, objective),
        written=datetime.datetime.now().astimezone(),
    )


def differences(runs: Sequence[Run]) -> list[Difference]:
    """What differs between these runs' configs; of a single run what it sets, beside what it would be otherwise."""
    if len(runs) == 1:
        return _set_by_user(runs[0].config)
    keys = sorted({key for run in runs for key in run.config} - set(PLACES))
    found = [Difference(key=key, values=[run.config.get(key) for run in runs]) for key in keys]
    return [one for one in found if any(value != one.values[0] for value in one.values)]


def _set_by_user(config: dict[str, Any]) -> list[Difference]:
    defaults = flat_values(dataclasses.asdict(TrainConfig()))
    for node, kind in OPTIONAL_NODES.items():
        defaults |= flat_values(dataclasses.asdict(kind()), f"{node}.")
    left_open = {*PLACES, *(config.get("derived") or ())}
    return [
        Difference(key=key, values=[defaults.get(key), value])
        for key, value in config.items()
        if key not in left_open and value != defaults.get(key) and not key.startswith("launcher")
    ]


def _jobs(place: Path) -> list[_Job]:
    """The runs in a directory: itself, or those of the sweep that it holds."""
    if (place / rundir.CONFIG).exists():
        return [_Job(directory=place)]
    record = rundir.read_json(place / rundir.SWEEP)
    if record is None:
        within = [f"{path.parent}" for path in sorted(place.glob(f"*/{rundir.CONFIG}"))[:3]]
        within += [f"{path.parent}" for path in sorted(place.glob(f"*/{rundir.SWEEP}"))[:3]]
        hint = f" Below it: {', '.join(within)}." if within else ""
        raise ConfigError(f"{place}: neither a run ({rundir.CONFIG}) nor a sweep ({rundir.SWEEP}).{hint}")
    return [
        _Job(
            directory=place / Path(job["run_dir"]).name,
            sweep=place,
            overrides=tuple(job["overrides"]),
            status=job["status"],
            error=job["error"] or "",
        )
        for job in record["jobs"]
    ]


def _names(jobs: Sequence[_Job]) -> list[str]:
    """The last part of each directory, as much more of it as the jobs of several sweeps need, or all."""
    together = len({job.sweep for job in jobs}) == 1
    paths = [job.directory.resolve() for job in jobs]
    parts = [1 if job.sweep is None or together else 2 for job in jobs]
    names = ["/".join(path.parts[-count:]) for path, count in zip(paths, parts, strict=True)]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _objective(jobs: Sequence[_Job]) -> str | None:
    """What the runs are compared by; None if they have different figures for it."""
    named = set()
    for job in jobs:
        if job.sweep is not None:
            named.add((rundir.read_json(job.sweep / rundir.SWEEP) or {}).get("objective"))
        else:
            named.add(recorded_values(job.directory).get("objective"))
    return named.pop() if len(named) == 1 else None


def _states(jobs: Sequence[_Job]) -> list[State]:
    """How each stands. Only of those that may have something to come is more asked than their result."""
    ended = {job.directory: result for job in jobs if (result := _result_of_ended(job.directory)) is not None}
    rest = [job.directory for job in jobs if job.directory not in ended and (job.directory / rundir.CONFIG).exists()]
    views = dict(zip(rest, Overview().look(rest), strict=True))
    states = []
    for job in jobs:
        if (result := ended.get(job.directory)) is not None:
            reason, was_behind = _first_line(result.get("error")), bool(result.get("early_stop"))
            states.append(State(status=result["status"], reason=reason, was_behind=was_behind))
        elif (view := views.get(job.directory)) is None or (view.state == "unknown" and job.status not in LOSABLE):
            states.append(State(status=job.status, reason=_first_line(job.error)))
        else:
            reason = view.detail or _first_line(job.error) or (LOST if view.state == "unknown" else "")
            states.append(State(status=view.state, reason=reason, steps=view.steps))
    return states


def _result_of_ended(run_dir: Path) -> dict[str, Any] | None:
    """The result of a run that is done, or that nobody is to go on with by himself."""
    result = rundir.read_result(run_dir)
    if result is None or result["status"] == COMPLETED:
        return result
    record = JobRecord.read(run_dir)
    scheduled = record is not None and record.launcher in SCHEDULERS and record.state != ENDED
    return None if scheduled or rundir.is_locked(run_dir) else result


def _first_line(text: str | None) -> str:
    return text.splitlines()[0] if text else ""


def _tell_apart(runs: Sequence[Run], jobs: Sequence[_Job] | None) -> None:
    """Note in each run the values that it was swept over, or, where they are no sweep's, what they differ in."""
    if jobs is not None:
        values = swept_values([job.overrides for job in jobs])
        for run, job, swept in zip(runs, jobs, values, strict=True):
            run.swept = swept
            assert run.directory == job.directory
        return
    if len(runs) == 1:
        return
    asked = [one for one in differences(runs) if not _is_left_aside(one.key, runs)]
    alike = len({str([one.values[number] for one in asked]) for number in range(len(runs))}) < len(runs)
    if 0 < len(asked) <= MOST_COLUMNS and not alike:
        words = [one.key.rpartition(".")[2] for one in asked]
        for number, run in enumerate(runs):
            run.swept = {
                word if words.count(word) == 1 else one.key: str(one.values[number])
                for word, one in zip(words, asked, strict=True)
            }


def _is_left_aside(key: str, runs: Sequence[Run]) -> bool:
    places = any(key == name or key.startswith(f"{name}.") for name in NOT_COMPARED)
    return places or any(key in (run.config.get("derived") or ()) for run in runs)


def _rank(runs: list[Run], objective: str | None) -> list[Run]:
    """Number the finished runs from the best on, and put them first."""
    done = [run for run in runs if objective and run.is_completed and run.objective is not None]
    done.sort(key=lambda run: run.objective or 0.0, reverse=objective in MAXIMIZED)
    for rank, run in enumerate(done, start=1):
        run.rank = rank
    return [*done, *(run for run in runs if run.rank is None)]
