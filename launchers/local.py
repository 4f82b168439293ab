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
from typing import IO, Any

from llmkit import rundir
from llmkit.config import TrainConfig, save
from llmkit.config.launcher_schema import LocalLauncherConfig, PackedLauncherConfig
from llmkit.config.resolve import in_group
from llmkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, EXIT_WRONG_INPUT, ConfigError
from llmkit.hangup import keep_output
from llmkit.launchers.job_record import ENDED, RUNNING, JobRecord, now
from llmkit.launchers.packed import packs
from llmkit.launchers.prepare import is_finished, prepare
from llmkit.launchers.sweep import Job, Sweep
from llmkit.training.checkpoints.manifest import latest
from llmkit.training.stopping import ECHO, SIGNALS

MOST_PER_CORE = 4  # processes of one run without a GPU; enough to try a larger group on a small machine


def run_here(config: TrainConfig, run_dir: Path) -> int:
    """Run one config to its end on this terminal; returns the worker's exit code."""
    if config.hardware.node_rank and config.hardware.num_nodes > 1:
        return _take_part(config, run_dir)
    if is_finished(config, run_dir):
        return EXIT_DONE
    if isinstance(config.launcher, LocalLauncherConfig) and config.launcher.max_parallel is not None:
        print("warning: launcher.max_parallel has no effect on a single run; it is for sweeps (-m).", file=sys.stderr)
    env = _devices(config, [] if config.hardware.device == "cpu" else _visible_gpus())
    with prepare(config, run_dir) as lock, _forwarded_signals(run_dir / rundir.CONSOLE) as workers:
        for line in _other_machines(config, run_dir):
            print(line, flush=True)
        worker = start_worker(config, run_dir, lock=lock, env=env)
        _record(run_dir, worker)
        workers.add(worker)
        code = _exit_code(worker.wait(), run_dir, stopped=workers.stopped)
        _record_end(run_dir, code)
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
        _check_cores(wanted)
        return {}
    if wanted > len(gpus):
        raise ConfigError(
            f"hardware.num_processes={wanted}: there are {len(gpus)} GPUs for it here ({', '.join(gpus)}), "
            f"one for each process; use at most {len(gpus)}, more machines (hardware.num_nodes=), or hardware=cpu."
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[:wanted])}


def _check_cores(processes: int) -> None:
    """Raise ConfigError for far more processes than cores, which would take the machine's memory and get nowhere."""
    cores = len(os.sched_getaffinity(0))
    if processes > MOST_PER_CORE * cores:
        raise ConfigError(
            f"hardware.num_processes={processes}: this machine has no GPU, and {cores} CPU "
            f"core{'s' if cores > 1 else ''}; more than {MOST_PER_CORE * cores} processes would only wait for one "
            f"another. Use at most {cores} to gain from it."
        )
    if processes > cores:
        print(
            f"warning: hardware.num_processes={processes} on {cores} CPU core{'s' if cores > 1 else ''}: "
            "they take turns, which is slower than one process.",
            file=sys.stderr,
        )


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
    words = [str(run_dir)]
    if hardware.rendezvous and hardware.num_nodes > 1:
        words += ["--node-rank", str(hardware.node_rank), "--rendezvous", hardware.rendezvous]
    if hardware.node_rank and hardware.num_nodes > 1:
        words += ["--config", str(run_dir / rundir.RANKS / f"node-{hardware.node_rank}")]
    module = "llmkit.node" if in_group(config) else "llmkit.worker"
    return _start_process(module, words, [lock] if lock else [], env, output)


