"""What all launchers share that hand runs to a scheduler: queue, attach to what is queued already, follow, detach.

A launcher of this kind is a module of this package, named in SCHEDULERS, with a class that is a Scheduler and

    connect(config.launcher) -> Scheduler    raises ConfigError where there is no such scheduler

What it queues is `on_node.run_on_node` on a run directory that `prepare` has made ready. The driver may end at any
time: all that is known of a job is in its run directory (job.json, result.json) and in the scheduler.
"""

import contextlib
import functools
import importlib
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmkit import rundir
from llmkit.config import TrainConfig, load
from llmkit.errors import EXIT_DONE, ConfigError, LlmkitError
from llmkit.launchers.job_record import ENDED, INTERRUPTED, QUEUED, RUNNING, JobRecord, now
from llmkit.launchers.prepare import is_finished, prepare
from llmkit.launchers.sweep import Sweep

GONE = "gone=true"  # the word of `llmkit jobs cancel` that gives up jobs whose scheduler does not answer
GLANCE = 0.5  # seconds between two looks at the run directories; the scheduler is asked every launcher.poll_s


class SchedulerError(LlmkitError):
    """The scheduler does not answer. Jobs go on without it; so does whoever asks again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A job that the scheduler has taken."""

    job_id: str
    log: Path | None = None  # where its own words go, beside console.log


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the scheduler says of a job: `state` is queued, running or ended; `detail` why, where or how."""

    state: str
    detail: str = ""


class Scheduler(Protocol):
    """What a launcher needs of a scheduler."""

    @property
    def outlives_driver(self) -> bool:
        """Whether jobs go on when the process that has queued them ends."""

    def check(self, config: TrainConfig) -> None:
        """Raise ConfigError, naming what is legal, for what the scheduler would refuse."""

    def submit(self, configs: Sequence[TrainConfig], run_dirs: Sequence[Path]) -> list[Submitted]:
        """Queue one job per run, all or none; the directories are absolute. Raises ConfigError if it is refused."""

    def seen(self, job_ids: Collection[str]) -> dict[str, Seen]:
        """What becomes of these jobs; one that it no longer knows is left out. Raises SchedulerError."""

    def cancel(self, job_ids: Collection[str]) -> None:
        """End these jobs; those that have ended are no error. Raises SchedulerError."""


SCHEDULERS = ("slurm", "ray")  # names of modules of this package


def connect(launcher: Any) -> Scheduler:
    """The scheduler of a `config.launcher`. Raises ConfigError where it cannot be had."""
    assert launcher.name in SCHEDULERS, launcher.name
    return importlib.import_module(f"llmkit.launchers.{launcher.name}").connect(launcher)


def ready(configs: Sequence[TrainConfig]) -> None:
    """Check all that can be checked before anything is queued. Raises ConfigError with all problems.

    Runs of a sweep that are queued already have been checked.
    """
    for config in configs:
        if config.run_dir:
            refuse_held_elsewhere(config, Path(config.run_dir))
    configs = [config for config in configs if not (config.run_dir and _is_queued(Path(config.run_dir)))]
    for config in {repr((config.launcher, config.hardware)): config for config in configs}.values():
        connect(config.launcher).check(config)
    if wanted := [config for config in configs if config.launcher.preflight]:
        from llmkit.launchers.preflight import preflight

        preflight(wanted)


def run_there(config: TrainConfig, run_dir: Path) -> int:
    """Queue one run, or attach to its job, and follow it; returns the exit code of the contract."""
    if is_finished(config, run_dir):
        return EXIT_DONE
    refuse_held_elsewhere(config, run_dir)
    scheduler = connect(config.launcher)
    record = at_work(scheduler, [run_dir]).get(run_dir)
    if record is not None:
        print(f"job     {record.job_id} runs {run_dir} already ({record.state}); nothing new is queued", flush=True)
    else:
        ready([config])
        (record,) = _queue(scheduler, [(config, run_dir)])
        print(f"queued  {run_dir} as job {record.job_id}", flush=True)
    if not config.launcher.wait:
        _say_how(run_dir)
        return EXIT_DONE
    with _detachable(scheduler, run_dir):
        return _follow_run(scheduler, run_dir, record, poll=config.launcher.poll_s)


def queue_sweep(sweep: Sweep) -> None:
    """Queue the jobs of a sweep that wait, and find those that are queued already."""
    jobs = [job for job in sweep.jobs_of_this_command if job.status == "waiting"]
    if not jobs:
        return
    scheduler = connect(jobs[0].config.launcher)
    queued = at_work(scheduler, [job.run_dir for job in jobs])
    new = [job for job in jobs if job.run_dir not in queued]
    for job in jobs:
        if record := queued.get(job.run_dir):
            sweep.note(job, status=record.state, detail=f"job {record.job_id} is at it already")
    records = _queue(scheduler, [(job.config, job.run_dir) for job in new]) if new else []
    for job, record in zip(new, records, strict=True):
        sweep.note(job, status=QUEUED, detail=f"job {record.job_id}")
    if not jobs[0].config.launcher.wait:
        _say_how(sweep.directory)


def follow_sweep(sweep: Sweep) -> None:
    """Note what becomes of a sweep's jobs until all have ended, then rank them."""
    open_jobs = {job.run_dir: job for job in sweep.jobs_of_this_command if job.status in (QUEUED, RUNNING)}
    if open_jobs:
        launcher = next(iter(open_jobs.values())).config.launcher
        scheduler = connect(launcher)
        with _detachable(scheduler, sweep.directory):
            for run_dir, seen in changes(scheduler, list(open_jobs), poll=launcher.poll_s):
                job = open_jobs[run_dir]
                if seen.state == ENDED:
                    sweep.collect(job, ended=seen.detail)
                else:
                    sweep.note(job, status=seen.state, detail=seen.detail)
    sweep.finish()


