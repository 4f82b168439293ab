"""How far a transfer is: a bar on a terminal, elsewhere a line now and then; what is soon done says nothing."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int], None]  # gets the bytes that have arrived since the last call, from any thread

SECONDS_PER_LINE = 10.0
BAR_AFTER = 1.0  # seconds
UNITS = ("bytes", "kB", "MB", "GB", "TB")


@contextmanager
def byte_progress(what: str, total: int) -> Iterator[Progress]:
    """A function to be called with the bytes of each piece, of `total` bytes in all; `what` says what is going on."""
    if sys.stderr.isatty():
        with _bar(what, total) as progress:
            yield progress
    else:
        yield _lines(what, total)


def in_bytes(count: float) -> str:
    """A number of bytes in a unit that a reader takes in at once: `14.5 GB`."""
    unit = 0
    while count >= 999.5 and unit < len(UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.3g} {UNITS[unit]}"


def _lines(what: str, total: int) -> Progress:
    began = last = time.monotonic()
    arrived, lock = 0, threading.Lock()

    def progress(count: int) -> None:
        nonlocal arrived, last
        with lock:
            arrived += count
            if (now := time.monotonic()) - last < SECONDS_PER_LINE:
                return
            last = now
        rate = arrived / (now - began)
        left = f", {max(total - arrived, 0) / rate / 60:.0f} min left" if rate else ""
        print(
            f"{what}: {in_bytes(arrived)} of {in_bytes(total)}, {in_bytes(rate)}/s{left}", file=sys.stderr, flush=True
        )

    return progress


@contextmanager
def _bar(what: str, total: int) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=total)
    began, lock, shown = time.monotonic(), threading.Lock(), False

    def progress(count: int) -> None:
        nonlocal shown
        bar.advance(task, count)
        with lock:
            if not shown and time.monotonic() - began > BAR_AFTER:
                shown = True
                bar.start()

    try:
        yield progress
    finally:
        bar.stop()
