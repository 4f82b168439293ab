"""Look at runs that were started anywhere, follow, cancel and collect them: `llmkit jobs [list|watch|logs|...]`.

From any shell: all that is known of a run is in its directory and with its scheduler.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from llmkit import rundir
from llmkit.cli import guarded
from llmkit.config import load
from llmkit.errors import EXIT_DONE, EXIT_FAILED, ConfigError, did_you_mean
from llmkit.launchers.cluster import SCHEDULERS, show_log
from llmkit.launchers.collecting import collect_sweep
from llmkit.launchers.job_record import CANCELLED, ENDED, QUEUED, JobRecord
from llmkit.launchers.overview import OPEN, Overview, runs_below

HELP = """\
llmkit jobs [list] [DIR ...]      every run below DIR (runs/, unless you say otherwise): state, step, loss, speed
llmkit jobs watch [DIR ...]       the same, live, until none is queued or running
llmkit jobs logs RUN [-f]         what a run has said; -f: follow it to its end
llmkit jobs cancel RUN|SWEEP      stop it: what runs saves its step first, and the same command goes on later
llmkit jobs collect SWEEP         write sweep.json, the ranking and the plot from what the runs have left

For every launcher, from any shell: all that is known of a run is in its directory and with its scheduler.
RUN and SWEEP are directories, or their names below runs/.

Examples:
  llmkit jobs
  llmkit jobs logs runs/alpha/r=4 -f
  llmkit jobs cancel alpha"""

RUNS = Path("runs")
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
    if strange := [word for word in words if word.startswith("-") and word not in FOLLOW]:
        raise ConfigError(f"{strange[0]}: unknown switch; see llmkit jobs --help.")
    if follow and action != "logs":
        raise ConfigError(f"{follow[0]} goes with llmkit jobs logs; llmkit jobs watch follows many runs.")
    names = [word for word in words if word not in FOLLOW]
    if action in ("list", "watch"):
        return ACTIONS[action](names)
    if len(names) != 1:
        raise ConfigError(f"llmkit jobs {action} takes one run or sweep; see llmkit jobs --help.")
    return ACTIONS[action](names + follow)


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
    overview, shown = Overview(), show_log(run_dir)
    if words[1:]:
        pause = SECONDS
        while overview.look([run_dir])[0].state in OPEN:
            time.sleep(pause)
            shown = show_log(run_dir, offset=shown)
        shown = show_log(run_dir, offset=shown)
    if not shown:
        record = JobRecord.read(run_dir)
        if record is None or record.launcher not in SCHEDULERS:
            raise ConfigError(f"{run_dir}: its log went to the terminal that it was started from; no file has it.")
        own = f"; the scheduler's own log is {record.log}" if record.log else ""
        print(f"{run_dir} has said nothing yet ({record.state}){own}.", file=sys.stderr)
    return EXIT_DONE


def _cancel(words: list[str]) -> int:
    directory, overview = _directory(words[0]), Overview()
    run_dirs = runs_below([directory])
    under_way = [view for view in overview.look(run_dirs) if view.state in OPEN]
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
            _end_process(view.run_dir, (record and record.process) or rundir.lock_holder(view.run_dir))
        else:
            if (scheduler := overview.scheduler(config)) is None:
                return EXIT_FAILED  # it has been said why
            scheduler.cancel([record.job_id])
            if view.state == QUEUED:  # nobody is there to write it
                record.state, record.ended = ENDED, CANCELLED
                record.write(view.run_dir)
        print(f"cancel  {view.run_dir}   {view.launcher} {view.job_id} ({view.state})", flush=True)
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
    """A directory as it is named, or below runs/. Raises ConfigError with the nearest name."""
    path = Path(name).expanduser()
    for candidate in (path, RUNS / name):
        if candidate.is_dir():
            return candidate
    known = [one.name for one in RUNS.iterdir() if one.is_dir()] if RUNS.is_dir() else []
    near = did_you_mean(name, [*known, *ACTIONS])
    raise ConfigError(f"{name}: there is no such run, sweep or directory (seen from {Path.cwd()}).{near}")


ACTIONS: dict[str, Callable[[list[str]], int]] = {
    "list": _list,
    "watch": _watch,
    "logs": _logs,
    "cancel": _cancel,
    "collect": _collect,
}

if __name__ == "__main__":
    sys.exit(main())
