"""A polite request to stop: the first signal ends the run at the next step, saved; a second one ends it at once."""

import signal
from types import FrameType


class StopRequest:
    """Holds the name of the signal that asked for a stop, once one has."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def watch(self) -> "StopRequest":
        """Take SIGINT and SIGTERM as requests from now on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.SIG_DFL)
