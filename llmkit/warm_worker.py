"""What the workers of a sweep are forked from: `python -m llmkit.warm_worker DESCRIPTOR`. launchers/warm.py starts it.

It imports what workers import and then only waits for orders: one thread, no device, no model. A forked worker is a
child of the driver, not of this process: so it dies with its driver, its exit code and its end are the driver's to see,
and the end of this process is no concern of any worker.

This is not multiprocessing's forkserver, whose children are its own and whose death takes their exit codes with it,
which knows no environment per process, and which runs no exit handlers (Python 3.11 to 3.14).
"""

import importlib
import os
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path

from llmkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED
from llmkit.processes import die_with_parent, end

# Open once a process has initialized a device, which its forks then cannot use.
DEVICE_FILES = ("/dev/nvidia-uvm", "/dev/kfd")
PID_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A process to fork: what it runs, and in which environment.

    Args:
        module: its `main` is called with `argv`, and what that returns is the exit code.
        inherited: variables of the environment that hold the number of a file descriptor. After the order come these
            descriptors, that of the output, and that of a pipe on which the driver says that it knows of the process.
    """

    module: str
    argv: list[str]
    environment: dict[str, str]
    inherited: list[str]


def main(argv: list[str] | None = None) -> int:
    """Import, say `""` or why nothing can be forked, and fork as ordered until the driver hangs up.

    Returns in each forked process too, with its own exit code.
    """
    (descriptor,) = sys.argv[1:] if argv is None else argv
    if not die_with_parent(int(os.environ["LLMKIT_DRIVER"]), signal.SIGKILL):
        return EXIT_PREEMPTED
    driver = Connection(int(descriptor))
    from llmkit.worker import warm_up

    warm_up(driver.recv())
    sys.stdout.flush()
    sys.stderr.flush()
    _fork_once()
    driver.send(unfit())
    order = _serve(driver)
    if order is None:
        return EXIT_DONE
    module = importlib.import_module(order.module)
    sys.argv = [str(module.__file__), *order.argv]
    return module.main(order.argv)


def unfit() -> str:
    """Why this process must not be forked; empty if it may."""
    threads = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    if len(threads) > 1:
        return f"a library has started threads ({', '.join(threads[1:])})"
    opened = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    if devices := [name for name in opened if name.startswith(DEVICE_FILES)]:
        return f"a library has opened a device ({devices[0]})"
    return ""


def _fork_once() -> None:
    """OpenBLAS has started its threads when it was loaded. It ends them before a fork, and starts them when needed."""
    if (child := os.fork()) == 0:
        os._exit(EXIT_DONE)
    os.waitpid(child, 0)


def _serve(driver: Connection) -> Order | None:
    """Fork a process for each order and say its id. Returns the order in that process; None here, at the end."""
    while True:
        try:
            order: Order = driver.recv()
            descriptors = [recv_handle(driver) for _ in range(len(order.inherited) + 2)]
        except EOFError:
            return None
        child = _fork_for_driver()
        if child == 0:
            driver.close()
            _become(order, descriptors)
            return order
        for descriptor in descriptors:
            os.close(descriptor)
        driver.send(child)


def _fork_for_driver() -> int:
    """Fork a process whose parent is the driver, which adopts orphans (PR_SET_CHILD_SUBREAPER); 0 in that process.

    Raises OSError if there is no memory for it or no process more is allowed.
    """
    reading, writing = os.pipe()
    if (between := os.fork()) == 0:
        os.close(reading)
        _fork_and_end(writing)
        return 0
    os.close(writing)
    os.waitpid(between, 0)
    said = os.read(reading, PID_BYTES)
    os.close(reading)
    if not said:
        raise OSError("no process could be forked")
    return int.from_bytes(said)


def _fork_and_end(writing: int) -> None:
    """Fork, write the id, and end; returns in the new process alone."""
    try:
        child = os.fork()
        if child:
            os.write(writing, child.to_bytes(PID_BYTES))
    except OSError:
        os._exit(EXIT_FAILED)
    if child:
        os._exit(EXIT_DONE)
    os.close(writing)


def _become(order: Order, descriptors: list[int]) -> None:
    """Become what a process would be that was started afresh: its parent, its group, its environment, its output."""
    *inherited, output, go = descriptors
    if not os.read(go, 1):  # nobody would know of this process; another may have been started for the same run
        os._exit(EXIT_PREEMPTED)
    os.close(go)
    os.setpgid(0, 0)
    imports_said = os.pread(1, os.fstat(1).st_size, 0)
    for standard in (1, 2):
        os.dup2(output, standard)
    os.close(output)
    os.write(1, imports_said)
    os.environ.clear()
    os.environ.update(order.environment)
    os.environ.update(zip(order.inherited, map(str, inherited), strict=True))


if __name__ == "__main__":
    end(main())
