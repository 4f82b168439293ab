"""A directory on this machine as a place."""

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from llmkit import durable
from llmkit.storage.errors import DamagedError, StorageError
from llmkit.storage.names import inside
from llmkit.storage.places import Entry
from llmkit.storage.transfers import Abandoned, run_transfers

BLOCK = 2**18  # bytes read at a time: what is read, hashed and written stays in a core's cache
# A file that is being written: `.NAME.32HEXDIGITS`, beside its target, as llmkit.durable names them too.
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{32}")


def partial_of(target: Path) -> Path:
    """A new file beside `target` to write to, which no listing shows."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}")


def reserve(file: int, size: int) -> None:
    """Have the file system set `size` bytes aside for an open file, where it can: they are then cheaper to write.

    Raises OSError if the disk is full. Not os.posix_fallocate: where the file system cannot, it writes to every block.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)  # Linux only
    failed = fallocate and size and fallocate(file, 0, ctypes.c_int64(0), ctypes.c_int64(size))
    if failed and ctypes.get_errno() == errno.ENOSPC:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def commit(partial: Path, target: Path) -> None:
    """Put a written file on the disk, under its name."""
    durable.sync(partial)
    os.replace(partial, target)
    durable.sync(target.parent)


@contextlib.contextmanager
def explained(what: str, url: str) -> Iterator[None]:
    """Turn an OSError of this machine into a StorageError: `what` ("cannot be read") of `url`, and why."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StorageError(f"{url} {what}: the disk is full; make room or choose another one.") from error
        raise StorageError(f"{url} {what}: {error.strerror or error}.") from error


class LocalPlace:
    """The interface is `llmkit.storage.places.Place`."""

    threads = 4  # files at a time; more only make the disk seek

    def __init__(self, directory: Path):
        self.directory = directory.absolute()
        self.url = str(directory)
        self.identity = str(self.directory)

    def files(self, under: str = "") -> dict[str, Entry]:
        root = self._path(under) if under else self.directory
        with explained("cannot be listed", self.url):
            if not root.exists():
                return {}
            found = {}
            for folder, _, names in os.walk(root, onerror=_raise):
                for path in (Path(folder, name) for name in names if not _PARTIAL.fullmatch(name)):
                    with contextlib.suppress(FileNotFoundError):  # it has just been deleted
                        state = path.stat()
                        version = f"{state.st_size}-{state.st_mtime_ns}"
                        found[path.relative_to(self.directory).as_posix()] = Entry(state.st_size, version)
            return dict(sorted(found.items()))

    def read(self, name: str) -> bytes | None:
        path = self._path(name)
        with explained("cannot be read", str(path)):
            try:
                return path.read_bytes()
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with explained("cannot be written", str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            durable.write_bytes(path, data)

    def upload(self, source: Path, name: str, *, sha256: str | None = None) -> None:
        run_transfers([self.uploading(source, name, sha256=sha256)], threads=1)

    def download(self, name: str, target: Path, *, sha256: str | None = None, size: int | None = None) -> str:
        transfer = self.downloading(name, target, sha256=sha256, size=size)
        run_transfers([transfer], threads=1)
        return transfer.sha256

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            path = self._path(name)
            with explained("cannot be deleted", str(path)):
                path.unlink(missing_ok=True)
                _remove_empty(path.parent, self.directory)

    def abort_stale_uploads(self, under: str = "", *, older_than: float = 86400.0) -> int:
        root = self._path(under) if under else self.directory
        stale = 0
        with explained("cannot be tidied", str(root)):
            for path in root.rglob(".*"):
                if _PARTIAL.fullmatch(path.name) and path.is_file():
                    with contextlib.suppress(FileNotFoundError):  # it has just been completed
                        if path.stat().st_mtime <= time.time() - older_than:
                            path.unlink()
                            stale += 1
        return stale

    def place(self, under: str) -> "LocalPlace":
        return LocalPlace(self._path(under))

    def uploading(self, source: Path, name: str, *, sha256: str | None = None) -> "Copy":
        return Copy(source, self._path(name), sha256=sha256)

    def downloading(self, name: str, target: Path, *, sha256: str | None = None, size: int | None = None) -> "Copy":
        return Copy(self._path(name), target, sha256=sha256, size=size)

    def _path(self, name: str) -> Path:
        return inside(self.directory, name, self.url)


class Copy:
    """A file copied in one piece, hashed while its bytes pass."""

    pieces = 1

    def __init__(self, source: Path, target: Path, *, sha256: str | None = None, size: int | None = None):
        self.source, self.target = source, target
        self.expected, self.size = sha256, size
        self.sha256 = ""
        self.on_complete: Callable[[str], None] | None = None

    def run(self, piece: int, stop: threading.Event) -> int:
        partial = partial_of(self.target)
        try:
            with explained(f"cannot be copied to {self.target}", str(self.source)):
                self.target.parent.mkdir(parents=True, exist_ok=True)
                copied = self._copy(partial, stop)
                self._check(copied)
                commit(partial, self.target)
            if self.on_complete:
                self.on_complete(self.sha256)
            return copied
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()

    def abandon(self) -> None:
        """Nothing to do: `run` leaves nothing behind."""

    def _copy(self, partial: Path, stop: threading.Event) -> int:
        digest, copied = hashlib.sha256(), 0
        with self.source.open("rb") as source, partial.open("wb") as file:
            while block := source.read(BLOCK):
                if stop.is_set():
                    raise Abandoned
                digest.update(block)
                copied += file.write(block)
        self.sha256 = digest.hexdigest()
        return copied

    def _check(self, copied: int) -> None:
        if self.size is not None and copied != self.size:
            raise DamagedError(f"{self.source} has {copied:,} bytes, but should have {self.size:,}: it was changed.")
        if self.expected and self.sha256 != self.expected:
            raise DamagedError(
                f"{self.source} is not what was written: its SHA-256 is {self.sha256}, but should be {self.expected}."
            )


def _raise(error: OSError) -> None:
    raise error


def _remove_empty(folder: Path, above: Path) -> None:
    """A bucket has no empty directories, so a place on this machine has none either."""
    with contextlib.suppress(OSError):
        while folder != above:
            folder.rmdir()
            folder = folder.parent
