"""`launcher=local`: runs on this machine, each in a fresh process that dies with its driver."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from llmkit.config import TrainConfig, resolve
from llmkit.errors import EXIT_DONE, EXIT_PREEMPTED, ConfigError
from llmkit.launchers.prepare import finished_result, prepare
from llmkit.launchers.sweep import Job, Sweep


def run_here(config: TrainConfig, run_dir: Path) -> int:
    """Run one config to its end on this terminal; returns the worker's exit code."""
    if result := finished_result(config, run_dir):
        print(
            f"{run_dir} holds this run, finished: {result['objective_name']} {result['objective']:.4g}. Nothing to do."
        )
        return EXIT_DONE
    with prepare(config, run_dir) as lock, _forwarded_signals() as workers:
        worker = start_worker(run_dir, lock=lock)
        workers.append(worker)
        return _exit_code(worker.wait(), run_dir)


def start_worker(
    run_dir: Path, *, lock: IO[str], env: dict[str, str] | None = None, output: IO[Any] | None = None
) -> subprocess.Popen:
    """Start `llmkit.worker` on a prepared run directory; it inherits the lock.

    Its own process group, so that Ctrl-C reaches it once, from the driver, and not twice.
    """
    environment = os.environ | {"LLMKIT_LOCK_FD": str(lock.fileno()), "LLMKIT_DRIVER": str(os.getpid())} | (env or {})
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        # Beside another busy program, libgomp's default (300,000 turns) has threads wait for one another so long that
        # a step takes 15 times as long; 10,000 costs nothing alone.
        environment["GOMP_SPINCOUNT"] = "10000"
    # A bare checkout is importable only from its own directory: the worker gets the driver's place on the path.
    package_parent = str(Path(sys.modules["llmkit"].__path__[0]).parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, "-m", "llmkit.worker", str(run_dir)],
        env=environment,
        pass_fds=(lock.fileno(),),
        process_group=0,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
    )


def _exit_code(returncode: int, run_dir: Path) -> int:
    if returncode < 0:
        name = signal.Signals(-returncode).name
        hint = " (the system is out of memory?)" if name == "SIGKILL" else ""
        print(f"error: the worker of {run_dir} was ended by {name}{hint}.", file=sys.stderr)
        return 1
    return returncode


@contextlib.contextmanager
def _forwarded_signals() -> Iterator[list[subprocess.Popen]]:
    """Hand SIGINT and SIGTERM to the workers, who save and stop; the driver waits for them."""
    workers: list[subprocess.Popen] = []

    def forward(number: int, _frame: Any) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield workers
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen
    lock: IO[str]
    output: IO[str]
    device: str | None


class LocalLauncher(Launcher):
    """Hydra's launcher for `-m`: one job per free device."""

    sweep: ClassVar[Sweep | None] = None  # what the verb reads the exit code from

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `launch`."""
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs; every one gets a record, so that a failed one hides nothing."""
        directory = Path(self.config.hydra.sweep.dir)
        (directory / "multirun.yaml").unlink(missing_ok=True)  # Hydra's copy of what each job's config.yaml says
        configs = [
            resolve(self.context.config_loader.load_sweep_config(self.config, list(overrides)))
            for overrides in job_overrides
        ]
        try:
            sweep = Sweep.plan(directory, job_overrides, configs)
        except ConfigError:
            with contextlib.suppress(OSError):  # not empty: an earlier sweep's
                directory.rmdir()
            raise
        LocalLauncher.sweep = sweep
        _run_all(sweep)
        sweep.finish()
        returns = []
        for job in sweep.jobs_of_this_command:
            record = JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)
            record.return_value = job.objective
            returns.append(record)
        return returns


def _run_all(sweep: Sweep) -> None:
    waiting = [job for job in sweep.jobs_of_this_command if job.status == "waiting"]
    if not waiting:
        return
    first = waiting[0].config
    devices: list[str | None] = list(_visible_gpus()) if first.hardware.device != "cpu" else []
    slots = devices or [None]
    if first.launcher.max_parallel:
        slots = [slots[i % len(slots)] for i in range(first.launcher.max_parallel)]
    threads = max((os.cpu_count() or 1) // len(slots), 1) if not devices else None
    running: list[_Running] = []
    with _forwarded_signals() as workers:
        stopping = False
        while running or (waiting and not stopping):
            while waiting and slots and not stopping:
                running.append(_start(waiting.pop(0), slots.pop(0), threads))
                workers.append(running[-1].process)
                sweep.record(running[-1].job, status="running")
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                workers.remove(run.process)
                slots.append(run.device)
                run.lock.close()
                run.output.close()
                code = _exit_code(run.process.returncode, run.job.run_dir)
                stopping = stopping or code == EXIT_PREEMPTED
                sweep.collect(run.job)
            time.sleep(0.05)


def _start(job: Job, device: str | None, threads: int | None) -> _Running:
    lock = prepare(job.config, job.run_dir)
    output = open(job.run_dir / "console.log", "w", encoding="utf-8")  # noqa: SIM115 - closed when the job ends
    env = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
    if threads and "OMP_NUM_THREADS" not in os.environ:
        # Two jobs with a thread per core each wait for one another at every operation: seen 100 times slower.
        env["OMP_NUM_THREADS"] = str(threads)
    return _Running(job, start_worker(job.run_dir, lock=lock, env=env, output=output), lock, output, device)


def _visible_gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them; found without importing torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (FileNotFoundError, subprocess.SubprocessError):
        return []
    return [str(index) for index, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]
