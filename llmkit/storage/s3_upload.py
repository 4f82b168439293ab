"""Sending a file to a bucket in parts, and knowing by SHA-256 that what arrived is what was sent.

A server that refuses a body with a wrong SHA-256 has verified whatever it took. Any other server is not told the
SHA-256, so that it cannot echo it: if it then reports the right one it has computed it from what it holds; if it
reports none, the file is read back.
"""

import base64
import contextlib
import errno
import hashlib
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from llmkit.storage.errors import StorageError
from llmkit.storage.local import BLOCK
from llmkit.storage.local import explained as explained_here
from llmkit.storage.s3_bucket import Checks, S3Object
from llmkit.storage.s3_client import explained, status_and_code
from llmkit.storage.s3_download import Changed, fetch_range
from llmkit.storage.transfers import Abandoned

MOST_PARTS = 10_000  # https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html


class S3Upload:
    """The interface is `llmkit.storage.transfers.Transfer`."""

    def __init__(self, source: Path, target: S3Object, *, checks: Checks, sha256: str | None = None):
        self.source, self.target, self.checks, self.sha256 = source, target, checks, sha256 or ""
        with explained_here("cannot be read", str(source)):
            self.size = source.stat().st_size
        self.part_size = max(target.bucket.part_size, math.ceil(self.size / MOST_PARTS))
        self.parts = max(1, math.ceil(self.size / self.part_size))
        # A file sent in several parts is hashed as a whole beside them, if it should have a certain SHA-256.
        self.pieces = self.parts + (1 if sha256 and self.parts > 1 else 0)
        self.on_complete: Callable[[str], None] | None = None
        self._left = self.pieces
        self._lock = threading.Lock()
        self._upload: str | None = None
        self._sent: dict[int, dict[str, Any]] = {}  # by part, as complete_multipart_upload wants them
        self._digests: dict[int, bytes] = {}

    def run(self, piece: int, stop: threading.Event) -> int:
        with explained("cannot be written", self.target.url):
            moved = self._send(piece, stop) if piece < self.parts else self._check_whole(stop)
            with self._lock:
                self._left -= 1
                last = self._left == 0
            if last:
                self._finish(stop)
        if last and self.on_complete:
            self.on_complete(self.sha256)
        return moved

    def abandon(self) -> None:
        with self._lock, contextlib.suppress(Exception):  # a stale one is aborted later
            if self._upload:
                self.target.client.abort_multipart_upload(**self.target.where, UploadId=self._upload)
                self._upload = None

    def _bounds(self, part: int) -> tuple[int, int]:
        return part * self.part_size, min((part + 1) * self.part_size, self.size)

    def _send(self, part: int, stop: threading.Event) -> int:
        start, end = self._bounds(part)
        with explained_here("cannot be read", str(self.source)), self.source.open("rb", buffering=0) as file:
            body = _FilePart(file, start, end, stop)
            digest = self._digests[part] = body.sha256()
            if self.parts == 1:
                self._check(digest.hex())
                _until_taken(lambda: self._put(body, digest), self.target)
            else:
                self._sent[part] = _until_taken(lambda: self._put_part(part, body, digest), self.target)
        return end - start

    def _put(self, body: "_FilePart", digest: bytes) -> None:
        body.seek(0)
        self.target.client.put_object(**self.target.where, Body=body, **self._told(digest))

    def _put_part(self, part: int, body: "_FilePart", digest: bytes) -> dict[str, Any]:
        body.seek(0)
        told = self._told(digest)
        number: dict[str, Any] = {"PartNumber": part + 1}
        response = self.target.client.upload_part(
            **self.target.where, **number, UploadId=self._upload_id(), Body=body, **told
        )
        return number | told | {"ETag": response["ETag"]}

    def _told(self, digest: bytes) -> dict[str, str]:
        return {"ChecksumSHA256": base64.b64encode(digest).decode()} if self.checks is Checks.REFUSES else {}

    def _upload_id(self) -> str:
        with self._lock:
            if self._upload is None:
                algorithm = {} if self.checks is Checks.NOTHING else {"ChecksumAlgorithm": "SHA256"}
                response = self.target.client.create_multipart_upload(**self.target.where, **algorithm)
                self._upload = response["UploadId"]
            return self._upload

    def _check_whole(self, stop: threading.Event) -> int:
        with explained_here("cannot be read", str(self.source)), self.source.open("rb", buffering=0) as file:
            self._check(_FilePart(file, 0, self.size, stop).sha256().hex())
        return 0

    def _check(self, sha256: str) -> None:
        if self.sha256 and self.sha256 != sha256:
            raise StorageError(
                f"{self.source} is not what was written: its SHA-256 is {sha256} and not {self.sha256}. It is not sent."
            )
        self.sha256 = sha256

    def _finish(self, stop: threading.Event) -> None:
        if self._arrived(stop):
            return
        for part in range(self.parts):
            self._send(part, stop)
        if not self._arrived(stop):
            raise StorageError(
                f"{self.target.url} does not hold what was sent, twice: the bytes change on the way or on the server. "
                "Check the network and storage.endpoint_url."
            )

    def _arrived(self, stop: threading.Event) -> bool:
        """Put the parts together; whether the object is certain to be the file."""
        told = None
        if self.parts > 1:
            told = self._complete()
        elif self.checks is Checks.REFUSES:
            return True
        if told is not None:
            return told.partition("-")[0] == self._sha256_of_parts()
        return self._read_back(stop)

    def _complete(self) -> str | None:
        """Make an object of the parts; the SHA-256 of the parts' SHA-256s as the server says it, if it does."""
        from botocore.exceptions import ClientError

        try:
            response = self.target.client.complete_multipart_upload(
                **self.target.where,
                UploadId=self._upload,
                MultipartUpload={"Parts": [self._sent[part] for part in sorted(self._sent)]},
            )
        except ClientError as error:
            # The answer to an earlier attempt was lost: it may have been done. What is there now will tell.
            if status_and_code(error)[1] != "NoSuchUpload":
                raise
            response = {}
        self._upload = None
        if self.checks is Checks.NOTHING:
            return None
        told = response.get("ChecksumSHA256")
        return told or self.target.client.head_object(**self.target.where, ChecksumMode="ENABLED").get("ChecksumSHA256")

    def _sha256_of_parts(self) -> str:
        joined = b"".join(self._digests[part] for part in range(self.parts))
        return base64.b64encode(hashlib.sha256(joined).digest()).decode()

    def _read_back(self, stop: threading.Event) -> bool:
        """Whether the object, fetched again, has the SHA-256 of what was sent."""
        try:
            return all(self._digest_there(part, stop) == self._digests[part] for part in range(self.parts))
        except Changed:
            return False

    def _digest_there(self, part: int, stop: threading.Event) -> bytes:
        digest = hashlib.sha256()

        def take(_: int, data: memoryview) -> None:
            digest.update(data)

        fetch_range(self.target, *self._bounds(part), take, size=self.size, stop=stop)
        return digest.digest()


