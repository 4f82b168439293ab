"""Runs that take turns: each on a stack of its own, of which only one goes at a time."""

from collections.abc import Callable
from typing import Any

from greenlet import getcurrent, greenlet

from llmkit.training.pack.process_state import ProcessState


class Turn:
    """A function on a stack of its own that goes on only when `go` says so, until it next calls `wait`.

    Any code that blocks can take turns so. Threads could too, but each would bring OpenMP threads of its own, and with
    more of them than cores libgomp puts them all to sleep after every operation: seen three times as slow.
    """

    def __init__(self, work: Callable[[], None], state: ProcessState):
        self.state = state
        self.asks: Any = None  # what it waits for; None while it has not asked, and once it has ended
        self._stack = greenlet(lambda _: work())

    @property
    def ended(self) -> bool:
        """Whether the function has come to its end."""
        return self._stack.dead

    def go(self, answer: Any = None) -> None:
        """Let it go on, with the answer to what it asked for, until it asks again or ends; raises what ended it.

        An answer that is an exception is raised where the function waits.
        """
        self.asks = None
        self._stack.parent = getcurrent()
        self.state.enter()
        try:
            self._stack.switch(answer)
        finally:
            self.state.leave()

    def wait(self, asks: Any) -> Any:
        """Called by the function itself: end this turn, and return the answer when the next one begins."""
        self.asks = asks
        answer = self._stack.parent.switch()
        if isinstance(answer, BaseException):
            raise answer
        return answer
