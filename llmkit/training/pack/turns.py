"""Runs that take turns: each on a thread of its own, of which only one goes at a time."""

import contextvars
import threading
from collections.abc import Callable
from typing import Any

from llmkit.training.pack.process_state import ProcessState


class Turn:
    """A function on a thread of its own that goes on only when `go` says so, until it next calls `wait`.

    Threads, because each keeps its own autocast and gradient modes, and the function may be any code that blocks.
    """

    def __init__(self, work: Callable[[], None], state: ProcessState):
        self.state = state
        self.asks: Any = None  # what it waits for; None while it has not asked, and once it has ended
        self.ended = False
        self._answer: Any = None
        self._error: BaseException | None = None
        self._its, self._ours = threading.Semaphore(0), threading.Semaphore(0)
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run, work), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        self._its.acquire()
        try:
            work()
        except BaseException as error:
            self._error = error
        self.ended, self.asks = True, None
        self._ours.release()

    def go(self, answer: Any = None) -> None:
        """Let it go on, with the answer to what it asked for, until it asks again or ends; raises what ended it.

        An answer that is an exception is raised where the function waits.
        """
        self._answer, self.asks = answer, None
        self.state.enter()
        try:
            self._its.release()
            self._ours.acquire()
        finally:
            self.state.leave()
        if self._error is not None:
            raise self._error

    def wait(self, asks: Any) -> Any:
        """Called by the function itself: end this turn, and return the answer when the next one begins."""
        self.asks = asks
        self._ours.release()
        self._its.acquire()
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer
