"""`serve.json`: which server runs for a model on this machine, for `llmkit chat` and `llmkit serve status=true`."""

import contextlib
import dataclasses
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from llmkit import rundir
from llmkit.serving.http import NoAnswer, ask

STATE = "serve.json"
LOG = "serve.log"
LOOK_AGAIN_S = 0.2
SECONDS_AFTER_DRAINING = 20.0  # for vLLM to end by itself once its requests have had their time


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server: its process, and where it answers."""

    pid: int  # and the process group
    born: str  # the process's start time as the kernel counts it: a number may be given to another process later
    host: str  # the machine: run directories may be shared
    url: str
    sources: dict[str, str]  # by the names in requests, what was asked to be served
    log: str
    started: str
    shutdown_timeout: int
    ready: bool = False
    stopping: bool = False  # another command has asked it to end

    def write(self, home: Path) -> None:
        """Say in `home` that it runs."""
        rundir.write_json(home / STATE, dataclasses.asdict(self))

    @property
    def names(self) -> list[str]:
        return list(self.sources)

    @property
    def is_alive(self) -> bool:
        """Whether that very process, or anything it has started, still runs."""
        now = born(self.pid)
        return now == self.born if now is not None else bool(living_in(self.pid))

    @property
    def answers(self) -> bool:
        """Whether it can be asked."""
        try:
            ask(self.url, "/v1/models", timeout=5)
        except NoAnswer:
            return False
        return self.ready

    def ask_to_stop(self, home: Path) -> Self:
        """Have it end when its requests have; whoever started it learns from serve.json that this was meant."""
        stopping = dataclasses.replace(self, stopping=True)
        stopping.write(home)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        return stopping

    def wait(self) -> bool:
        """Wait for its end. False if it, or something it had started, had to be killed."""
        deadline = time.monotonic() + self.shutdown_timeout + SECONDS_AFTER_DRAINING
        while self.is_alive and time.monotonic() < deadline:
            time.sleep(LOOK_AGAIN_S)
        if not self.is_alive:
            return True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return False


def running(home: Path) -> Running | None:
    """The server that runs on this machine for what is in `home`; None if there is none."""
    told = rundir.read_json(home / STATE)
    try:
        server = Running(**told) if told else None
    except TypeError:  # another version's
        return None
    if server is None or server.host != socket.gethostname():
        return None
    return server if server.is_alive else None


def all_running(runs: Path) -> list[tuple[Path, Running]]:
    """The servers that run for anything below `runs`, with their homes."""
    homes = sorted({file.parent for depth in ("*", "*/*") for file in runs.glob(f"{depth}/{STATE}")})
    return [(home, server) for home in homes if (server := running(home))]


def forget(home: Path, pid: int) -> None:
    """Remove what was written of a server that has ended, if it is that one's."""
    if (rundir.read_json(home / STATE) or {}).get("pid") == pid:
        (home / STATE).unlink(missing_ok=True)


def was_asked_to_stop(home: Path, pid: int) -> bool:
    """Whether another command has asked the server to end."""
    told = rundir.read_json(home / STATE) or {"pid": pid, "stopping": True}  # that command has removed it already
    return told.get("pid") == pid and bool(told.get("stopping"))


def born(pid: int) -> str | None:
    """When a process was started, in the kernel's clock ticks; None if there is none, or only its remains."""
    fields = _stat(Path(f"/proc/{pid}/stat"))
    return None if not fields or fields[0] == "Z" else fields[19]


def living_in(group: int) -> list[int]:
    """The processes of a group; those that have ended and are not yet forgotten do not count."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        fields = _stat(stat)
        if fields and int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def _stat(path: Path) -> list[str]:
    """The fields of proc(5)'s stat behind the process's name; empty if there is no such process."""
    try:
        return path.read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return []
