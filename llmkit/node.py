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
from llmkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, ConfigError, LlmkitError, Stopped
from llmkit.failure import Failure
from llmkit.hangup import keep_output
from llmkit.processes import stop_with_driver
from llmkit.remote import reach_with
from llmkit.training.stopping import ECHO, SIGNALS

# What torchrun would react to, if it were left to: it kills ranks that still save after half a minute. We hand on ours.
LEFT_TO_TORCHRUN = "SIGQUIT"
AT_ONCE = 5.0  # seconds within which ranks notice that another has crashed; torchrun tells the time in whole seconds


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
        self._ranks_have_ended = False

    def run(self) -> int:
        """Start the ranks and wait for them."""
        keep_output(self.run_dir / rundir.CONSOLE)
        self._watch_signals()
        (self.run_dir / rundir.RANKS).mkdir(exist_ok=True, parents=True)
        try:
            failed = self._launch()
        except LlmkitError as error:
            return self._end_in(Failure.of(error, self.config))
        self._ranks_have_ended = True
        if not failed:
            # Another machine's ranks leave the result, and its code, to the first.
            return EXIT_PREEMPTED if self.node_rank and self.asked is not None else EXIT_DONE
        if all(process.exitcode == EXIT_PREEMPTED for process in failed):
            return self._stopped()
        return self._explain(failed)

    def _stopped(self) -> int:
        """The first rank has written the result, unless it was stopped before there was one: then it has said why."""
        why = None if self.node_rank else failure.first_left(self.run_dir, [0])
        if why is None or rundir.read_result(self.run_dir) is not None:
            return EXIT_PREEMPTED
        return self._end_in(why)

    def _launch(self) -> list[Any]:
        """torchrun's records of the ranks that failed first; none if all ended as they should."""
        environment = self._environment()
        os.environ.update(environment)
        # Its own reports of what failed: a page for each rank, and the reason is not in it.
        logging.disable(logging.ERROR)
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous import RendezvousError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        _check_gpus(self.config, environment["LLMKIT_RANKS"])
        several = self.config.hardware.num_nodes > 1
        if several:
            print(f"{'machines':<10} waiting for all {self.config.hardware.num_nodes} at {self.rendezvous}", flush=True)
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
        except (RendezvousError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise LlmkitError(
                f"hardware.rendezvous={self.rendezvous}: the machines did not find one another there ({reason}). It is "
                "a free port of the first machine, by a name that all of them know it by."
            ) from error
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

    def _watch_signals(self) -> None:
        """Hand signals on from a thread of its own: this one may wait for other machines inside torch, and not hear."""
        hear, tell = os.pipe()
        os.set_blocking(tell, False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.set_wakeup_fd(tell)

        def watch() -> None:
            while True:
                for number in os.read(hear, 16):
                    if number in SIGNALS:
                        self._hand_on(number)

        threading.Thread(target=watch, daemon=True).start()

    def _hand_on(self, number: int) -> None:
        """Ask all ranks to stop; asked once more, end them at once."""
        if self.asked is not None and number != signal.SIGINT and time.monotonic() - self.asked < ECHO:
            return
        again, self.asked = self.asked is not None, self.asked or time.monotonic()  # first: the next may come meanwhile
        if again:
            _send(signal.SIGKILL, _children())
        else:
            threading.Thread(target=self._stop_ranks, args=(number,), daemon=True).start()

    def _stop_ranks(self, number: int) -> None:
        """Send a signal to every rank once, to those that are only being started too; without any, end this process."""
        told: set[int] = set()
        while True:
            new = set(_children()) - told
            _send(number, new)
            told |= new
            time.sleep(0.2)
            assert self.asked is not None
            if not told and not self._ranks_have_ended and time.monotonic() - self.asked > ECHO:
                reason = f"stopped by {signal.Signals(number).name} before its processes had started."
                code = self._end_in(Failure.of(Stopped(reason), self.config))
                sys.stdout.flush()
                os._exit(code)  # the main thread may wait inside torch, where nothing wakes it

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
        # A crash long after another rank has failed is only of one that could not go on without it.
        led = crashed and (why is None or crashed[0].timestamp < why.time + AT_ONCE)
        if led or (killed and why is None):
            self._end_like((crashed or killed)[0])
        why = why or Failure(
            problems=[f"a rank ended with exit code {first[0].exitcode}; see {self.run_dir / rundir.RANKS}"],
            status="failed",
            exit_code=EXIT_FAILED,
        )
        return self._end_in(why)

    def _end_in(self, why: Failure) -> int:
        """Tell why, and on the first machine leave a result that says it too; returns the exit code."""
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


def _check_gpus(config: TrainConfig, device: str) -> None:
    """Raise ConfigError if this machine has fewer GPUs than the run is to have processes on it."""
    import torch

    wanted, there = config.hardware.num_processes, torch.cuda.device_count() if device == "cuda" else 0
    if device == "cuda" and there < wanted:
        instead = f"hardware.num_processes={there}" if there else "hardware=cpu"
        raise ConfigError(
            f"hardware.num_processes={wanted}: {rundir.host()} has {there} GPU{'s' if there != 1 else ''} for them, "
            f"and each takes one; use {instead}, or more machines (hardware.num_nodes=)."
        )


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
