"""A run outlives the terminal that it was started from: what it goes on to say is kept in a file."""

import errno
import io
import os
import sys
from pathlib import Path
from typing import Any


class _Terminal(io.FileIO):
    """A terminal's file descriptor; once the terminal has gone (EIO), `log` takes its place."""

    def __init__(self, descriptor: int, log: Path):
        super().__init__(descriptor, "w", closefd=False)
        self._log = log

    def write(self, data: Any) -> int:
        """As of any file, but that a closed terminal is no error."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            with self._log.open("ab") as log:
                os.dup2(log.fileno(), self.fileno())
            return super().write(data)


def keep_output(log: Path) -> None:
    """Have what this process prints go to `log` from the moment on that its terminal is closed.

    The caller ignores SIGHUP. Nothing changes where output goes to a file or a pipe.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream.isatty():
            stream.flush()
            raw = _Terminal(stream.fileno(), log)
            kept = io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding, line_buffering=True)
            setattr(sys, name, kept)
