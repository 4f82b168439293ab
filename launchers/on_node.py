"""What a cluster's job does on a node: start the run, hand signals on, and say whether it was interrupted.

Runs inside the job, once per node. All it is told is the run directory and its place in the job; it writes job.json as
it goes, so that the driver need not be there.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit import rundir
from llmkit.config import TrainConfig, load
from llmkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED
from llmkit.launchers.devices import devices_of
from llmkit.launchers.job_record import ENDED, INTERRUPTED, RUNNING, JobRecord
from llmkit.launchers.local import worker_environment
from llmkit.training.checkpoints.manifest import latest
from llmkit.training.stopping import SIGNALS

# Whoever started the job holds the run directory's lock until job.json is written; and where a node was given up by the
# scheduler, what it ran there may need this long to be ended.
PATIENCE = 600.0  # seconds
SECONDS_PER_SAMPLE = 10.0  # between two looks at the GPUs
# A run that is preempted again and again before it has made another checkpoint would never end.
MOST_FRUITLESS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One node's place in a job."""

    rank: int = 0
    nodes: int = 1
    rendezvous: str | None = None  # HOST:PORT where the nodes of a job meet
    host: str = ""


def was_preempted(code: int) -> bool:
    """Whether a run that ended so has been asked to stop, and has saved."""
    return code == EXIT_PREEMPTED


def run_on_node(run_dir: Path, place: Place, *, is_interrupted: Callable[[int], bool] = was_preempted) -> int:
    """Run this node's part of a run to its end; returns the exit code of the contract.

    Of a run that was interrupted the record says so, and no more: whoever called this one has it queued again.

    Args:
        is_interrupted: whether a run that ended with this exit code is to go on elsewhere; asked on the first node.
    """
    job = _Job(run_dir, place)
    for number in SIGNALS:
        signal.signal(number, job.stop)
    return job.run(is_interrupted)


def node_command(run_dir: Path, place: Place) -> list[str]:
    """The command that is one node of a run."""
    command = [sys.executable, "-m", "llmkit.node", str(run_dir)]
    if place.rendezvous:
        command += ["--node-rank", str(place.rank), "--rendezvous", place.rendezvous]
    return command


class _Job:
    def __init__(self, run_dir: Path, place: Place):
        self.run_dir, self.place = run_dir, place
        self.child: subprocess.Popen | None = None
        self.asked: int | None = None  # the first signal that asked for a stop

    def stop(self, number: int, _frame: Any) -> None:
        """Hand on the first request: more of them come with every preemption, and a second one ends a run at once."""
        if self.asked is None:
            self.asked = number
            if self.child is not None and self.child.poll() is None:
                self.child.send_signal(number)

    def run(self, is_interrupted: Callable[[int], bool]) -> int:
        if self.place.rank:
            return self._run()
        self._wait_for_the_directory()
        record = JobRecord.read(self.run_dir)
        assert record is not None, "the driver writes it before it lets go of the lock"
        if rundir.is_over(rundir.read_result(self.run_dir)):
            record.state, record.exit_code = ENDED, EXIT_DONE  # on a node that had been given up
            record.write(self.run_dir)
            return EXIT_DONE
        record.state, record.host, record.process = RUNNING, self.place.host or os.uname().nodename, os.getpid()
        record.starts, record.exit_code = record.starts + 1, None
        (self.run_dir / rundir.RESULT).unlink(missing_ok=True)  # of the start before
        record.write(self.run_dir)
        before = latest(self.run_dir)
        code = self._run(record)
        record.fruitless = record.fruitless + 1 if latest(self.run_dir) == before else 0
        goes_on = code != EXIT_DONE and is_interrupted(code) and record.fruitless < MOST_FRUITLESS
        record.state, record.exit_code = INTERRUPTED if goes_on else ENDED, code
        record.write(self.run_dir)
        return code

    def _run(self, record: JobRecord | None = None) -> int:
        if self.asked is not None:
            return EXIT_PREEMPTED
        name = Path(rundir.CONSOLE)
        log = self.run_dir / (f"{name.stem}.node-{self.place.rank}{name.suffix}" if self.place.rank else name)
        with log.open("a", encoding="utf-8") as output:
            # In this process group, which is what a scheduler without cgroups ends.
            self.child = subprocess.Popen(
                node_command(self.run_dir, self.place),
                env=worker_environment() | _threads(load(self.run_dir)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            if self.asked is not None:  # while it was being started
                self.child.send_signal(self.asked)
            code = self._wait(record)
        return self._killed(-code) if code < 0 else code

    def _wait(self, record: JobRecord | None) -> int:
        """Wait for the run; where it works on GPUs, its record says now and then how busy and how full they are."""
        assert self.child is not None
        while True:
            try:
                return self.child.wait(timeout=SECONDS_PER_SAMPLE)
            except subprocess.TimeoutExpired:
                if record is not None and (device := devices_of(self.child.pid)):
                    record.device = device
                    record.write(self.run_dir)

    def _killed(self, number: int) -> int:
        """The run was ended by a signal and could say nothing itself."""
        if self.place.rank == 0 and rundir.read_result(self.run_dir) is None:
            saved = latest(self.run_dir)
            if self.asked is not None:
                there = f"{saved.name} is saved" if saved else "before a step was saved"
                rundir.write_result(
                    self.run_dir, status="preempted" if saved else "stopped", error=f"ended at once: {there}"
                )
                return EXIT_PREEMPTED
            name = signal.Signals(number).name
            hint = " (out of memory?)" if number == signal.SIGKILL else ""
            rundir.write_result(self.run_dir, status="failed", error=f"ended by {name}{hint}")
        return EXIT_PREEMPTED if self.asked is not None else EXIT_FAILED

    def _wait_for_the_directory(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while rundir.is_locked(self.run_dir) and time.monotonic() < deadline and self.asked is None:
            time.sleep(0.2)


def _threads(config: TrainConfig) -> dict[str, str]:
    """Threads for the cores that the job was given, where nothing else says how many."""
    cores = os.environ.get("SLURM_CPUS_PER_TASK")
    if cores is None or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(int(cores) // config.hardware.num_processes, 1))}
