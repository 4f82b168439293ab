"""`serve.json`: which server runs for a model on this machine, for `llmkit chat` and `llmkit serve status=true`."""

import contextlib
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from llmkit import rundir
from llmkit.serving.http import NoAnswer, ask

STATE = "serve.json"
LOG = "serve.log"
LOOK_AGAIN_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server: its process, and where it answers."""

    pid: int
    born: str  # the process's start time as the kernel counts it: a number may be given to another process later
    url: str
    names: list[str]
    log: str
    started: str
    shutdown_timeout: int

    def write(self, home: Path) -> None:
        """Say in `home` that it runs."""
        rundir.write_json(home / STATE, asdict(self))

    @property
    def is_alive(self) -> bool:
        """Whether that very process still runs."""
        return born(self.pid) == self.born

    @property
    def answers(self) -> bool:
        """Whether it can be asked."""
        try:
            ask(self.url, "/v1/models", timeout=5)
        except NoAnswer:
            return False
        return True

    def stop(self) -> bool:
        """Ask it to end when its requests have, and wait for that. False if it had to be killed."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        deadline = time.monotonic() + self.shutdown_timeout + 20
        while self.is_alive and time.monotonic() < deadline:
            time.sleep(LOOK_AGAIN_S)
        in_time = not self.is_alive
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # whatever it had started
        return in_time


def running(home: Path) -> Running | None:
    """The server that runs for what is in `home`; None if there is none."""
    told = rundir.read_json(home / STATE)
    if told is None:
        return None
    server = Running(**told)
    return server if server.is_alive else None


def all_running(runs: Path) -> list[tuple[Path, Running]]:
    """The servers that run for anything below `runs`, with their homes."""
    homes = sorted({file.parent for depth in ("*", "*/*") for file in runs.glob(f"{depth}/{STATE}")})
    return [(home, server) for home in homes if (server := running(home))]


def forget(home: Path) -> None:
    """Remove what was written of a server that has ended."""
    (home / STATE).unlink(missing_ok=True)


def born(pid: int) -> str | None:
    """When a process was started, in the kernel's clock ticks; None if there is none, or only its remains."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if stat[0] == "Z" else stat[19]
