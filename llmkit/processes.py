"""What processes started by another owe it: to end with it."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent(parent: int, sent: signal.Signals) -> bool:
    """Ask the kernel to send this process a signal when its parent dies (Linux). False if that is too late already."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, sent)
    return os.getppid() == parent