def put_verified(target: S3Object, data: bytes, *, checks: Checks) -> None:
    """Write a small object in one request, once more if it did not arrive unharmed. Raises StorageError."""
    digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
    told = {"ChecksumSHA256": digest} if checks is Checks.REFUSES else {}
    with explained("cannot be written", target.url):
        for _ in range(2):
            _until_taken(lambda: target.client.put_object(**target.where, Body=data, **told), target)
            if told or target.read() == data:
                return
    raise StorageError(f"{target.url} does not hold what was sent, twice. Check the network and storage.endpoint_url.")


def _until_taken(send: Callable[[], Any], target: S3Object) -> Any:
    """Send again what the server refuses as damaged on the way, `storage.max_attempts` times in all."""
    from botocore.exceptions import ClientError

    for attempt in range(1, target.bucket.max_attempts + 1):
        try:
            return send()
        except ClientError as error:
            code = status_and_code(error)[1]
            if not ("Digest" in code or "Checksum" in code) or attempt == target.bucket.max_attempts:
                raise
    raise AssertionError("unreachable")


class _FilePart:
    """The bytes from `start` to `end` of a file, as a body for boto3.

    It gives a block where http.client asks for 16 KiB: a twentieth of the system calls, and no more than a block of
    memory however large the part.
    """

    def __init__(self, file: IO[bytes], start: int, end: int, stop: threading.Event):
        self._file, self._start, self._end, self._stop = file, start, end, stop
        self._position = start

    def read(self, amount: int = -1) -> bytes:
        if self._stop.is_set():
            raise Abandoned
        left = self._end - self._position
        data = os.pread(self._file.fileno(), left if amount < 0 else min(left, max(amount, BLOCK)), self._position)
        if left and not data:
            raise OSError(errno.EIO, "it became shorter while it was sent")
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = (self._start, self._position, self._end)[whence] + offset
        return self.tell()

    def tell(self) -> int:
        return self._position - self._start

    def sha256(self) -> bytes:
        digest = hashlib.sha256()
        while block := self.read(BLOCK):
            digest.update(block)
        self.seek(0)
        return digest.digest()
