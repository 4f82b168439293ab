"""`launcher=local`: runs on this machine, each in a fresh process that dies with its driver."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from llmkit import rundir
from llmkit.config import TrainConfig, save
from llmkit.config.resolve import in_group
from llmkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, EXIT_WRONG_INPUT, ConfigError
from llmkit.hangup import keep_output
from llmkit.launchers.job_record import RUNNING, JobRecord, now, record_end
from llmkit.launchers.prepare import is_finished, prepare
from llmkit.training.checkpoints.manifest import latest
from llmkit.training.stopping import ECHO, SIGNALS

if TYPE_CHECKING:
    from llmkit.launchers.warm import Forked

Process: TypeAlias = "subprocess.Popen | Forked"

MOST_PER_CORE = 4  # processes of one run without a GPU; enough to try a larger group on a small machine


def run_here(config: TrainConfig, run_dir: Path) -> int:
    """Run one config to its end on this terminal; returns the worker's exit code."""
    if config.hardware.node_rank and config.hardware.num_nodes > 1:
        return _take_part(config, run_dir)
    if is_finished(config, run_dir):
        return EXIT_DONE
    env = devices_for(config, [] if config.hardware.device == "cpu" else visible_gpus())
    with prepare(config, run_dir) as lock, forwarded_signals(run_dir / rundir.CONSOLE) as workers:
        for line in _other_machines(config, run_dir):
            print(line, flush=True)
        worker = start_worker(config, run_dir, lock=lock, env=env)
        record_start(config, run_dir, worker)
        workers.add(worker)
        code = exit_code(worker.wait(), run_dir, stopped=workers.stopped)
        record_end(run_dir, code)
    if code == EXIT_WRONG_INPUT:
        rundir.discard_unused(run_dir)
    return code


def _take_part(config: TrainConfig, run_dir: Path) -> int:
    """This machine's part of a run that belongs to another machine, whose directory it leaves to that one."""
    env = devices_for(config, [] if config.hardware.device == "cpu" else visible_gpus())
    own = run_dir / rundir.RANKS / f"node-{config.hardware.node_rank}"
    own.mkdir(parents=True, exist_ok=True)
    save(config, own)
    number = (config.hardware.node_rank or 0) + 1
    print(f"{'machine':<10} {number} of {config.hardware.num_nodes}; logs in {own.parent}", flush=True)
    with forwarded_signals(own / rundir.CONSOLE) as workers:
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


def devices_for(config: TrainConfig, gpus: Sequence[str]) -> dict[str, str]:
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
    return start_process(module, words, [lock] if lock else [], env, output)


def start_process(
    module: str, words: list[str], locks: list[IO[str]], env: dict[str, str] | None, output: IO[Any] | None
) -> subprocess.Popen:
    """Start a module of ours on prepared run directories, whose locks it inherits."""
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


def exit_code(returncode: int, run_dir: Path, *, stopped: bool) -> int:
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


class Workers(list[Process]):
    """The workers that run now, and whether a signal asked them to stop."""

    stopped = False

    def add(self, worker: Process) -> None:
        """A worker that was started while a signal came in is stopped too."""
        self.append(worker)
        if self.stopped:
            worker.terminate()


@contextlib.contextmanager
def forwarded_signals(log: Path) -> Iterator[Workers]:
    """Hand requests to stop to the workers, who save and stop; the driver waits for them.

    A closed terminal is no such request: what would have been shown there goes to `log`.
    """
    workers = Workers()
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


def record_start(config: TrainConfig, run_dir: Path, worker: Process) -> None:
    """Write down who runs it, for `llmkit jobs`; whether it still does, the directory's lock tells."""
    JobRecord(
        launcher=config.launcher.name,
        job_id=str(worker.pid),
        state=RUNNING,
        submitted=now(),
        host=rundir.host(),
        process=worker.pid,
    ).write(run_dir)


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them; found without importing torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (FileNotFoundError, subprocess.SubprocessError):
        return []
    return [str(index) for index, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]
