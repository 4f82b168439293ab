"""vLLM as a child process: its log, its readiness, and its end with nothing left behind."""

import contextlib
import os
import signal
import subprocess
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path

from llmkit.errors import LlmkitError
from llmkit.processes import die_with_parent
from llmkit.serving.causes import explain
from llmkit.serving.http import NoAnswer, ask
from llmkit.serving.plan import Plan
from llmkit.serving.state import SECONDS_AFTER_DRAINING

SECONDS_BETWEEN_LOOKS = 0.1
LAST_LINES = 15


class ServerDied(LlmkitError):
    """vLLM ended by itself: the message has its last lines and, for known causes, what to change."""


class Server:
    """One vLLM process and all it starts.

    Args:
        log: the file all that it prints goes to.
        show: told each line of it.
    """

    def __init__(self, plan: Plan, log: Path, *, show: Callable[[str], None]):
        self.plan, self.log, self.show = plan, log, show
        self.process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._mark = ("x-llmkit-server", uuid.uuid4().hex)
        self._stopping = False
        self._last: deque[str] = deque(maxlen=400)

    def start(self) -> None:
        """Start it, in a session of its own: Ctrl-C in the terminal reaches only this process, which then drains."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        parent, detached = os.getpid(), self.plan.serve.detach

        def in_child() -> None:
            if not detached and not die_with_parent(parent, signal.SIGTERM):
                os._exit(1)

        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(
                self.plan.command(),
                env=os.environ | self.plan.variables() | {"LLMKIT_SERVER": self._mark[1]},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=in_child,  # no thread has been started yet
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_until_ready(self) -> None:
        """Wait until every name is listed and has answered.

        Raises ServerDied if the process ends, LlmkitError if it takes longer than `serve.startup_timeout_s`.
        """
        deadline = time.monotonic() + self.plan.serve.startup_timeout_s
        while True:
            self.check_alive()
            with contextlib.suppress(NoAnswer):
                models = ask(self.plan.url, "/v1/models", timeout=5, expected=self._mark)["data"]
                listed = {model["id"] for model in models}
                if listed.issuperset(self.plan.names):
                    return self._answers()
            if time.monotonic() > deadline:
                raise LlmkitError(
                    f"not ready after {self.plan.serve.startup_timeout_s:.0f} s (serve.startup_timeout_s); its log is "
                    f"{self.log}"
                )
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _answers(self) -> None:
        """One token from each name: a server can list a model that it cannot run."""
        for name in self.plan.names:
            try:
                ask(self.plan.url, "/v1/completions", {"model": name, "prompt": "1", "max_tokens": 1}, timeout=600)
            except NoAnswer:
                time.sleep(1.0)  # a process that has just failed needs a moment to end
                self.check_alive()
                raise

    @property
    def pid(self) -> int:
        """Of the server's process, which is its group's too."""
        assert self.process is not None, "start() comes first"
        return self.process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process is over."""
        assert self.process is not None, "start() comes first"
        return self.process.poll() is not None

    def check_alive(self) -> None:
        """Raise ServerDied if the process has ended."""
        assert self.process is not None, "start() comes first"
        if self.process.poll() is None:
            return
        self._end_group()
        if self._reader:
            self._reader.join(timeout=5)
        last = [line for line in self._last if line.strip()][-LAST_LINES:]
        said = "".join(f"\n  {line}" for line in last)
        advice = explain("\n".join(self._last), self.process.returncode)
        raise ServerDied(
            f"vLLM ended with code {self.process.returncode}.{f' {advice}' if advice else ''}\n"
            f"Its last lines, of {self.log}:{said}"
        )

    def stop(self) -> None:
        """Let requests in flight end, for `serve.shutdown_timeout` seconds, then end the server and all it started."""
        if self.process is None:
            return
        self._stopping = True  # what vLLM's parts say of one another's end is no news
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(self.plan.serve.shutdown_timeout + SECONDS_AFTER_DRAINING)
        self._end_group()
        self.process.wait()

    def end(self, *, within: float = 0.0) -> None:
        """End it and all it started, requests in flight or not; by force after `within` seconds."""
        self._stopping = True
        if within and self.process is not None and self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(within)
        self._end_group()

    def _end_group(self) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _read(self) -> None:
        """Follow the log to the end of the process."""
        assert self.process is not None
        with open(self.log, encoding="utf-8", errors="replace") as log:
            line = ""
            while True:
                over = self.process.poll() is not None
                line += log.readline()
                if line.endswith("\n"):
                    self._last.append(line[:-1])
                    if not self._stopping:
                        self.show(line[:-1])
                    line = ""
                elif over:
                    return
                else:
                    time.sleep(SECONDS_BETWEEN_LOOKS)
