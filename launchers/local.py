"""`launcher=local`: runs on this machine, each in a fresh process that dies with its driver."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from llmkit import rundir
from llmkit.config import TrainConfig, save
from llmkit.config.resolve import in_group
from llmkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, EXIT_WRONG_INPUT, ConfigError
from llmkit.hangup import keep_output
from llmkit.launchers.job_record import RUNNING, JobRecord, now
from llmkit.launchers.prepare import is_finished, prepare
from llmkit.launchers.sweep import Job, Sweep
from llmkit.training.checkpoints.manifest import latest
from llmkit.training.stopping import ECHO, SIGNALS

if TYPE_CHECKING:
    from llmkit.launchers.warm import Forked, WarmStarts

Process: TypeAlias = "subprocess.Popen | Forked"


def run_here(config: TrainConfig, run_dir: Path) -> int:
    """Run one config to its end on this terminal; returns the worker's exit code."""
    if config.hardware.node_rank:
        return _take_part(config, run_dir)
    if is_finished(config, run_dir):
        return EXIT_DONE
    if config.launcher.max_parallel is not None:
        print("warning: launcher.max_parallel has no effect on a single run; it is for sweeps (-m).", file=sys.stderr)
    env = _devices(config, [] if config.hardware.device == "cpu" else _visible_gpus())
    with prepare(config, run_dir) as lock, _forwarded_signals(run_dir / rundir.CONSOLE) as workers:
        for line in _other_machines(config, run_dir):
            print(line, flush=True)
        worker = start_worker(config, run_dir, lock=lock, env=env)
        _record(run_dir, worker)
        workers.add(worker)
        code = _exit_code(worker.wait(), run_dir, stopped=workers.stopped)
    if code == EXIT_WRONG_INPUT:
        rundir.discard_unused(run_dir)
    return code


def _take_part(config: TrainConfig, run_dir: Path) -> int:
    """This machine's part of a run that belongs to another machine, whose directory it leaves to that one."""
    env = _devices(config, [] if config.hardware.device == "cpu" else _visible_gpus())
    own = run_dir / rundir.RANKS / f"node-{config.hardware.node_rank}"
    own.mkdir(parents=True, exist_ok=True)
    save(config, own)
    number = (config.hardware.node_rank or 0) + 1
    print(f"{'machine':<10} {number} of {config.hardware.num_nodes}; logs in {own.parent}", flush=True)
    with _forwarded_signals(own / rundir.CONSOLE) as workers:
        worker = start_worker(config, run_dir, env=env)
        workers.add(worker)
        code = worker.wait()
    return code if code >= 0 else EXIT_PREEMPTED if workers.stopped else EXIT_FAILED


def _other_machines(config: TrainConfig, run_dir: Path) -> list[str]:
    """What to type on the other machines of the run."""
    if config.hardware.num_nodes == 1:
        return []
    command = shlex.join(["llmkit", "train", str(run_dir.absolute() / rundir.CONFIG)])
    return [
        f"machine {rank + 1} of {config.hardware.num_nodes}: {command} hardware.node_rank={rank} "
        f"run_dir={run_dir.absolute()}"
        for rank in range(1, config.hardware.num_nodes)
    ]


def _devices(config: TrainConfig, gpus: Sequence[str]) -> dict[str, str]:
    """The variables that give a run its GPUs, one for each process; none where there are no GPUs.

    Raises ConfigError if there are fewer.
    """
    wanted = config.hardware.num_processes
    if not gpus:
        return {}
    if wanted > len(gpus):
        raise ConfigError(
            f"hardware.num_processes={wanted}: there are {len(gpus)} GPUs for it here ({', '.join(gpus)}), "
            f"one for each process; use at most {len(gpus)}, more machines (hardware.num_nodes=), or hardware=cpu."
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[:wanted])}


def start_worker(
    config: TrainConfig,
    run_dir: Path,
    *,
    lock: IO[str] | None = None,
    env: dict[str, str] | None = None,
    output: IO[Any] | None = None,
) -> subprocess.Popen:
    """Start `llmkit.node` (of one process: `llmkit.worker`) on a prepared run directory; it inherits the lock.

    Its own process group, so that Ctrl-C reaches it once, from the driver, and not twice.
    """
    hardware = config.hardware
    environment = worker_environment() | (env or {})
    if lock:
        environment["LLMKIT_LOCK_FD"] = str(lock.fileno())
    command = [sys.executable, "-m", "llmkit.worker", str(run_dir)]
    if in_group(config):
        command[2] = "llmkit.node"
    if hardware.rendezvous and hardware.num_nodes > 1:
        command += ["--node-rank", str(hardware.node_rank), "--rendezvous", hardware.rendezvous]
    if hardware.node_rank:
        command += ["--config", str(run_dir / rundir.RANKS / f"node-{hardware.node_rank}")]
    return subprocess.Popen(
        command,
        env=environment,
        pass_fds=(lock.fileno(),) if lock else (),
        process_group=0,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
    )


def worker_environment() -> dict[str, str]:
    """The environment of a worker that this process starts, which is its driver."""
    environment = os.environ | {"LLMKIT_DRIVER": str(os.getpid())}
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        # Beside another busy program, libgomp's default (300,000 turns) has threads wait for one another so long that
        # a step takes 15 times as long; 10,000 costs nothing alone.
        environment["GOMP_SPINCOUNT"] = "10000"
    # A bare checkout is importable only from its own directory: the worker gets the driver's place on the path.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_parent(), os.environ.get("PYTHONPATH", "")]))
    return environment