def refuse_held_elsewhere(config: TrainConfig, run_dir: Path) -> None:
    """Raise ConfigError if a job of another launcher than the config's is queued or running for a run, or may be."""
    record = handed_over(run_dir)
    if record is None or record.launcher == config.launcher.name:
        return  # what runs on this machine holds the directory's lock
    held = f"{run_dir} is in the hands of {record.launcher} (job {record.job_id})"
    try:
        seen = connect(load(run_dir).launcher).seen([record.job_id]).get(record.job_id)
    except LlmkitError as error:
        raise ConfigError(f"{held}, which cannot be asked: {error} {if_gone(run_dir)}") from error
    if seen is not None and seen.state != ENDED:
        raise ConfigError(f"{held}: launcher={record.launcher} follows it, llmkit jobs cancel {run_dir} ends it.")


def if_gone(directory: Path) -> str:
    """The way out for runs whose scheduler will never answer again."""
    return f"If it is gone for good, and its jobs with it, llmkit jobs cancel {directory} {GONE} gives them up."


def _is_queued(run_dir: Path) -> bool:
    """Whether the last that was heard of a run's job is that it is queued or runs."""
    record = handed_over(run_dir)
    return record is not None and record.state != INTERRUPTED


def handed_over(run_dir: Path) -> JobRecord | None:
    """The record of a job that was handed to a scheduler and has not said that it has ended."""
    record = JobRecord.read(run_dir)
    return record if record is not None and record.launcher in SCHEDULERS and record.state != ENDED else None


def at_work(scheduler: Scheduler, run_dirs: Sequence[Path]) -> dict[Path, JobRecord]:
    """The jobs that are queued or running for these runs, those that have one. Their state is the scheduler's.

    Raises SchedulerError, with the way out, if runs have been handed over and it does not answer.
    """
    records = {run_dir: record for run_dir in run_dirs if (record := handed_over(run_dir)) is not None}
    try:
        told = scheduler.seen([record.job_id for record in records.values()]) if records else {}
    except SchedulerError as error:
        first, *others = records
        raise SchedulerError(f"{error} {if_gone(first.parent if others else first)}") from error
    found = {}
    for run_dir, record in records.items():
        seen = told.get(record.job_id)
        if seen is not None and seen.state != ENDED:
            record.state = seen.state
            found[run_dir] = record
    return found


def changes(
    scheduler: Scheduler, run_dirs: Sequence[Path], *, poll: float, glance: Callable[[], None] = lambda: None
) -> Iterator[tuple[Path, Seen]]:
    """Yield each run and what has become of its job, whenever that changes, until all have ended.

    A job says itself that it starts and ends (job.json), so the scheduler need not be asked often: it knows of jobs
    that were killed.

    Args:
        poll: seconds between two questions to the scheduler.
        glance: called at every look at the run directories.
    """
    states: dict[Path, str] = dict.fromkeys(run_dirs, QUEUED)
    asked = -math.inf
    told: dict[str, Seen] = {}
    while states:
        glance()
        if time.monotonic() - asked >= poll:
            job_ids = [record.job_id for record in _records(states).values()]
            told = _patient(functools.partial(scheduler.seen, job_ids), poll)
            asked = time.monotonic()
        records = _records(states)  # only now: a job that is gone has written before why it ended
        for run_dir, record in records.items():
            seen = judged(record, told.get(record.job_id))
            if seen.state != states[run_dir]:
                states[run_dir] = seen.state
                yield run_dir, seen
            if seen.state == ENDED:
                del states[run_dir]
        for run_dir in states.keys() - records.keys():
            del states[run_dir]
            yield run_dir, Seen(state=ENDED, detail=f"its {rundir.JOB} has been removed")
        if states:
            time.sleep(min(GLANCE, poll))


