"""Look at runs that were started anywhere, follow, cancel and collect them: `llmkit jobs [list|watch|logs|...]`.

From any shell: all that is known of a run is in its directory and with its scheduler.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from llmkit import rundir
from llmkit.cli import guarded
from llmkit.config import load
from llmkit.errors import EXIT_DONE, ConfigError, LlmkitError
from llmkit.launchers.cluster import GONE, SCHEDULERS, connect, handed_over, if_gone
from llmkit.launchers.collecting import collect_sweep
from llmkit.launchers.job_record import CANCELLED, ENDED, GIVEN_UP, QUEUED, JobRecord
from llmkit.launchers.overview import OPEN, RUNS, Overview, directory_named, runs_below

HELP = """\
llmkit jobs [list] [DIR ...]      every run below DIR (runs/, unless you say otherwise): state, step, loss, speed
llmkit jobs watch [DIR ...]       the same, live, until none is queued or running
llmkit jobs logs RUN [-f]         what a run has said; -f: follow it to its end
llmkit jobs cancel RUN|SWEEP      stop it: what runs saves its step first, and the same command goes on later
llmkit jobs cancel RUN|SWEEP gone=true   give it up where its Slurm or Ray is gone for good and cannot be asked
llmkit jobs collect SWEEP         write sweep.json, the ranking, the plot and the report from what the runs left

For every launcher, from any shell: all that is known of a run is in its directory and with its scheduler.
RUN and SWEEP are directories, or their names below runs/.

