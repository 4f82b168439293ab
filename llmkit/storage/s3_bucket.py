"""A bucket and an object in it: what uploads and downloads share."""

import enum
import threading
from dataclasses import dataclass, field
from typing import Any

from llmkit.storage.names import Address
from llmkit.storage.s3_client import explained, status_and_code


class Checks(enum.Enum):
    """What a server does with the SHA-256 that comes with a body. Only what it was seen to do counts."""

    REFUSES = "it refuses a body that does not have it: what it takes has arrived unharmed"
    COMPUTES = "it takes any; told nothing, it may compute one itself when the parts are put together"
    NOTHING = "it knows none; what has arrived is known once it is read back"


@dataclass
class Bucket:
    """A bucket, the client that reaches it, and how its server was seen to check what arrives."""

    client: Any
    name: str
    part_size: int  # bytes
    max_attempts: int
    max_concurrency: int
    _checks: Checks | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def checks(self, probe: str) -> Checks:
        """Asked of the server once, with an upload to the key `probe` that is never completed."""
        with self._lock:
            if self._checks is None:
                with explained("cannot be written", Address(self.name, probe).url):
                    self._checks = _seen_checks(self.client, {"Bucket": self.name, "Key": probe})
            return self._checks


@dataclass(frozen=True)
class S3Object:
    bucket: Bucket
    key: str

    @property
    def url(self) -> str:
        return Address(self.bucket.name, self.key).url

    @property
    def client(self) -> Any:
        return self.bucket.client

    @property
    def where(self) -> dict[str, str]:
        """The arguments of boto3's methods that name it."""
        return {"Bucket": self.bucket.name, "Key": self.key}

    def read(self) -> bytes:
        """The content of a small object; asked for again if the connection breaks. Raises what boto3 raises."""
        from botocore.exceptions import BotoCoreError

        for attempt in range(1, self.bucket.max_attempts + 1):
            response = self.client.get_object(**self.where)
            try:
                return response["Body"].read()
            except BotoCoreError:
                if attempt == self.bucket.max_attempts:
                    raise
        raise AssertionError("unreachable")


def _seen_checks(client: Any, where: dict[str, str]) -> Checks:
    """Send a part with a wrong SHA-256 and see whether the server notices; servers differ, and some only echo it."""
    from botocore.exceptions import ClientError

    wrong = "A" * 43 + "="  # 32 zero bytes in base64
    upload = None
    try:
        upload = client.create_multipart_upload(**where, ChecksumAlgorithm="SHA256")["UploadId"]
        client.upload_part(**where, UploadId=upload, PartNumber=1, Body=b"llmkit", ChecksumSHA256=wrong)
        return Checks.COMPUTES
    except ClientError as error:
        status, code = status_and_code(error)
        if status not in (400, 501):
            raise
        return Checks.REFUSES if "Digest" in code or "Checksum" in code else Checks.NOTHING
    finally:
        if upload:
            client.abort_multipart_upload(**where, UploadId=upload)
