"""What the cache of fetched files is made of, below `cache_dir()/objects`.

    blobs/SHA256        contents, each once whatever it is called
    index/...           which content an object had at which size and version
    sets/...            directories of hard links to blobs (copies where the file system has no links)
    locks/...           a process holds the lock of each set it uses, shared, while it lives

Nothing here needs a clean end: the kernel frees the locks of a killed process, names appear by rename or link once the
content behind them is on the disk, and whatever is left over is removed by the next eviction.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from llmkit import durable
from llmkit.storage.cache import cache_dir
from llmkit.storage.local import partial_of
from llmkit.storage.places import Entry

_in_use: dict[Path, int] = {}  # the open, locked file of each set this process uses; never closed
WRITTEN = 10**18  # ns: the time all contents are dated to, so that one that was written to is told by its time
NEW = "new-"  # what the names of directories begin with that are not complete


class ContentStore:
    """The cache of fetched files. Methods raise OSError for a disk that does not do its part."""

    def __init__(self) -> None:
        self.root = cache_dir() / "objects"
        self.blobs, self.index, self.sets, self.locks = (
            self.root / name for name in ("blobs", "index", "sets", "locks")
        )
        for folder in (self.blobs, self.index, self.sets, self.locks):
            folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def only_fetcher(self, identity: str) -> Iterator[None]:
        """Wait for whoever is fetching from the same place, and let others wait until this is done."""
        with self._lock_file(f"place-{_hash(identity)}") as lock:
            _lock(lock, fcntl.LOCK_EX)
            yield

    def known(self, identity: str, name: str, entry: Entry) -> str | None:
        """The SHA-256 of an object of this size and version, if its content is here and as it was written."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            note = json.loads(self._note(identity, name).read_text(encoding="utf-8"))
            if Entry(note["size"], note["version"]) == entry and _is_intact(self.blobs / note["sha256"], entry.size):
                return note["sha256"]
        return None

    def keep(self, identity: str, name: str, entry: Entry, path: Path, *, sha256: str) -> None:
        """Take in a file that was fetched, and note what it is; it may be the content of another object, too."""
        path.chmod(0o444)
        os.utime(path, ns=(WRITTEN, WRITTEN))
        blob = self.blobs / sha256
        if _is_intact(blob, entry.size):
            _link(blob, path)
        else:
            _link(path, blob)
        note = {"size": entry.size, "version": entry.version, "sha256": sha256}
        durable.write_text(self._note(identity, name), json.dumps(note))

    def link(self, sha256: str, path: Path) -> bool:
        """Give a kept content the name `path`; False if it is not here any more."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _link(self.blobs / sha256, path)
        except FileNotFoundError:
            return False
        return True

    def directory(self, hashes: Mapping[str, str]) -> Path | None:
        """The directory with exactly these files, held for this process; None if there is none."""
        directory = self.sets / _set_id(hashes)
        self._use(directory)
        return directory if directory.is_dir() else None

    @contextlib.contextmanager
    def new_directory(self) -> Iterator[Path]:
        """A directory to fill, which nobody evicts meanwhile; gone at the end unless it was committed."""
        directory = self.sets / f"{NEW}{uuid.uuid4().hex}"
        with self._lock_file(directory.name) as lock:
            _lock(lock, fcntl.LOCK_EX)
            directory.mkdir()
            try:
                yield directory
            finally:
                shutil.rmtree(directory, ignore_errors=True)
                Path(lock.name).unlink(missing_ok=True)

    def commit(self, directory: Path, hashes: Mapping[str, str]) -> Path:
        """Make a filled directory the one with these files, and hold it for this process."""
        target = self.sets / _set_id(hashes)
        self._use(target)
        if not target.is_dir():
            directory.rename(target)
        return target

    def free(self) -> int:
        """Bytes free on the disk of the cache."""
        return shutil.disk_usage(self.root).free

    def evict(self, needed: int, *, bound: int) -> None:
        """Remove what no process uses, least recently used first, until `needed` more bytes fit into bound and disk."""
        for leftover in self.sets.glob(f"{NEW}*"):
            if self._remove_unused(leftover):
                (self.locks / leftover.name).unlink(missing_ok=True)
        unused = sorted(self.sets.iterdir(), key=self._last_used)
        while self._size() + needed > bound or self.free() < needed:
            if not self._remove_orphans() and not self._remove_first(unused):
                return

    def _size(self) -> int:
        """Bytes of all contents, however many names each has."""
        sizes = {}
        for folder, _, names in itertools.chain(os.walk(self.blobs), os.walk(self.sets)):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # another process evicts as well
                    state = os.stat(os.path.join(folder, name))
                    sizes[state.st_ino] = state.st_size
        return sum(sizes.values())

    def _remove_orphans(self) -> bool:
        """Remove the contents that no directory has; whether there were any."""
        removed = False
        for blob in self.blobs.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if blob.stat().st_nlink == 1:
                    blob.unlink()
                    removed = True
        return removed

    def _remove_first(self, sets: list[Path]) -> bool:
        while sets:
            if self._remove_unused(sets.pop(0)):
                return True
        return False

    def _remove_unused(self, directory: Path) -> bool:
        """Remove a directory unless a process uses it; whether it was removed."""
        with self._lock_file(directory.name) as lock:
            if not _lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False
            shutil.rmtree(directory, ignore_errors=True)
            return True

    def _use(self, directory: Path) -> None:
        if directory not in _in_use:
            _in_use[directory] = os.open(self.locks / directory.name, os.O_RDWR | os.O_CREAT, 0o666)
            _lock(_in_use[directory], fcntl.LOCK_SH)
        os.utime(self.locks / directory.name)

    def _last_used(self, directory: Path) -> float:
        with contextlib.suppress(FileNotFoundError):
            return (self.locks / directory.name).stat().st_mtime
        return 0.0

    def _lock_file(self, name: str) -> IO[str]:
        return (self.locks / name).open("a", encoding="utf-8")

    def _note(self, identity: str, name: str) -> Path:
        return self.index / f"{_hash(identity, name)}.json"


def _hash(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


def _set_id(hashes: Mapping[str, str]) -> str:
    return _hash(*(word for name in sorted(hashes) for word in (name, hashes[name])))


def _is_intact(blob: Path, size: int) -> bool:
    """Whether a content is there, and as it was when it was taken in: whoever writes to it changes the time."""
    try:
        state = blob.stat()
    except FileNotFoundError:
        return False
    return (state.st_size, state.st_mtime_ns) == (size, WRITTEN)


def _link(source: Path, target: Path) -> None:
    """Let `target` be another name of a file, or a copy where the file system gives none; what it was is replaced.

    Raises FileNotFoundError if there is no `source`.
    """
    partial = partial_of(target)
    durable.second_name(source, partial)
    partial.replace(target)
    partial.unlink(missing_ok=True)  # renaming a name of a file onto another name of it does nothing


def _lock(lock: IO[str] | int, how: int) -> bool:
    """Lock a file; False if another process has it, or if files cannot be locked here: then nothing is evicted."""
    try:
        fcntl.flock(lock, how)
    except OSError:
        return False
    return True