def _start_process(
    module: str, words: list[str], locks: list[IO[str]], env: dict[str, str] | None, output: IO[Any] | None
) -> subprocess.Popen:
    environment = worker_environment() | (env or {})
    descriptors = [lock.fileno() for lock in locks]
    if locks:
        environment["LLMKIT_LOCK_FD"] = " ".join(map(str, descriptors))
    return subprocess.Popen(
        [sys.executable, "-m", module, *words],
        env=environment,
        pass_fds=descriptors,
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


class _Workers(list[subprocess.Popen]):
    """The workers that run now, and whether a signal asked them to stop."""

    stopped = False

    def add(self, worker: subprocess.Popen) -> None:
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
    jobs: list[Job]
    process: subprocess.Popen
    open_files: contextlib.ExitStack  # the locks of the run directories, and where the output goes
    gpus: list[str]


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
    names = _visible_gpus() if first.hardware.device != "cpu" else []
    parallel = len(names) or 1
    if isinstance(first.launcher, PackedLauncherConfig):
        waiting = packs(left, devices=parallel)
    else:
        waiting, parallel = [[job] for job in left], first.launcher.max_parallel or parallel
    gpus = _Gpus(names, parallel)
    running: list[_Running] = []
    with _forwarded_signals(sweep.directory / rundir.CONSOLE) as workers:
        while running or (waiting and not workers.stopped):
            while waiting and len(running) < parallel and not workers.stopped:
                wanted = waiting[0][0].config.hardware.num_processes
                if not gpus.has_room(wanted):
                    break
                taken = gpus.take(wanted)
                if run := _start(sweep, waiting.pop(0), taken, parallel):
                    running.append(run)
                    workers.add(run.process)
                else:
                    gpus.give_back(taken)
            for run in running:
                _collect_ended(run, sweep)
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                workers.remove(run.process)
                gpus.give_back(run.gpus)
                run.open_files.close()
                for job in run.jobs:
                    code = _exit_code(run.process.returncode, job.run_dir, stopped=workers.stopped)
                    _record_end(job.run_dir, code)
                    sweep.collect(job)
            time.sleep(0.05)


def _collect_ended(run: _Running, sweep: Sweep) -> None:
    """Note which runs of a pack have come to their ends while others go on."""
    for job in list(run.jobs) if len(run.jobs) > 1 else []:
        if result := rundir.read_result(job.run_dir):
            run.jobs.remove(job)
            _record_end(job.run_dir, EXIT_DONE if result["status"] == "completed" else EXIT_FAILED)
            sweep.collect(job)


def _start(sweep: Sweep, jobs: list[Job], gpus: list[str], parallel: int) -> _Running | None:
    """Start the jobs in one process; one whose directory cannot be made ready fails. None if all have."""
    open_files = contextlib.ExitStack()
    locks: dict[Path, IO[str]] = {}
    env: dict[str, str] = {}
    for job in list(jobs):
        try:
            env = _devices(job.config, gpus)
            locks[job.run_dir] = open_files.enter_context(prepare(job.config, job.run_dir))
        except ConfigError as error:
            jobs.remove(job)
            sweep.fail(job, str(error))
    if not jobs:
        return None
    first = jobs[0]
    if not gpus and "OMP_NUM_THREADS" not in os.environ:
        # Two processes with a thread per core each wait for one another at every operation: seen 100 times slower.
        together = parallel * first.config.hardware.num_processes
        env["OMP_NUM_THREADS"] = str(max(len(os.sched_getaffinity(0)) // together, 1))
    place = first.run_dir if len(jobs) == 1 else sweep.directory
    output = open_files.enter_context((place / rundir.CONSOLE).open("a", encoding="utf-8"))
    if len(jobs) == 1:
        worker = start_worker(first.config, first.run_dir, lock=locks[first.run_dir], env=env, output=output)
    else:
        worker = _start_process("llmkit.pack_worker", [*map(str, locks)], list(locks.values()), env, output)
    for job in jobs:
        _record(job.run_dir, worker)
        sweep.record(job, status="running")
    return _Running(jobs, worker, open_files, gpus)


def _record(run_dir: Path, worker: subprocess.Popen) -> None:
    """Write down who runs it, for `llmkit jobs`; whether it still does, the directory's lock tells."""
    job_id, host = str(worker.pid), rundir.host()
    record = JobRecord(launcher="local", job_id=job_id, state=RUNNING, submitted=now(), host=host, process=worker.pid)
    record.write(run_dir)


def _record_end(run_dir: Path, code: int) -> None:
    """Write down that it has ended."""
    record = JobRecord.read(run_dir)
    assert record is not None, "written when it started"
    record.state, record.exit_code = ENDED, code
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
