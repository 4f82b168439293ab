"""What `s3://` addresses stand for on this machine: copies in llmkit's cache, fetched when they are first asked for.

    reach_with(config.storage)
    directory = local_copy("s3://bucket/models/mistral7b")

The config keeps the address; only whoever opens a file asks for the copy. A process has one run, so how buckets are
reached is said once, and what an address was found to hold stays the same to the end.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.byte_progress import byte_progress
from llmkit.config.schema import StorageConfig
from llmkit.errors import ConfigError
from llmkit.storage import names

if TYPE_CHECKING:
    from llmkit.storage import Entry

SCHEME = "s3://"

_reached_with = StorageConfig()
_listings: dict[str, dict[str, "Entry"]] = {}
_copies: dict[tuple[str, frozenset[str]], Path] = {}


def reach_with(config: StorageConfig) -> None:
    """Reach buckets as `config` says from now on, and look anew at what they hold."""
    global _reached_with
    _reached_with = config
    _listings.clear()
    _copies.clear()


def is_remote(path: str | None) -> bool:
    """Whether `path` is an address in a bucket. Raises ConfigError for one that is nearly or not quite."""
    return path is not None and names.is_remote(path)


def joined(address: str, name: str) -> str:
    """The address of the file `name` below `address`."""
    return f"{address.rstrip('/')}/{name}"


def split_address(address: str) -> tuple[str, str]:
    """The directory of an address, and the last part of its name: empty where it names a bucket alone."""
    bucket, _, path = address.removeprefix(SCHEME).rstrip("/").partition("/")
    above, _, name = path.rpartition("/")
    return SCHEME + "/".join(filter(None, (bucket, above))), name


def files_at(address: str) -> dict[str, "Entry"]:
    """The files below `address` by their names relative to it; none if there is no such directory.

    Raises StorageError if the store does not say, ConfigError for an address that is not well formed.
    """
    from llmkit.storage import open_place

    if address not in _listings:
        _listings[address] = open_place(address, _reached_with).files()
    return _listings[address]


def local_copy(address: str, names: Iterable[str] | None = None) -> Path:
    """A directory on this machine that holds the files `names` below `address`, under these names; all, without them.

    It is read only: other runs share it. How far the fetching is, is said on stderr where it takes long.

    Raises ConfigError if nothing is there, StorageError if it cannot be fetched.
    """
    from llmkit.storage import StorageError, cache_dir, open_place
    from llmkit.storage.content import fetch_directory

    there = files_at(address)
    wanted = sorted(there if names is None else names)
    if not wanted:
        raise ConfigError(f"{address}: there is nothing at this address; check it, and storage.endpoint_url.")
    key = address, frozenset(wanted)
    if key not in _copies:
        place = open_place(address, _reached_with)
        try:
            with byte_progress(f"fetching {address}", sum(there[name].size for name in wanted)) as progress:
                _copies[key] = fetch_directory(place, wanted, config=_reached_with, progress=progress)
        except OSError as error:
            why = error.strerror or error
            raise StorageError(f"{address} cannot be kept in {cache_dir()}: {why}; see LLMKIT_CACHE.") from error
    return _copies[key]
