"""Several files at a time, and parts of one file at a time, by one bounded pool of threads."""

import functools
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmkit.storage.names import check_names, inside

if TYPE_CHECKING:
    from llmkit.storage.places import Place

Progress = Callable[[int], None]  # gets the bytes that have arrived since the last call
WAIT_FOR_THREADS = 3.0  # seconds that the threads of an abandoned transfer have to notice


class Abandoned(BaseException):
    """Raised in a thread whose transfer was given up; it reaches nobody.

    Like KeyboardInterrupt it is no Exception: boto3 takes every Exception while it sends for a network error, and
    tries again.
    """


class Transfer(Protocol):
    """One file on its way, in pieces that may run at the same time and in any order; the last to end completes it."""

    pieces: int
    sha256: str  # of the content, known once it is complete; of an upload in parts only if it was given
    on_complete: Callable[[str], None] | None  # called with the SHA-256 by the thread that completes the file

    def run(self, piece: int, stop: threading.Event) -> int:
        """Move one piece and return its size in bytes; raises Abandoned soon after `stop` is set."""

    def abandon(self) -> None:
        """Leave nothing behind if the transfer is not complete; whatever goes wrong with that is not raised."""


def upload_files(
    place: "Place",
    directory: Path,
    names: Iterable[str],
    *,
    hashes: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Send the files `names` of `directory` under the same names, as `Place.upload` does, several at a time.

    `hashes`: the SHA-256 that files must have. The first error, or Ctrl-C, ends all; what is complete by then stays.
    """
    known = hashes or {}
    transfers = [place.uploading(directory / name, name, sha256=known.get(name)) for name in names]
    run_transfers(transfers, threads=place.threads, progress=progress)


def download_files(
    place: "Place",
    names: Iterable[str],
    directory: Path,
    *,
    hashes: Mapping[str, str] | None = None,
    sizes: Mapping[str, int] | None = None,
    progress: Progress | None = None,
    arrived: Callable[[str, str], None] | None = None,
) -> dict[str, str]:
    """Fetch files into `directory`, as `Place.download` does, several at a time; returns the SHA-256 of each by name.

    `hashes`, `sizes`: what files must have. `arrived` gets the name and the SHA-256 of each file once it is complete,
    from the thread that completed it. Raises StorageError, before anything is written, for names that would lead
    outside `directory` or need one name for a file and a directory.
    """
    wanted = list(names)
    known_hashes, known_sizes = hashes or {}, sizes or {}
    check_names(wanted, place.url)
    targets = {name: inside(directory, name, place.url) for name in wanted}
    for target in targets.values():
        target.parent.mkdir(parents=True, exist_ok=True)
    transfers = [
        place.downloading(name, target, sha256=known_hashes.get(name), size=known_sizes.get(name))
        for name, target in targets.items()
    ]
    for name, transfer in zip(targets, transfers, strict=True):
        transfer.on_complete = functools.partial(arrived, name) if arrived else None
    run_transfers(transfers, threads=place.threads, progress=progress)
    return {name: transfer.sha256 for name, transfer in zip(targets, transfers, strict=True)}


def run_transfers(transfers: Sequence[Transfer], *, threads: int, progress: Progress | None = None) -> None:
    """Run all pieces of all transfers; returns when every one is complete.

    The first error, or Ctrl-C, stops all of them: none is left half done, and those that completed stay.
    """
    stop = threading.Event()
    errors: list[BaseException] = []
    work = [(transfer, piece) for transfer in transfers for piece in range(transfer.pieces)]

    def run(task: tuple[Transfer, int]) -> int:
        transfer, piece = task
        try:
            return 0 if stop.is_set() else transfer.run(piece, stop)
        except Abandoned:
            return 0
        except BaseException as error:
            errors.append(error)
            stop.set()
            return 0

    # Not concurrent.futures: its threads keep the program alive, for minutes if the place has stopped answering.
    pool = ThreadPool(max(1, min(threads, len(work))))
    sizes = pool.imap_unordered(run, work)
    try:
        for size in sizes:
            if errors:
                raise errors[0]
            if progress:
                progress(size)
    except BaseException:
        stop.set()
        _wait_for(sizes)
        for transfer in transfers:
            transfer.abandon()
        raise
    finally:
        pool.terminate()


def _wait_for(sizes: Any) -> None:
    """Let the threads notice that they are no longer wanted; one that waits for an answer is left to itself."""
    deadline = time.monotonic() + WAIT_FOR_THREADS
    try:
        while True:
            sizes.next(timeout=max(0.0, deadline - time.monotonic()))
    except (StopIteration, multiprocessing.TimeoutError):
        pass
