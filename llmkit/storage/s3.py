"""A directory in a bucket as a place."""

import datetime
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llmkit.config.schema import StorageConfig
from llmkit.storage.errors import StorageError
from llmkit.storage.names import Address, address_of, check_names
from llmkit.storage.places import Entry
from llmkit.storage.s3_bucket import Bucket, S3Object
from llmkit.storage.s3_client import explained, open_client, status_and_code
from llmkit.storage.s3_download import S3Download
from llmkit.storage.s3_upload import S3Upload, put_verified
from llmkit.storage.transfers import run_transfers

MIB = 2**20
PROBE = ".llmkit-probe"  # an upload that is never completed: no object of this name comes to be


def open_bucket(url: str, config: StorageConfig) -> "S3Place":
    """The place an `s3://BUCKET/PATH` URL names. Raises ConfigError for a URL that is not well formed."""
    address = address_of(url)
    bucket = Bucket(
        client=open_client(config, url=address.url),
        name=address.bucket,
        part_size=config.part_size_mib * MIB,
        max_attempts=config.max_attempts,
        max_concurrency=config.max_concurrency,
    )
    return S3Place(bucket, address.prefix)


class S3Place:
    """The interface is `llmkit.storage.places.Place`."""

    def __init__(self, bucket: Bucket, prefix: str):
        self.bucket, self.prefix = bucket, prefix
        self.url = Address(bucket.name, prefix).url
        self.identity = f"{bucket.client.meta.endpoint_url} {self.url}"
        self.threads = bucket.max_concurrency

    def files(self, under: str = "") -> dict[str, Entry]:
        prefix = self._key(under) + "/" if under or self.prefix else ""
        url = Address(self.bucket.name, prefix.rstrip("/")).url
        found = {}
        for page in self._pages(self.bucket.client.list_objects_v2, "ContinuationToken", url, Prefix=prefix):
            for item in page.get("Contents", ()):
                # Consoles make "directories": empty objects whose name ends with a slash.
                if item["Size"] or not item["Key"].endswith("/"):
                    found[self._name(item["Key"])] = Entry(item["Size"], item["ETag"])
        return dict(sorted(found.items()))

    def read(self, name: str) -> bytes | None:
        from botocore.exceptions import ClientError

        source = self._object(name)
        with explained("cannot be read", source.url):
            try:
                return source.read()
            except ClientError as error:
                status, code = status_and_code(error)
                if code == "NoSuchKey" or (status == 404 and code != "NoSuchBucket" and self._is_absent(source)):
                    return None
                raise

    def write(self, name: str, data: bytes) -> None:
        put_verified(self._object(name), data, checks=self._checks())

    def upload(self, source: Path, name: str, *, sha256: str | None = None) -> None:
        run_transfers([self.uploading(source, name, sha256=sha256)], threads=self.threads)

    def download(self, name: str, target: Path, *, sha256: str | None = None, size: int | None = None) -> str:
        transfer = self.downloading(name, target, sha256=sha256, size=size)
        run_transfers([transfer], threads=self.threads)
        return transfer.sha256

    def delete(self, names: Iterable[str]) -> None:
        # One by one: some S3-compatible servers do not know DeleteObjects, or want another checksum with it.
        for name in names:
            target = self._object(name)
            with explained("cannot be deleted", target.url):
                self.bucket.client.delete_object(**target.where)

    def abort_stale_uploads(self, under: str = "", *, older_than: float = 86400.0) -> int:
        prefix = self._key(under) + "/" if under or self.prefix else ""
        before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=older_than)
        aborted = 0
        for page in self._pages(self.bucket.client.list_multipart_uploads, "KeyMarker", self.url, Prefix=prefix):
            for item in page.get("Uploads", ()):
                if item["Initiated"] <= before:
                    with explained("cannot be tidied", self.url):
                        where = {"Bucket": self.bucket.name, "Key": item["Key"]}
                        self.bucket.client.abort_multipart_upload(**where, UploadId=item["UploadId"])
                    aborted += 1
        return aborted

    def place(self, under: str) -> "S3Place":
        return S3Place(self.bucket, self._key(under))

    def uploading(self, source: Path, name: str, *, sha256: str | None = None) -> S3Upload:
        return S3Upload(source, self._object(name), checks=self._checks(), sha256=sha256)

    def downloading(self, name: str, target: Path, *, sha256: str | None = None, size: int | None = None) -> S3Download:
        return S3Download(self._object(name), target, sha256=sha256, size=size)

    def _key(self, name: str) -> str:
        return "/".join(filter(None, (self.prefix, name)))

    def _name(self, key: str) -> str:
        return key.removeprefix(self.prefix + "/") if self.prefix else key

    def _object(self, name: str) -> S3Object:
        check_names([name], self.url)
        return S3Object(self.bucket, self._key(name))

    def _checks(self) -> Any:
        return self.bucket.checks(self._key(PROBE))

    def _is_absent(self, source: S3Object) -> bool:
        """Whether a listing, which only an S3 server gives, agrees that there is no such object."""
        client = self.bucket.client
        pages = self._pages(client.list_objects_v2, "ContinuationToken", source.url, Prefix=source.key)
        return all(item["Key"] != source.key for page in pages for item in page.get("Contents", ()))

    def _pages(self, ask: Any, marker: str, url: str, **arguments: str) -> Iterator[Any]:
        """All pages of a listing. Raises StorageError for one that is no listing, or breaks off without saying how
        to go on: taken for complete it would be a silent loss.
        """
        position: dict[str, str] = {}
        while True:
            with explained("cannot be listed", url):
                page = ask(Bucket=self.bucket.name, **arguments, **position)
            if "IsTruncated" not in page:
                raise StorageError(f"{url} cannot be listed: the answer is no listing; check storage.endpoint_url.")
            yield page
            if not page["IsTruncated"]:
                return
            before, position = position, _next(page, marker)
            if not position or position == before:
                raise StorageError(
                    f"{url} cannot be listed: the listing was cut off; try again, or ask who runs the server."
                )


def _next(page: dict[str, Any], marker: str) -> dict[str, str]:
    """Where the next page begins, as arguments of the next request."""
    names = {marker: f"Next{marker}"}
    if marker == "KeyMarker":
        names["UploadIdMarker"] = "NextUploadIdMarker"
    return {name: page[said] for name, said in names.items() if page.get(said)}
