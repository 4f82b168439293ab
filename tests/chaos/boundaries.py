"""SIGKILL at a file boundary: between two operations of a process on the files of a run, or half-way through one.

Python tells its audit hooks of every file that is opened, renamed, linked or removed (PEP 578). What libraries write
from C++ and Rust, and fsync, it does not tell; those functions are wrapped.
"""

import functools
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# Audit event -> which of its arguments are paths, and which is the descriptor of the directory the first is in.
CHANGES = {
    "os.rename": ((0, 1), 2),
    "os.link": ((0, 1), 2),
    "os.remove": ((0,), 1),
    "os.rmdir": ((0,), 1),
    "os.mkdir": ((0,), 2),
    "os.truncate": ((0,), None),
}


class Boundaries:
    """Numbers the operations on files below `run_dir` from 1, from `watch` on, and ends the process at one of them.

    Args:
        journal: a line for each operation is written there.
        kill_at: the number of the operation before which the process ends.
        kill_behind: or: the name of a file; the process ends before what follows once something is renamed to it.
    """

    def __init__(self, run_dir: Path, journal: Path, *, kill_at: int | None = None, kill_behind: str | None = None):
        self.root, self.kill_at, self.kill_behind = os.path.realpath(run_dir), kill_at, kill_behind
        self._numbers = itertools.count(1)  # counted from two threads: next() is one step
        self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def watch(self) -> None:
        """Count from now on, for as long as this process lives: audit hooks cannot be removed."""
        import safetensors.torch
        import torch

        safetensors.torch.serialize_file = self._halved(safetensors.torch.serialize_file)
        torch.save = self._halved(torch.save)
        os.fsync = self._before_fsync(os.fsync)  # type: ignore[assignment]
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[2] & WRITING:
            if (path := self._inside(arguments[0], None)) is not None:
                # What is between this operation and the next is an empty file; what was before it, the last one left.
                self._reach(f"open {path}", lambda: _empty(path, arguments[2]))
        elif event in CHANGES:
            positions, descriptor = CHANGES[event]
            folder = arguments[descriptor] if descriptor is not None else None
            paths = [self._inside(arguments[position], folder) for position in positions]
            if named := [path for path in paths if path is not None]:
                self._reach(f"{event.removeprefix('os.')} {' -> '.join(named)}")

    def _reach(self, operation: str, last_act: Callable[[], None] = lambda: None) -> None:
        number = next(self._numbers)
        os.write(self._journal, f"{number} {operation}\n".encode())
        if number == self.kill_at:
            self.kill_at = None  # the last act is an operation too
            last_act()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kill_behind is not None and operation.startswith("rename") and operation.endswith(self.kill_behind):
            self.kill_at, self.kill_behind = number + 1, None

    def _inside(self, path: Any, folder: int | None) -> str | None:
        """The path of a file of the run, else None."""
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        name = os.fsdecode(path)
        if folder is not None and folder >= 0 and not os.path.isabs(name):
            name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
        name = os.path.abspath(name)
        return name if name.startswith(f"{self.root}{os.sep}") else None

    def _halved(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """Two boundaries for a function whose second argument is the file it writes: before, and half-way."""

        @functools.wraps(write)
        def written(content: Any, file: Any, *arguments: Any, **options: Any) -> Any:
            path = self._inside(file, None)
            if path is None:
                return write(content, file, *arguments, **options)
            self._reach(f"write {path}")
            result = write(content, file, *arguments, **options)
            self._reach(f"half of {path}", lambda: os.truncate(path, os.path.getsize(path) // 2))
            return result

        return written

    def _before_fsync(self, fsync: Callable[[Any], None]) -> Callable[[Any], None]:
        @functools.wraps(fsync)
        def synced(file: Any) -> None:
            descriptor = file if isinstance(file, int) else file.fileno()
            if (path := self._inside(os.readlink(f"/proc/self/fd/{descriptor}"), None)) is not None:
                self._reach(f"fsync {path}")
            fsync(file)

        return synced


def _empty(path: str, flags: int) -> None:
    os.close(os.open(path, flags & (WRITING | os.O_TRUNC | os.O_APPEND), 0o644))
