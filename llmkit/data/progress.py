"""How far something is, said now and then: what is soon done says nothing."""

import time
from collections.abc import Callable


def now_and_then(say: Callable[[str], None], *, seconds: float) -> Callable[[str, int], None]:
    """A function to be called with a name and its rows so far, at every row if need be.

    It passes `NAME: N rows so far` to `say` once in so many seconds, the first time that long from now.
    """
    last = time.monotonic()

    def progress(name: str, rows: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= seconds:
            last = now
            say(f"{name}: {rows:,} rows so far")

    return progress