def _records(run_dirs: Iterable[Path]) -> dict[Path, JobRecord]:
    """The records of those that have one."""
    return {run_dir: record for run_dir in run_dirs if (record := JobRecord.read(run_dir)) is not None}


def judged(record: JobRecord, told: Seen | None) -> Seen:
    """What a job's record and its scheduler say together; `told` is None where the scheduler does not know the job."""
    if record.state == ENDED:
        return Seen(
            state=ENDED, detail=record.ended or (told.detail if told is not None and told.state == ENDED else "")
        )
    if told is None:
        return Seen(state=ENDED, detail="its scheduler no longer knows it")
    if told.state == QUEUED and record.state != QUEUED:
        return Seen(state=QUEUED, detail=told.detail or "queued again")
    if told.state == RUNNING:
        where = f"on {record.host}" if record.state == RUNNING and record.host else told.detail
        return Seen(state=RUNNING, detail=where)
    return told


def exit_code_of(run_dir: Path) -> int:
    """The exit code of the contract for a run whose job has ended."""
    record = JobRecord.read(run_dir)
    if record is not None and record.exit_code is not None:
        return record.exit_code
    return rundir.exit_code(rundir.read_result(run_dir))


def _follow_run(scheduler: Scheduler, run_dir: Path, record: JobRecord, *, poll: float) -> int:
    log = run_dir / rundir.CONSOLE
    # Of an earlier job; of one that is attached to, all is shown.
    shown = log.stat().st_size if record.starts == 0 and log.exists() else 0

    def show() -> None:
        nonlocal shown
        shown = rundir.show_log(run_dir / rundir.CONSOLE, offset=shown)

    seen = Seen(state=QUEUED)
    for _, seen in changes(scheduler, [run_dir], poll=poll, glance=show):
        if seen.state != ENDED:
            print(f"{seen.state:<7} {run_dir}   {seen.detail}", flush=True)
    show()
    if rundir.read_result(run_dir) is None:
        print(f"error: {lost(run_dir, seen.detail)}", file=sys.stderr)
    return exit_code_of(run_dir)


def lost(run_dir: Path, ended: str) -> str:
    """The message for a job that has ended and left no result."""
    record = JobRecord.read(run_dir)
    logs = [str(run_dir / rundir.CONSOLE)] if (run_dir / rundir.CONSOLE).exists() else []
    logs += [record.log] if record is not None and record.log else []
    return f"its job ended without a result{f' ({ended})' if ended else ''}; see {' and '.join(logs) or run_dir}"


def _queue(scheduler: Scheduler, runs: Sequence[tuple[TrainConfig, Path]]) -> list[JobRecord]:
    """Make the run directories ready and hand them over together; a job waits for its lock, which is ours till then."""
    with contextlib.ExitStack() as locks:
        try:
            for config, run_dir in runs:
                locks.enter_context(prepare(config, run_dir))
            taken = scheduler.submit([config for config, _ in runs], [run_dir.absolute() for _, run_dir in runs])
        except LlmkitError:
            locks.close()
            for _, run_dir in runs:
                if run_dir.exists():
                    rundir.discard_unused(run_dir)
            raise
        records = []
        for (config, run_dir), job in zip(runs, taken, strict=True):
            log = str(job.log) if job.log else None
            record = JobRecord(launcher=config.launcher.name, job_id=job.job_id, submitted=now(), log=log)
            record.write(run_dir)
            records.append(record)
    return records


def _patient(ask: Callable[[], dict[str, Seen]], pause: float) -> dict[str, Seen]:
    """The scheduler's answer, however long it takes: the jobs do not end because it is being restarted."""
    silent = False
    while True:
        try:
            return ask()
        except SchedulerError as error:
            if not silent:
                print(f"warning: {error} Asking again.", file=sys.stderr, flush=True)
            silent = True
            time.sleep(pause)


@contextlib.contextmanager
def _detachable(scheduler: Scheduler, directory: Path) -> Iterator[None]:
    """Ctrl-C ends the driver and, where the scheduler outlives it, no job; it says how to go on from there."""
    try:
        yield
    except KeyboardInterrupt:
        if scheduler.outlives_driver:
            print("\ndetached: the jobs go on.", flush=True)
            _say_how(directory)
        else:
            print("\nstopped: what runs saves its step and ends; the same command goes on from there.", flush=True)
        raise


def _say_how(directory: Path) -> None:
    """The commands for a run or a sweep that nobody follows any more."""
    sweep = (directory / rundir.SWEEP).exists()
    print(f"look    llmkit jobs list {directory}     or llmkit jobs watch {directory}")
    print(f"log     llmkit jobs logs {f'{directory}/JOB' if sweep else directory} -f")
    print(f"cancel  llmkit jobs cancel {directory}")
    if sweep:
        print(f"rank    llmkit jobs collect {directory}")
    print("The same command again follows what is queued.", flush=True)
