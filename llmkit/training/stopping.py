"""A polite request to stop: the first signal ends the run at the next step, saved; a second one ends it at once."""

import signal
from types import FrameType


class StopRequest:
    """Watches SIGINT and SIGTERM from its creation on."""

    def __init__(self) -> None:
        self.signal: str | None = None  # the name of the signal that asked, once one has
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.SIG_DFL)
