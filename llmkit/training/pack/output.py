"""The output of a process with several runs, kept apart. It imports nothing: it is there before what keeps a stream."""

import io
from typing import TextIO


class Output(io.TextIOBase):
    """`sys.stdout` and `sys.stderr` of a process with several runs: what is printed goes to the run whose turn it is.

    Libraries that keep the stream, as handlers of logs do, keep this one.
    """

    def __init__(self, own: TextIO):
        self.own = self.target = own

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
