"""A polite request to stop: the first signal ends the run at the next step, saved; a second one ends it at once."""

import signal
import time
from pathlib import Path
from types import FrameType

# Ctrl-C, a scheduler's limit, and what Slurm sends ahead of one if asked to (--signal).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Schedulers signal every process of a job, and launchers hand on what they get: the same request arrives twice.
ECHO = 3.0  # seconds
CANCELLED = "llmkit jobs cancel"  # in place of a signal's name, where a process has other runs too


class StopRequest:
    """Holds the name of the signal that asked for a stop, once one has.

    Args:
        of_all: the request to all runs of this process, if it has several.
        mark: a file that asks for a stop of this run alone.
    """

    def __init__(self, of_all: "StopRequest | None" = None, mark: Path | None = None) -> None:
        self._signal: str | None = None
        self._asked = 0.0
        self._of_all, self._mark = of_all, mark

    @property
    def signal(self) -> str | None:
        """Who asked: the name of a signal, or CANCELLED; None as long as nobody has."""
        if self._signal is None and self._of_all is not None:
            self._signal = self._of_all.signal
        if self._signal is None and self._mark is not None and self._mark.exists():
            self._signal = CANCELLED
        return self._signal

    @signal.setter
    def signal(self, name: str | None) -> None:
        self._signal = name

    def watch(self) -> "StopRequest":
        """Take SIGNALS as requests from now on, and let the run outlive its terminal (SIGHUP)."""
        for number in SIGNALS:
            signal.signal(number, self._ask)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal, self._asked = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._asked > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
