"""The processes of one run on one machine: `python -m llmkit.node RUN_DIR`. A launcher starts it on each machine.

One process is a worker itself. Several are a torchrun group of workers, which this one starts, hands signals on to, and
waits for; it says why they failed, once, and returns the exit code of the contract.

    python -m llmkit.node RUN_DIR [--node-rank R --rendezvous HOST:PORT] [--config DIR]

Every machine is given the rendezvous: a port on the first one (node rank 0) where the ranks find one another.
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmkit import failure, rundir, worker
from llmkit.cli import print_error
from llmkit.config import TrainConfig, load
from llmkit.config.resolve import in_group
from llmkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, LlmkitError
from llmkit.failure import Failure
from llmkit.hangup import keep_output
from llmkit.processes import stop_with_driver
from llmkit.remote import reach_with
from llmkit.training.stopping import ECHO, SIGNALS

# What torchrun would react to, if it were left to: it kills ranks that still save after half a minute. We hand on ours.
LEFT_TO_TORCHRUN = "SIGQUIT"


def main(argv: list[str] | None = None) -> int:
    """Run this machine's part of the run; returns the exit code of the contract."""
    words = _words(sys.argv[1:] if argv is None else argv)
    try:
        config = load(words.config or words.run_dir)
    except LlmkitError as error:
        print_error(error)
        return error.exit_code
    if not in_group(config):
        return worker.main([str(words.run_dir)])
    first = words.node_rank == 0
    try:
        stop_with_driver()
        # The other machines write nothing of the run but logs.
        lock = (rundir.inherited_lock() or rundir.lock(words.run_dir)) if first else contextlib.nullcontext()
    except LlmkitError as error:
        print_error(error)
        return error.exit_code
    with lock:
        return _Group(config, words.run_dir, node_rank=words.node_rank, rendezvous=words.rendezvous).run()


def _words(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m llmkit.node", description="Start one machine's part of a run.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--rendezvous", default=None, help="HOST:PORT on the first machine")
    parser.add_argument("--config", type=Path, default=None, help="directory of a config.yaml, if not RUN_DIR")
    return parser.parse_args(argv)


class _Group:
    """The ranks of this machine."""

    def __init__(self, config: TrainConfig, run_dir: Path, *, node_rank: int, rendezvous: str | None):
        self.config, self.run_dir, self.node_rank = config, run_dir, node_rank
        # Without another machine any free port will do.
        self.rendezvous = rendezvous or "localhost:0"
        self.asked: float | None = None  # when a signal first asked for a stop

    def run(self) -> int:
        """Start the ranks and wait for them."""
        keep_output(self.run_dir / rundir.CONSOLE)
        (self.run_dir / rundir.RANKS).mkdir(exist_ok=True, parents=True)
        import psutil  # noqa: F401 - not in a signal's handler, where another signal would find it half imported

        for number in SIGNALS:
            signal.signal(number, self._hand_on)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        failed = self._launch()
        if not failed:
            return EXIT_DONE
        if all(process.exitcode == EXIT_PREEMPTED for process in failed):
            return EXIT_PREEMPTED
        return self._explain(failed)

    def _launch(self) -> list[Any]:
        """torchrun's records of the ranks that failed first; none if all ended as they should."""
        environment = self._environment()
        os.environ.update(environment)
        # Its own reports of what failed: a page for each rank, and the reason is not in it.
        logging.disable(logging.ERROR)
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        several = self.config.hardware.num_nodes > 1
        launch = LaunchConfig(
            min_nodes=self.config.hardware.num_nodes,
            max_nodes=self.config.hardware.num_nodes,
            nproc_per_node=self.config.hardware.num_processes,
            run_id="llmkit",
            rdzv_backend="static" if several else "c10d",
            rdzv_endpoint=self.rendezvous,
            rdzv_configs={"rank": self.node_rank} if several else {},
            max_restarts=0,
            signals_to_handle=LEFT_TO_TORCHRUN,
        )
        try:
            elastic_launch(launch, sys.executable)("-m", "llmkit.worker", str(self.run_dir))
        except ChildFailedError as error:
            return list(error.failures.values())
        return []

    def _environment(self) -> dict[str, str]:
        """What the ranks need beside torchrun's own variables."""
        hardware = self.config.hardware
        environment = hardware.env | {"LLMKIT_RANKS": _device(self.config)}
        if environment["LLMKIT_RANKS"] == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            # A thread per core in every rank: they wait for one another at each operation.
            environment["OMP_NUM_THREADS"] = str(max(len(os.sched_getaffinity(0)) // hardware.num_processes, 1))
        if hardware.num_nodes == 1 and sys.platform.startswith("linux"):
            environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")  # whatever the host's name
        return environment

    def _hand_on(self, number: int, _frame: Any) -> None:
        """Ask all ranks to stop; asked once more, end them at once."""
        if self.asked is not None and number != signal.SIGINT and time.monotonic() - self.asked < ECHO:
            return
        again, self.asked = self.asked is not None, self.asked or time.monotonic()  # first: the next may come meanwhile
        if again:
            _send(signal.SIGKILL, _children())
        else:
            threading.Thread(target=_send_to_all, args=(number,), daemon=True).start()

    def _explain(self, failed: list[Any]) -> int:
        """Say why, and leave a result that says it too; returns the exit code."""
        ranks = self.config.hardware.num_processes
        there = range(self.node_rank * ranks, (self.node_rank + 1) * ranks)
        why = failure.first_left(
            self.run_dir, there if self.node_rank else range(ranks * self.config.hardware.num_nodes)
        )
        # torchrun ends the others once one has failed: first by SIGTERM, much later by SIGKILL.
        first = [process for process in failed if process.timestamp == min(one.timestamp for one in failed)]
        killed = [process for process in first if process.exitcode < 0]
        crashed = [process for process in killed if process.exitcode != -signal.SIGTERM]
        if crashed or (killed and why is None):
            self._end_like((crashed or killed)[0])
        why = why or Failure(
            problems=[f"a rank ended with exit code {first[0].exitcode}; see {self.run_dir / rundir.RANKS}"],
            status="failed",
            exit_code=EXIT_FAILED,
        )
        if self.node_rank:
            why.tell()
            return why.exit_code
        reach_with(self.config.storage)
        return worker.end_in_failure(why, self.config, self.run_dir)

    def _end_like(self, process: Any) -> None:
        """End as the rank has that a signal ended: whoever started us sees what became of it."""
        number = signal.Signals(-process.exitcode)
        if self.asked is None:
            rank = self.node_rank * self.config.hardware.num_processes + process.local_rank
            print(f"error: rank {rank} was ended by {number.name}.", file=sys.stderr, flush=True)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.pause()


def _device(config: TrainConfig) -> str:
    if config.hardware.device != "auto":
        return config.hardware.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _send_to_all(number: int) -> None:
    """Send a signal to every rank once, to those that are only being started too."""
    told: set[int] = set()
    while True:
        new = set(_children()) - told
        _send(number, new)
        told |= new
        time.sleep(0.2)


def _send(number: int, processes: Iterable[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def _children() -> list[int]:
    """The processes this one has started."""
    import psutil

    return [process.pid for process in psutil.Process().children()]


if __name__ == "__main__":
    sys.exit(main())
