"""Runs several written configs together: `python -m llmkit.pack_worker RUN_DIR RUN_DIR ...`; see launchers/packed.py.

Each run leaves in its directory what it would leave alone, with what it says in its console.log.
"""

import contextlib
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextvars import copy_context
from pathlib import Path
from typing import TextIO

from llmkit import rundir
from llmkit.cli import print_error
from llmkit.config import TrainConfig, load
from llmkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, LlmkitError, Stopped
from llmkit.failure import Failure
from llmkit.launchers.job_record import record_end
from llmkit.processes import end, stop_with_driver
from llmkit.training.pack.output import Output
from llmkit.training.stopping import StopRequest
from llmkit.worker import (
    end_in_failure,
    interrupt_at_once,
    is_to_be_merged,
    merge_run,
    no_garbage_collection,
    run_to_end,
    settle_in,
    tell_how_to_merge,
)


def main(argv: list[str] | None = None) -> int:
    """Run all to their ends; returns the exit code of the first that failed, else 75 if one was stopped, else 0."""
    run_dirs = [Path(word) for word in (sys.argv[1:] if argv is None else argv)]
    try:
        stop_with_driver()
        locks = rundir.inherited_locks() or [rundir.lock(run_dir) for run_dir in run_dirs]
        runs = [(load(run_dir), run_dir) for run_dir in run_dirs]
    except LlmkitError as error:
        print_error(error)
        return error.exit_code
    stop = StopRequest().watch()
    output = Output(sys.stdout)
    sys.stdout = sys.stderr = output  # before libraries are imported, whose logs keep the stream that they find
    try:
        settle_in(runs[0][0])
    except Exception as error:
        return max(end_in_failure(Failure.of(error, config), config, run_dir) for config, run_dir in runs)
    with contextlib.ExitStack() as open_files:
        for lock in locks:
            open_files.enter_context(lock)
        with no_garbage_collection():
            from llmkit.training.pack.pack import Pack

        codes: dict[Path, int] = {}

        def work(config: TrainConfig, run_dir: Path, stop: StopRequest) -> None:
            if stop.signal:
                why = Stopped(f"stopped by {stop.signal} before it began; the same command runs it.")
                codes[run_dir] = end_in_failure(Failure.of(why, config), config, run_dir)
            else:
                codes[run_dir] = run_to_end(config, run_dir, stop)
            if codes[run_dir] != EXIT_DONE or not is_to_be_merged(config, run_dir):
                record_end(run_dir, codes[run_dir])

        logs = {
            run_dir: open_files.enter_context((run_dir / rundir.CONSOLE).open("a", buffering=1, encoding="utf-8"))
            for _, run_dir in runs
        }
        pack = Pack(
            runs, work, width=runs[0][0].launcher.width, stop=stop, output=output, log=lambda run_dir: logs[run_dir]
        )
        pack.run()
        if asked := [one for one in runs if codes[one[1]] == EXIT_DONE and is_to_be_merged(*one)]:
            for run_dir, code in _merged(asked, stop, output, logs):
                codes[run_dir] = code
                record_end(run_dir, code)
    worst = sorted(codes.values(), key=lambda code: (code == EXIT_DONE, code == EXIT_PREEMPTED))
    return worst[0]


def _merged(
    runs: list[tuple[TrainConfig, Path]], stop: StopRequest, output: Output, logs: Mapping[Path, TextIO]
) -> Iterator[tuple[Path, int]]:
    """Merge one after the other, each telling of it in its log, until a stop is asked for; what came of each."""
    left = deque(runs)
    interrupt_at_once()
    try:
        while left and not stop.signal:
            config, run_dir = left[0]
            code = copy_context().run(_merge, config, run_dir, output, logs[run_dir])
            left.popleft()
            yield run_dir, code
    except KeyboardInterrupt:
        print("error: the merges were stopped.", file=sys.stderr)
    for _, run_dir in left:
        tell_how_to_merge(run_dir)
        yield run_dir, EXIT_FAILED


def _merge(config: TrainConfig, run_dir: Path, output: Output, log: TextIO) -> int:
    output.goes_to(log)
    return merge_run(config, run_dir)


if __name__ == "__main__":
    end(main())
