"""Fetching an object in ranges that run at the same time, hashed in order while they arrive."""

import contextlib
import hashlib
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmkit.storage.errors import DamagedError, StorageError
from llmkit.storage.local import BLOCK, commit, partial_of, reserve
from llmkit.storage.local import explained as explained_here
from llmkit.storage.s3_bucket import S3Object
from llmkit.storage.s3_client import explained, status_and_code
from llmkit.storage.transfers import Abandoned

FIRST_PAUSE = 0.2  # seconds before a range whose connection broke is asked for again; doubled each time

Take = Callable[[int, memoryview], Any]  # gets an offset in the object and the bytes that lie there


class Changed(Exception):
    """The object is not the one whose first bytes were fetched, or not the size it should be."""


def fetch_range(
    source: S3Object, start: int, end: int, take: Take, *, size: int, stop: threading.Event, etag: str | None = None
) -> str:
    """Hand the bytes from `start` to `end` of an object of `size` bytes to `take`, in order; returns the object's ETag.

    A connection that breaks is taken up where it broke, `storage.max_attempts` times in a row. Raises Changed if the
    object has another size, or another ETag than the one given.
    """
    from botocore.exceptions import BotoCoreError
    from urllib3.exceptions import HTTPError

    block = memoryview(bytearray(min(BLOCK, end - start) or 1))
    position, failures = start, 0
    while True:
        try:
            response = _ask(source, position, end, size)
            if etag not in (None, response["ETag"]):
                raise Changed(f"it was replaced by another one while it was fetched ({etag}, then {response['ETag']})")
            etag = response["ETag"]
            filled, body = 0, response["Body"]
            try:
                with body:  # as what it gives is the stream within, which does not notice an early end
                    while count := body.readinto(block[filled:]):
                        if stop.is_set():
                            raise Abandoned
                        filled, failures = filled + count, 0
                        if filled == len(block):  # many small pieces in one: handing one on costs more than its bytes
                            take(position, block)
                            position, filled = position + filled, 0
            finally:  # of a connection that breaks too
                if filled:
                    take(position, block[:filled])
                    position += filled
            if position == end:
                return etag
            raise Changed(f"it ended after {position:,} of {end:,} bytes")
        except (BotoCoreError, HTTPError, ConnectionError):
            failures += 1
            if failures == source.bucket.max_attempts:
                raise
            if stop.wait(FIRST_PAUSE * 2**failures):
                raise Abandoned from None


def _ask(source: S3Object, start: int, end: int, size: int) -> Any:
    """The answer to a request for a range, once it is certain that it is one of an object of `size` bytes."""
    from botocore.exceptions import ClientError

    whole = (start, end) == (0, size)
    try:
        response = source.client.get_object(**source.where, **({} if whole else {"Range": f"bytes={start}-{end - 1}"}))
    except ClientError as error:
        if status_and_code(error)[0] == 416:
            raise Changed(f"it has fewer than {size:,} bytes") from error
        raise
    total = response["ContentLength"] if whole else int(response.get("ContentRange", "/-1").rpartition("/")[2])
    if total == -1:
        raise StorageError(f"{source.url} cannot be fetched in parts: the server ignores the header Range.")
    if total != size:
        response["Body"].close()
        raise Changed(f"it has {total:,} bytes and not {size:,}")
    return response


class S3Download:
    """The interface is `llmkit.storage.transfers.Transfer`."""

    def __init__(self, source: S3Object, target: Path, *, sha256: str | None = None, size: int | None = None):
        self.source, self.target, self.expected = source, target, sha256
        self.size = _size_of(source) if size is None else size
        self.part_size = source.bucket.part_size
        self.pieces = max(1, math.ceil(self.size / self.part_size))
        self.sha256 = ""
        self.on_complete: Callable[[str], None] | None = None
        self._partial = partial_of(target)
        self._reserved = False
        self._lock = threading.Lock()
        self._begin()

    def run(self, piece: int, stop: threading.Event) -> int:
        moved = self._fetch(piece, stop)
        if self._hash_what_arrived(piece, stop):
            self._finish(stop)
        return moved

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._partial.unlink()

    def _begin(self) -> None:
        self._etag: str | None = None
        self._flaw = ""
        self._digest = hashlib.sha256()
        self._arrived: set[int] = set()
        self._hashed = 0  # pieces, from the first
        self._hashing = False

    def _bounds(self, piece: int) -> tuple[int, int]:
        return piece * self.part_size, min((piece + 1) * self.part_size, self.size)

    def _fetch(self, piece: int, stop: threading.Event) -> int:
        if self._flaw:  # the rest is fetched for nothing: all of it comes again
            return 0
        start, end = self._bounds(piece)
        descriptor = self._open()
        try:
            with explained("cannot be fetched", self.source.url):
                etag = fetch_range(
                    self.source,
                    start,
                    end,
                    lambda offset, data: _write(descriptor, data, offset, self.target),
                    size=self.size,
                    stop=stop,
                    etag=self._etag,
                )
                self._etag = self._etag or etag
        except Changed as changed:
            self._flaw = str(changed)
        finally:
            os.close(descriptor)
        return end - start

    def _open(self) -> int:
        with self._lock, explained_here("cannot be written", str(self.target)):
            if not self._reserved:
                self.target.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT, 0o666)
            if not self._reserved:
                reserve(descriptor, self.size)
                self._reserved = True
            return descriptor

    def _hash_what_arrived(self, piece: int, stop: threading.Event) -> bool:
        """Hash on from the beginning of the file as far as it has arrived; True for whoever hashes the last piece.

        One thread at a time: the bytes come from the page cache, and the others go on fetching.
        """
        with self._lock:
            self._arrived.add(piece)
            if self._hashing:
                return False
            self._hashing = True
        while True:
            with self._lock:
                if self._hashed not in self._arrived:
                    self._hashing = False
                    return self._hashed == self.pieces
            self._hash(*self._bounds(self._hashed), stop)
            self._hashed += 1

    def _hash(self, start: int, end: int, stop: threading.Event) -> None:
        block = memoryview(bytearray(BLOCK))
        with explained_here("cannot be read", str(self.target)), self._partial.open("rb", buffering=0) as file:
            file.seek(start)
            while start < end and (count := file.readinto(block[: end - start])):
                if stop.is_set():
                    raise Abandoned
                self._digest.update(block[:count])
                start += count

    def _finish(self, stop: threading.Event) -> None:
        if flaw := self._flaw_found():
            self._fetch_again(stop)
            if self._flaw_found():
                raise DamagedError(
                    f"{self.source.url} is not what it should be, fetched twice: {flaw}. It was replaced or damaged; "
                    "nothing of it was kept."
                )
        with explained_here("cannot be written", str(self.target)):
            commit(self._partial, self.target)
        if self.on_complete:
            self.on_complete(self.sha256)

    def _flaw_found(self) -> str:
        self.sha256 = self._digest.hexdigest()
        if not self._flaw and self.expected not in (None, self.sha256):
            self._flaw = f"its SHA-256 is {self.sha256} and not {self.expected}"
        return self._flaw

    def _fetch_again(self, stop: threading.Event) -> None:
        self._begin()
        for piece in range(self.pieces):
            self._fetch(piece, stop)
            self._hash_what_arrived(piece, stop)


def _write(descriptor: int, data: memoryview, offset: int, target: Path) -> None:
    with explained_here("cannot be written", str(target)):
        while data:
            count = os.pwrite(descriptor, data, offset)
            data, offset = data[count:], offset + count


def _size_of(source: S3Object) -> int:
    with explained("cannot be fetched", source.url):
        return source.client.head_object(**source.where)["ContentLength"]
