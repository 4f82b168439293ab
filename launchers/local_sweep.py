"""The jobs of a sweep on this machine: one after the other on a CPU, one per GPU, or packed."""

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llmkit import rundir
from llmkit.config.launcher_schema import PackedLauncherConfig
from llmkit.errors import ConfigError
from llmkit.launchers.job_record import ENDED, JobRecord, record_end
from llmkit.launchers.local import (
    Process,
    devices_for,
    exit_code,
    forwarded_signals,
    record_start,
    start_process,
    start_worker,
    visible_gpus,
    worker_environment,
)
from llmkit.launchers.packed import packs
from llmkit.launchers.prepare import prepare
from llmkit.launchers.sweep import Job, Sweep
from llmkit.launchers.warm import WarmStarts


@dataclass
class _Running:
    jobs: list[Job]
    process: Process
    open_files: contextlib.ExitStack  # the locks of the run directories, and where the output goes
    gpus: list[str]
    is_pack: bool


class _Gpus:
    """The GPUs of this machine, and how many jobs of a sweep each one has.

    Only jobs of one process share one, where more of them are to run at a time than there are GPUs.
    """

    def __init__(self, names: Sequence[str], parallel: int):
        self._jobs = dict.fromkeys(names, 0)
        self._most = -(-parallel // len(names)) if names else 1

    def has_room(self, wanted: int) -> bool:
        """Whether a job that wants so many GPUs may start now; one that wants more than there are, to be told so."""
        free = sum(jobs < (self._most if wanted == 1 else 1) for jobs in self._jobs.values())
        return not self._jobs or free >= min(wanted, len(self._jobs))

    def take(self, wanted: int) -> list[str]:
        """The GPUs of a job that starts, those with the fewest jobs; all of them if it wants more than there are."""
        taken = sorted(self._jobs, key=lambda name: self._jobs[name])[:wanted]
        for name in taken:
            self._jobs[name] += 1
        return taken

    def give_back(self, names: Sequence[str]) -> None:
        """The job has ended."""
        for name in names:
            self._jobs[name] -= 1


def run_all(sweep: Sweep) -> None:
    """Run the jobs of a sweep that are waiting, one (of launcher=packed, one pack) per free device."""
    left = [job for job in sweep.jobs_of_this_command if job.status == "waiting"]
    if not left:
        return
    first = left[0].config
    names = visible_gpus() if first.hardware.device != "cpu" else []
    parallel = len(names) or 1
    if isinstance(first.launcher, PackedLauncherConfig):
        waiting = packs(left, devices=parallel)
    else:
        waiting, parallel = [[job] for job in left], first.launcher.max_parallel or parallel
    gpus = _Gpus(names, parallel)
    running: list[_Running] = []
    single = [pack[0].config for pack in waiting if len(pack) == 1]
    log = sweep.directory / rundir.PACK_LOG
    log.unlink(missing_ok=True)
    shown = 0
    with (
        forwarded_signals(sweep.directory / rundir.CONSOLE) as workers,
        WarmStarts(single, worker_environment() | ({} if names else _threads(parallel)), on_gpus=bool(names)) as warm,
    ):
        while running or (waiting and not workers.stopped):
            while waiting and len(running) < parallel and not workers.stopped:
                wanted = waiting[0][0].config.hardware.num_processes
                if not gpus.has_room(wanted) or not warm.is_ready(waiting[0][0].config):
                    break
                taken = gpus.take(wanted)
                threads = {} if names else _threads(parallel * wanted)
                if run := _start(sweep, waiting.pop(0), taken, threads, warm):
                    running.append(run)
                    workers.add(run.process)
                else:
                    gpus.give_back(taken)
            ended = [run for run in running if run.process.poll() is not None]
            shown = rundir.show_log(log, offset=shown)
            for run in running:
                _collect_ended(run, sweep)
            for run in ended:
                running.remove(run)
                workers.remove(run.process)
                gpus.give_back(run.gpus)
                run.open_files.close()
                for job in run.jobs:
                    code = exit_code(run.process.wait(), job.run_dir, stopped=workers.stopped)
                    record_end(job.run_dir, code)
                    sweep.collect(job, log=log if run.is_pack else None)
            time.sleep(0.05)


def _collect_ended(run: _Running, sweep: Sweep) -> None:
    """Note which runs of a pack have come to their ends, as it writes down, while others go on."""
    for job in list(run.jobs) if run.is_pack else []:
        if (record := JobRecord.read(job.run_dir)) and record.state == ENDED:
            run.jobs.remove(job)
            sweep.collect(job)


def _threads(processes: int) -> dict[str, str]:
    """The variables that share the cores among so many processes at a time.

    Two processes with a thread per core each wait for one another at every operation: seen 100 times slower.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(len(os.sched_getaffinity(0)) // processes, 1))}


def _start(
    sweep: Sweep, jobs: list[Job], gpus: list[str], threads: dict[str, str], warm: WarmStarts
) -> _Running | None:
    """Start the jobs in one process; one whose directory cannot be made ready fails. None if all have."""
    open_files = contextlib.ExitStack()
    locks: dict[Path, IO[str]] = {}
    env: dict[str, str] = {}
    for job in list(jobs):
        try:
            env = devices_for(job.config, gpus) | threads
            locks[job.run_dir] = open_files.enter_context(prepare(job.config, job.run_dir))
        except ConfigError as error:
            jobs.remove(job)
            sweep.fail(job, str(error))
    if not jobs:
        return None
    first = jobs[0]
    log = first.run_dir / rundir.CONSOLE if len(jobs) == 1 else sweep.directory / rundir.PACK_LOG
    output = open_files.enter_context(log.open("a", encoding="utf-8"))
    worker: Process | None
    if len(jobs) == 1:
        lock = locks[first.run_dir]
        worker = warm.start(
            first.config,
            "llmkit.worker",
            str(first.run_dir),
            environment=worker_environment() | env,
            inherited={"LLMKIT_LOCK_FD": lock.fileno()},
            output=output,
        )
        worker = worker or start_worker(first.config, first.run_dir, lock=lock, env=env, output=output)
    else:
        worker = start_process("llmkit.pack_worker", [*map(str, locks)], list(locks.values()), env, output)
    for job in jobs:
        record_start(job.config, job.run_dir, worker)
        sweep.record(job, status="running")
    return _Running(jobs, worker, open_files, gpus, is_pack=len(jobs) > 1)
