"""What processes started by another owe it: to end with it, and to end soon."""

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
from typing import NoReturn

from llmkit.errors import EXIT_PREEMPTED

PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent(parent: int, sent: signal.Signals) -> bool:
    """Ask the kernel to send this process a signal when its parent dies (Linux). False if that is too late already."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, sent)
    return os.getppid() == parent


def stop_with_driver() -> None:
    """Have this process asked to stop when its driver (LLMKIT_DRIVER) dies, so that no run goes on unseen (Linux)."""
    driver = os.environ.get("LLMKIT_DRIVER")
    if driver is None or not sys.platform.startswith("linux"):
        return
    if not die_with_parent(int(driver), signal.SIGTERM):  # it died before we asked
        sys.exit(EXIT_PREEMPTED)


def end(code: int) -> NoReturn:
    """As `sys.exit(code)` at the end of a process, but for taking apart what it has imported.

    That is 2 s after torch and its libraries, and in a forked process copies the memory they share.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing ends its processes
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
