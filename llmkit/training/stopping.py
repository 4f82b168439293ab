"""A polite request to stop: the first signal ends the run at the next step, saved; a second one ends it at once."""

import signal
import time
from types import FrameType

# Ctrl-C, a scheduler's limit, and what Slurm sends ahead of one if asked to (--signal).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Schedulers signal every process of a job, and launchers hand on what they get: the same request arrives twice.
ECHO = 3.0  # seconds


class StopRequest:
    """Holds the name of the signal that asked for a stop, once one has."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._asked = 0.0

    def watch(self) -> "StopRequest":
        """Take SIGNALS as requests from now on, and let the run outlive its terminal (SIGHUP)."""
        for number in SIGNALS:
            signal.signal(number, self._ask)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._asked = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._asked > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
