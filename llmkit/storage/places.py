"""Places where files are kept, on this machine or in a bucket, behind one small interface.

place = open_place("s3://bucket/runs/alpha", config.storage)
place.upload(Path("final/model.safetensors"), "final/model.safetensors")
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from llmkit.storage.names import is_remote, storage_problems
from llmkit.storage.transfers import Transfer

if TYPE_CHECKING:  # the config's checks ask about addresses, so no import leads back
    from llmkit.config.schema import StorageConfig

__all__ = ["Entry", "Place", "is_remote", "open_place", "storage_problems"]


class Entry(NamedTuple):
    """What a place tells of a file without reading it."""

    size: int  # bytes
    version: str  # changes when the content does: the ETag; on this machine the size and the time of writing


class Place(Protocol):
    """A directory, local or in a bucket. Names of files are relative to it and separated by `/`.

    Every method raises StorageError for whatever goes wrong; that a file is not there is no error.
    """

    url: str  # what to print; holds no secrets
    identity: str  # tells it from every other place, also on another server; never printed
    threads: int  # how many pieces of files it takes at a time

    def files(self, under: str = "") -> dict[str, Entry]:
        """All files, or those whose name begins with `under` and a slash; sorted by name."""

    def read(self, name: str) -> bytes | None:
        """The content of a small file, or None if the place says that there is no such file."""

    def write(self, name: str, data: bytes) -> None:
        """Write a small file in one step: a reader sees the old content or the new, never a part of it."""

    def upload(self, source: Path, name: str, *, sha256: str | None = None) -> None:
        """Send a file, in parts and in parallel, and verify what arrived; with `sha256`, also what was sent."""

    def download(self, name: str, target: Path, *, sha256: str | None = None, size: int | None = None) -> str:
        """Fetch a file to `target`, on the disk when the call returns, and return its SHA-256.

        `target` appears whole or not at all. What does not have the SHA-256 and size given is fetched once more.
        """

    def delete(self, names: Iterable[str]) -> None:
        """Delete files, in any order; those that are not there count as deleted."""

    def abort_stale_uploads(self, under: str = "", *, older_than: float = 86400.0) -> int:
        """Discard uploads that began more than `older_than` seconds ago and never ended; how many there were."""

    def place(self, under: str) -> "Place":
        """The directory `under` of this place."""

    def uploading(self, source: Path, name: str, *, sha256: str | None = None) -> Transfer:
        """`upload`, in pieces for `run_transfers`."""

    def downloading(self, name: str, target: Path, *, sha256: str | None = None, size: int | None = None) -> Transfer:
        """`download`, in pieces for `run_transfers`."""


def open_place(place: str | Path, config: "StorageConfig") -> Place:
    """The directory that `place` names: `s3://BUCKET/PATH`, or a path on this machine. Nothing is asked of it yet.

    Raises ConfigError for an address that is not well formed, StorageError for a profile that does not exist.
    """
    if is_remote(str(place)):
        from llmkit.storage.s3 import open_bucket

        return open_bucket(str(place), config)
    from llmkit.storage.local import LocalPlace

    return LocalPlace(Path(place).expanduser())
