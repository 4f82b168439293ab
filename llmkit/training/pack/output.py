"""The output of a process with several runs, kept apart. It imports little: it is there before what keeps a stream."""

import io
from contextvars import ContextVar
from typing import TextIO

_log: ContextVar[TextIO] = ContextVar("log")


class Output(io.TextIOBase):
    """`sys.stdout` and `sys.stderr` of a process with several runs: what is printed goes to the run that prints it.

    Libraries that keep the stream, as handlers of logs do, keep this one. A thread prints for a run if it is started in
    a copy of that run's context.
    """

    def __init__(self, own: TextIO):
        self.own = own

    def goes_to(self, log: TextIO) -> None:
        """What is printed in this context goes there from now on."""
        _log.set(log)

    @property
    def target(self) -> TextIO:
        return _log.get(self.own)

    def write(self, text: str) -> int:
        return self.target.write(text)

    def flush(self) -> None:
        self.target.flush()

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self.target.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"