Examples:
  llmkit jobs
  llmkit jobs logs runs/alpha/r=4 -f
  llmkit jobs cancel alpha"""

FOLLOW = ("-f", "--follow")
SECONDS = 2.0  # between two looks of `watch`; a scheduler is asked at each


def main(argv: list[str] | None = None) -> int:
    """The verb; returns the exit code."""
    return guarded(_jobs, argv)


def _jobs(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(HELP)
        return EXIT_DONE
    action = argv[0] if argv and argv[0] in ACTIONS else "list"
    words = argv[1:] if argv and argv[0] in ACTIONS else argv
    follow = [word for word in words if word in FOLLOW]
    gone = [word for word in words if word == GONE]
    if strange := [word for word in words if word.startswith("-") and word not in FOLLOW]:
        raise ConfigError(f"{strange[0]}: unknown switch; see llmkit jobs --help.")
    if follow and action != "logs":
        raise ConfigError(f"{follow[0]} goes with llmkit jobs logs; llmkit jobs watch follows many runs.")
    if gone and action != "cancel":
        raise ConfigError(f"{GONE} goes with llmkit jobs cancel.")
    names = [word for word in words if word not in (*FOLLOW, GONE)]
    if action in ("list", "watch"):
        return ACTIONS[action](names)
    if len(names) != 1:
        raise ConfigError(f"llmkit jobs {action} takes one run or sweep; see llmkit jobs --help.")
    return ACTIONS[action](names + follow + gone)


def _list(names: list[str]) -> int:
    from llmkit.launchers.job_table import console, job_table

    run_dirs = _runs(names)
    if not run_dirs:
        print(f"There are no runs in {', '.join(names) or RUNS}.")
        return EXIT_DONE
    console().print(job_table(Overview().look(run_dirs)))
    return EXIT_DONE


def _watch(names: list[str]) -> int:
    from llmkit.launchers.job_table import watch

    overview = Overview()
    watch(lambda: overview.look(_runs(names)), seconds=SECONDS)
    return EXIT_DONE


def _logs(words: list[str]) -> int:
    run_dir = _directory(words[0])
    if not (run_dir / rundir.CONFIG).exists():
        raise ConfigError(
            f"{run_dir} holds a sweep; its runs: {', '.join(path.name for path in runs_below([run_dir]))}."
        )
    overview, shown = Overview(), rundir.show_log(run_dir / rundir.CONSOLE)
    if words[1:]:
        pause = SECONDS
        while overview.look([run_dir])[0].state in OPEN:
            time.sleep(pause)
            shown = rundir.show_log(run_dir / rundir.CONSOLE, offset=shown)
        shown = rundir.show_log(run_dir / rundir.CONSOLE, offset=shown)
    if not shown:
        record = JobRecord.read(run_dir)
        if record is None or record.launcher not in SCHEDULERS:
            raise ConfigError(f"{run_dir}: its log went to the terminal that it was started from; no file has it.")
        own = f"; the scheduler's own log is {record.log}" if record.log else ""
        print(f"{run_dir} has said nothing yet ({record.state}){own}.", file=sys.stderr)
    return EXIT_DONE


def _cancel(words: list[str]) -> int:
    directory = _directory(words[0])
    run_dirs = runs_below([directory])
    if words[1:]:
        return _give_up(run_dirs)
    under_way = [view for view in Overview().look(run_dirs) if view.state in OPEN]
    if rundir.is_locked(directory) and not (directory / rundir.CONFIG).exists():  # a sweep of this machine
        _end_process(directory, rundir.lock_holder(directory))
        print(f"cancel  {directory}: its driver is told to stop")
        return EXIT_DONE
    if not under_way:
        print(f"{directory}: nothing is queued or running.")
        return EXIT_DONE
    for view in under_way:
        record, config = JobRecord.read(view.run_dir), load(view.run_dir)
        if record is None or record.launcher not in SCHEDULERS:
            if mates := _trained_with(view.run_dir, record, besides={one.run_dir for one in under_way}):
                (view.run_dir / rundir.CANCEL).touch()
                print(f"cancel  {view.run_dir}: told to stop; packed with it, and going on: {', '.join(mates)}")
                continue
            here = record.process if record is not None and record.host == rundir.host() else None
            _end_process(view.run_dir, here or rundir.lock_holder(view.run_dir))
        else:
            try:
                connect(config.launcher).cancel([record.job_id])
            except LlmkitError as error:
                raise LlmkitError(f"{view.run_dir} is not cancelled: {error} {if_gone(directory)}") from error
            if view.state == QUEUED:  # nobody is there to write it
                record.state, record.ended = ENDED, CANCELLED
                record.write(view.run_dir)
        print(f"cancel  {view.run_dir}   {view.launcher} {view.job_id} ({view.state})", flush=True)
    return EXIT_DONE


def _trained_with(run_dir: Path, record: JobRecord | None, *, besides: Collection[Path]) -> list[str]:
    """The other runs of its pack that go on, `besides` not among them; none for one that has its process to itself."""
    if record is None:
        return []
    there = (path for path in runs_below([run_dir.parent]) if path not in besides)
    others = [path for path in there if not (path / rundir.CANCEL).exists()]
    return [
        path.name
        for path in others
        if (other := JobRecord.read(path))
        and other.state != ENDED
        and (other.host, other.process) == (record.host, record.process)
    ]


def _give_up(run_dirs: Sequence[Path]) -> int:
    """Note that jobs have ended whose scheduler is gone. Raises ConfigError if it is there, or one of the jobs."""
    records = {run_dir: record for run_dir in run_dirs if (record := handed_over(run_dir)) is not None}
    overview = Overview()
    overview.look(list(records))
    for run_dir, record in records.items():
        if not overview.is_silent(load(run_dir)):
            raise ConfigError(f"{record.launcher} answers when it is asked for {run_dir}; leave {GONE} out.")
        if rundir.is_locked(run_dir):
            raise ConfigError(f"{run_dir} is being written to: its job is not gone.")
    for run_dir, record in records.items():
        record.state, record.ended = ENDED, GIVEN_UP
        record.write(run_dir)
        print(f"gone    {run_dir}   {record.launcher} {record.job_id}", flush=True)
    if not records:
        print("nothing is in the hands of a scheduler.")
    return EXIT_DONE


def _end_process(run_dir: Path, process: int | None) -> None:
    """Ask a process of this machine to save and stop. Raises ConfigError where that cannot be known."""
    if process is None:
        raise ConfigError(f"{run_dir} is not run by a process of this machine; cancel it where it runs.")
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(process, signal.SIGTERM)


def _collect(words: list[str]) -> int:
    directory = _directory(words[0])
    if not (directory / rundir.SWEEP).exists():
        raise ConfigError(f"{directory} is no sweep: it holds no {rundir.SWEEP}. llmkit jobs list shows its runs.")
    return collect_sweep(directory)


def _runs(names: list[str]) -> list[Path]:
    return runs_below([_directory(name) for name in names] or ([RUNS] if RUNS.is_dir() else []))


def _directory(name: str) -> Path:
    return directory_named(name, words=ACTIONS)


ACTIONS: dict[str, Callable[[list[str]], int]] = {
    "list": _list,
    "watch": _watch,
    "logs": _logs,
    "cancel": _cancel,
    "collect": _collect,
}

if __name__ == "__main__":
    sys.exit(main())
