"""Fork the workers of a sweep from a process that has imported their libraries, which is most of a short run's start.

`llmkit.warm_worker` is that process. What it forks is this process's own child, and differs in nothing that a run can
see from a worker with an interpreter of its own. Where it cannot be used, `WarmStarts.start` returns None.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.reduction import send_handle
from typing import IO, Any, Self

from llmkit.config import TrainConfig
from llmkit.config.resolve import in_group
from llmkit.warm_worker import Order
from llmkit.worker import used_libraries

PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
SECONDS_TO_END = 10.0  # that a process has which has closed its line
ENVIRONMENT = {
    # What has threads cannot be forked; jemalloc, which pyarrow brings, would have one to give back memory.
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    # What has asked CUDA whether there is a device cannot be forked either; NVML may be asked.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


class Forked:
    """A child of this process that another one has forked for it: as `subprocess.Popen`, as far as launchers go."""

    def __init__(self, pid: int):
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, negative for the signal that ended it; None while it runs."""
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        code = self._reap(0)
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        """Does nothing if it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to save and end."""
        self.send_signal(signal.SIGTERM)

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):  # a handler of signals has reaped it meanwhile
                pid, status = os.waitpid(self.pid, options)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


class WarmStarts:
    """Starts the jobs of a sweep that run in a process of their own; as a context manager it leaves no process behind.

    One warm process at a time: what libraries read when they are imported (`hardware.env`) is the same
    for all that it forks.

    Args:
        environment: of a worker, without what differs from job to job.
        on_gpus: whether jobs are given GPUs.
    """

    def __init__(self, configs: Sequence[TrainConfig], environment: dict[str, str], *, on_gpus: bool):
        usable = sys.platform.startswith("linux") and _adopt_orphans(True) and _adopt_orphans(False)
        self._configs = [config for config in configs if usable and _may_be_forked(config, on_gpus=on_gpus)]
        self._environment = environment
        self._process: _WarmProcess | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: Any) -> None:
        self._end()

    def is_ready(self, config: TrainConfig) -> bool:
        """Whether the job can be started now; False while libraries are being imported for it."""
        alike = [one for one in self._configs if one.hardware.env == config.hardware.env]
        if len(alike) < 2 or not any(one is config for one in alike):
            return True
        if self._process is None or self._process.configs != alike:
            self._end()
            self._process = _WarmProcess(alike, self._environment)
        return self._process.is_settled()

    def start(
        self,
        config: TrainConfig,
        module: str,
        *argv: str,
        environment: dict[str, str],
        inherited: Mapping[str, int],
        output: IO[Any],
    ) -> Forked | None:
        """Start `python -m module argv` for a job that `is_ready`; None if it has to be started in another way.

        Args:
            inherited: variables of the environment that are to hold the number of the descriptor given here, as the
                process will have it.
        """
        process = self._process
        if process is None or not any(one is config for one in process.configs):
            return None
        order = Order(module=module, argv=list(argv), environment=environment, inherited=list(inherited))
        forked = process.fork(order, [*inherited.values(), output.fileno()])
        if forked is None:
            print(f"warning: {process.trouble}; jobs start afresh and import their libraries each.", file=sys.stderr)
            self._configs = []
            self._end()
        return forked

    def _end(self) -> None:
        if self._process is not None:
            self._process.end()
        self._process = None


def _may_be_forked(config: TrainConfig, *, on_gpus: bool) -> bool:
    # bitsandbytes asks every GPU what it is when it is imported (0.50).
    return config.launcher.warm and not in_group(config) and not (on_gpus and "bitsandbytes" in used_libraries(config))


class _WarmProcess:
    """The process that imports and forks; `trouble` says why it does not, once it does not."""

    def __init__(self, configs: list[TrainConfig], environment: dict[str, str]):
        self.configs = configs
        self.trouble: str | None = None
        self._settled = False
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `end`
        self._line, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "llmkit.warm_worker", str(theirs.fileno())],
                env=environment | ENVIRONMENT,
                pass_fds=(theirs.fileno(),),
                process_group=0,
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=subprocess.STDOUT,
            )
        with contextlib.suppress(BrokenPipeError):  # it has ended already; `is_settled` finds out
            self._line.send(configs)

    def is_settled(self) -> bool:
        """Whether it can fork, or has trouble that keeps it from it."""
        if not self._settled and self._line.poll():
            self._settled = True
            try:
                self.trouble = self._line.recv() or None
            except (EOFError, OSError):
                self.trouble = self._last_words()
        return self._settled

    def fork(self, order: Order, descriptors: Sequence[int]) -> Forked | None:
        """Have it fork a process; None if it cannot."""
        if self.trouble:
            return None
        go, gone = os.pipe()
        try:
            with _adopting_orphans():
                self._line.send(order)
                for descriptor in (*descriptors, go):
                    send_handle(self._line, descriptor, self._process.pid)
                forked = Forked(self._line.recv())
            os.write(gone, b"!")
        except (EOFError, OSError):
            self.trouble = self._last_words()
            return None
        finally:
            os.close(go)
            os.close(gone)
        return forked

    def end(self) -> None:
        """End it; what it has forked goes on."""
        self._process.kill()
        self._process.wait()
        self._line.close()
        self._said.close()

    def _last_words(self) -> str:
        try:
            code = self._process.wait(timeout=SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            return "the process that workers are forked from does not answer"
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip().splitlines()
        return f"the process that workers are forked from has ended {how}" + (f" ({said[-1].strip()})" if said else "")


@contextlib.contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Within the block a process whose parent has ended becomes a child of this one."""
    _adopt_orphans(True)
    try:
        yield
    finally:
        _adopt_orphans(False)


def _adopt_orphans(wanted: bool) -> bool:
    """Whether the kernel does so."""
    return ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0) == 0
