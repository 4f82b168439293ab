"""Copies every new checkpoint to another place while training goes on, through outages of that place too."""

import contextlib
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path

from llmkit import rundir
from llmkit.errors import LlmkitError
from llmkit.storage import StorageError
from llmkit.training.checkpoints import manifest
from llmkit.training.checkpoints.remote import RemoteRun, TakenOver

STALE = 3600.0  # seconds
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 300.0  # seconds between two tries while the place does not answer


class Mirror:
    """One thread, at most one checkpoint on its way and one waiting: of several that wait only the newest matters.

    Args:
        warn: told when the place stops answering, and when it does again.
    """

    def __init__(self, remote: RemoteRun, run_dir: Path, *, keep: int, warn: Callable[[str], None]):
        self.remote, self.run_dir, self.keep, self.warn = remote, run_dir, keep, warn
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._under_way: Path | None = None
        self._closed = False
        self._failing = False
        work = copy_context().run  # what it says goes where the run's own words go
        self._thread = threading.Thread(target=work, args=(self._run,), name="checkpoint mirror", daemon=True)
        self._thread.start()

    def offer(self, checkpoint: Path) -> set[Path]:
        """Have a new checkpoint copied. Returns those that must not be removed yet: on their way or waiting."""
        with self._changed:
            self._waiting = checkpoint
            self._changed.notify()
            return {path for path in (self._waiting, self._under_way) if path is not None}

    def close(self) -> None:
        """Begin nothing more. What is on its way goes on; `publish` waits for it and sends what is then missing."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        with contextlib.suppress(StorageError):  # what a killed run had begun to send takes room, and costs
            self.remote.place.abort_stale_uploads(older_than=STALE)
        while (checkpoint := self._next()) is not None:
            self._copy(checkpoint)
            with self._changed:
                self._under_way = None

    def _next(self) -> Path | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._closed)
            self._under_way, self._waiting = None if self._closed else self._waiting, None
            return self._under_way

    def _copy(self, checkpoint: Path) -> None:
        """Try until it is there, or a newer one waits, or the run ends."""
        pause = FIRST_PAUSE
        while True:
            try:
                self.remote.check_owner()
                self.remote.send(checkpoint)
                self.remote.send_records(self.run_dir)
                self.remote.rotate(keep=self.keep)
            except TakenOver as error:
                self.warn(str(error))
                self._closed = True
                return
            except (StorageError, OSError) as error:
                self._tell(error)
            else:
                self._tell(None)
                return
            with self._changed:
                if self._changed.wait_for(lambda: self._waiting is not None or self._closed, timeout=pause):
                    return
            pause = min(2 * pause, LONGEST_PAUSE)

    def _tell(self, error: Exception | None) -> None:
        if error is not None and not self._failing:
            self.warn(f"{error} Training goes on, and the copy is tried again.")
        elif error is None and self._failing:
            self.warn(f"{self.remote.place.url} answers again; the copy is up to date.")
        self._failing = error is not None


class NotCopied(LlmkitError):
    """What the run has made is whole on this machine, but not where it was to be copied."""


def publish(
    remote: RemoteRun,
    run_dir: Path,
    *,
    checkpoints: int | None,
    owned: bool = False,
    patience: float = 0.0,
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Bring the copy of a run that is not at work up to date, result.json last.

    Args:
        checkpoints: how many of the newest are sent, and stay there beside the best; None: all are sent, none removed.
        owned: whether the place was claimed by this process (see `RemoteRun.claim`).
        patience: seconds after which a place that does not answer is given up.
        tell: told, once, that it is waited for.

    Raises:
        NotCopied: with what is missing there, and how to send it later.
    """
    deadline, pause = time.monotonic() + patience, FIRST_PAUSE
    while True:
        try:
            if owned:
                remote.check_owner()
            _send_all(remote, run_dir, checkpoints)
            return
        except (StorageError, OSError) as error:
            if time.monotonic() + pause > deadline:
                raise NotCopied(
                    f"{run_dir} is whole here, but its copy at {remote.place.url} is not: {error}\nSend it later with: "
                    f"llmkit export run={run_dir} to={remote.place.url} checkpoints=true"
                ) from error
            if pause == FIRST_PAUSE:
                tell(f"{error} Waiting for it, up to {patience:.0f} s (checkpoint.patience_s); Ctrl-C ends that.")
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _send_all(remote: RemoteRun, run_dir: Path, checkpoints: int | None) -> None:
    there = manifest.committed(run_dir)
    sent = there if checkpoints is None else there[-checkpoints:] if checkpoints else []
    for checkpoint in reversed(sent):  # what matters most first: time may be short
        remote.send(checkpoint)
    if checkpoints:
        remote.rotate(keep=checkpoints)
    if (run_dir / rundir.FINAL).is_dir():
        remote.send_final(run_dir)
    remote.send_records(run_dir)
    if (result := run_dir / rundir.RESULT).exists():
        remote.place.write(rundir.RESULT, result.read_bytes())
