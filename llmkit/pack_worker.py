"""Runs several written configs together: `python -m llmkit.pack_worker RUN_DIR RUN_DIR ...`; see launchers/packed.py.

Each run leaves in its directory what it would leave alone, with what it says in its console.log.
"""

import contextlib
import sys
from pathlib import Path

from llmkit import rundir
from llmkit.cli import print_error
from llmkit.config import TrainConfig, load
from llmkit.errors import EXIT_DONE, EXIT_PREEMPTED, LlmkitError
from llmkit.failure import Failure
from llmkit.processes import end, stop_with_driver
from llmkit.training.pack.output import Output
from llmkit.training.stopping import StopRequest
from llmkit.worker import end_in_failure, merge_if_asked, no_garbage_collection, run_to_end, settle_in


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

        def work(config: TrainConfig, run_dir: Path) -> None:
            codes[run_dir] = run_to_end(config, run_dir, stop)

        pack = Pack(
            runs,
            work,
            width=runs[0][0].launcher.width,
            stop=stop,
            output=output,
            log=lambda run_dir: open_files.enter_context(
                (run_dir / rundir.CONSOLE).open("a", buffering=1, encoding="utf-8")
            ),
        )
        pack.run()
        for config, run_dir in runs:
            if run_dir not in codes:
                rundir.write_result(
                    run_dir, status="stopped", error=f"the sweep was stopped by {stop.signal} before it"
                )
                codes[run_dir] = EXIT_PREEMPTED
            elif codes[run_dir] == EXIT_DONE:
                codes[run_dir] = merge_if_asked(config, run_dir)
    worst = sorted(codes.values(), key=lambda code: (code == EXIT_DONE, code == EXIT_PREEMPTED))
    return worst[0]


if __name__ == "__main__":
    end(main())