def package_parent() -> str:
    """The directory that llmkit is imported from."""
    return str(Path(sys.modules["llmkit"].__path__[0]).parent)


def _exit_code(returncode: int, run_dir: Path, *, stopped: bool) -> int:
    """The worker's code; one that was ended before it could save its step says so in a result of its own."""
    if returncode < 0 and stopped:
        if rundir.read_result(run_dir) is None:
            saved = latest(run_dir)
            there = f"; {saved.name} is saved" if saved else " before a step was saved"
            rundir.write_result(run_dir, status="preempted" if saved else "stopped", error=f"ended at once{there}")
            print(f"{run_dir}: ended at once{there}; llmkit resume {run_dir} goes on.", file=sys.stderr)
        return EXIT_PREEMPTED
    if returncode < 0:
        name = signal.Signals(-returncode).name
        hint = " (the system is out of memory?)" if name == "SIGKILL" else ""
        print(f"error: the worker of {run_dir} was ended by {name}{hint}.", file=sys.stderr)
        return 1
    return returncode


class _Workers(list[Process]):
    """The workers that run now, and whether a signal asked them to stop."""

    stopped = False

    def add(self, worker: Process) -> None:
        """A worker that was started while a signal came in is stopped too."""
        self.append(worker)
        if self.stopped:
            worker.terminate()


@contextlib.contextmanager
def _forwarded_signals(log: Path) -> Iterator[_Workers]:
    """Hand requests to stop to the workers, who save and stop; the driver waits for them.

    A closed terminal is no such request: what would have been shown there goes to `log`.
    """
    workers = _Workers()
    asked = 0.0

    def forward(number: int, _frame: Any) -> None:
        nonlocal asked
        if workers.stopped and number != signal.SIGINT and time.monotonic() - asked < ECHO:
            return
        if not workers.stopped:
            asked = time.monotonic()
            message = "stopping when the step is done and saved; once more: at once\n"
            with contextlib.suppress(OSError):  # the terminal may have gone
                os.write(sys.stderr.fileno(), message.encode())  # print is not safe in a signal handler
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGKILL if workers.stopped else number)
        workers.stopped = True

    previous = {number: signal.signal(number, forward) for number in SIGNALS}
    previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    keep_output(log)
    try:
        yield workers
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass
class _Running:
    job: Job
    process: Process
    lock: IO[str]
    output: IO[str]
    devices: list[str | None]


def run_all(sweep: Sweep) -> None:
    """Run the jobs of a sweep that are waiting, one per free device."""
    from llmkit.launchers.warm import WarmStarts

    waiting = [job for job in sweep.jobs_of_this_command if job.status == "waiting"]
    if not waiting:
        return
    first = waiting[0].config
    devices: list[str | None] = list(_visible_gpus()) if first.hardware.device != "cpu" else []
    slots = devices or [None]
    if first.launcher.max_parallel:
        slots = [slots[i % len(slots)] for i in range(first.launcher.max_parallel)]
    total = len(slots)
    threads = {} if devices else _threads(len(slots))
    running: list[_Running] = []
    configs = [job.config for job in waiting]
    with (
        _forwarded_signals(sweep.directory / rundir.CONSOLE) as workers,
        WarmStarts(configs, worker_environment() | threads, on_gpus=bool(devices)) as warm,
    ):
        while running or (waiting and not workers.stopped):
            while waiting and slots and not workers.stopped:
                wanted = min(waiting[0].config.hardware.num_processes, total) if devices else 1
                if wanted > len(slots) or not warm.is_ready(waiting[0].config):
                    break
                job = waiting.pop(0)
                try:
                    running.append(_start(job, slots[:wanted], threads, warm))
                except ConfigError as error:
                    sweep.fail(job, str(error))
                    continue
                del slots[:wanted]
                workers.add(running[-1].process)
                sweep.record(job, status="running")
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                workers.remove(run.process)
                slots += run.devices
                run.lock.close()
                run.output.close()
                _exit_code(run.process.wait(), run.job.run_dir, stopped=workers.stopped)
                sweep.collect(run.job)
            time.sleep(0.05)


def _threads(jobs: int) -> dict[str, str]:
    """The variables that share the cores among so many jobs at a time.

    Two jobs with a thread per core each wait for one another at every operation: seen 100 times slower.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(len(os.sched_getaffinity(0)) // jobs, 1))}


def _start(job: Job, devices: list[str | None], threads: dict[str, str], warm: "WarmStarts") -> _Running:
    env = _devices(job.config, [device for device in devices if device is not None]) | threads
    lock = prepare(job.config, job.run_dir)
    output = open(job.run_dir / rundir.CONSOLE, "a", encoding="utf-8")  # noqa: SIM115 - closed when the job ends
    worker: Process | None = warm.start(
        job.config,
        "llmkit.worker",
        str(job.run_dir),
        environment=worker_environment() | env,
        inherited={"LLMKIT_LOCK_FD": lock.fileno()},
        output=output,
    )
    worker = worker or start_worker(job.config, job.run_dir, lock=lock, env=env, output=output)
    _record(job.run_dir, worker)
    return _Running(job, worker, lock, output, devices)


def _record(run_dir: Path, worker: Process) -> None:
    """Write down who runs it, for `llmkit jobs`; whether it still does, the directory's lock tells."""
    job_id, host = str(worker.pid), rundir.host()
    record = JobRecord(launcher="local", job_id=job_id, state=RUNNING, submitted=now(), host=host, process=worker.pid)
    record.write(run_dir)


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
