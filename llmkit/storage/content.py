"""Files of a bucket as a local directory: fetched once, kept by content, shared by all jobs on this machine.

directory = fetch_directory(open_place("s3://bucket/models/mistral", config.storage), config=config.storage)
"""

from collections.abc import Iterable
from pathlib import Path

from llmkit.config.schema import StorageConfig
from llmkit.storage.content_store import ContentStore
from llmkit.storage.errors import StorageError
from llmkit.storage.local import LocalPlace
from llmkit.storage.local import explained as explained_here
from llmkit.storage.names import check_names
from llmkit.storage.places import Entry, Place
from llmkit.storage.transfers import Progress, download_files

GIB = 2**30


def fetch_directory(
    place: Place, names: Iterable[str] | None = None, *, config: StorageConfig, progress: Progress | None = None
) -> Path:
    """A local directory with the files `names` of `place`, or with all of them; to be read, never written.

    A place on this machine is returned as it is. Of a bucket only what is not in the cache is fetched: a file counts as
    unchanged while its size and ETag do. The directory stays while this process lives; after that it may be evicted in
    favour of others, the least recently used first, to keep the cache below `storage.cache_gib`. Jobs that want the
    same place wait for the one that fetches it; one that is killed leaves what it had completed to the next.

    Raises StorageError for a place without files, for names that are not there or lead outside, and if the disk has no
    room.
    """
    if isinstance(place, LocalPlace):
        return place.directory
    entries = _entries(place, names)
    check_names(list(entries), place.url)
    with explained_here("cannot be fetched into the cache", place.url):
        return _fetch(place, entries, config, progress)


def _fetch(place: Place, entries: dict[str, Entry], config: StorageConfig, progress: Progress | None) -> Path:
    store = ContentStore()

    def keep(name: str, sha256: str) -> None:
        store.keep(place.identity, name, entries[name], directory / name, sha256=sha256)

    with store.only_fetcher(place.identity):
        known = {name: store.known(place.identity, name, entry) for name, entry in entries.items()}
        hashes = {name: sha256 for name, sha256 in known.items() if sha256}
        if len(hashes) == len(entries) and (ready := store.directory(hashes)):
            return ready
        with store.new_directory() as directory:
            for name, sha256 in list(hashes.items()):
                if not store.link(sha256, directory / name):  # it has just been evicted
                    del hashes[name]
            missing = {name: entry for name, entry in entries.items() if name not in hashes}
            _make_room(store, place, sum(entry.size for entry in missing.values()), config)
            hashes |= download_files(
                place,
                missing,
                directory,
                sizes={name: entry.size for name, entry in missing.items()},
                progress=progress,
                arrived=keep,
            )
            return store.commit(directory, hashes)


def _entries(place: Place, names: Iterable[str] | None) -> dict[str, Entry]:
    entries = place.files()
    if not entries:
        raise StorageError(f"{place.url} holds no files; check the bucket and the path.")
    if names is None:
        return entries
    wanted = list(names)
    if missing := [name for name in wanted if name not in entries]:
        raise StorageError(f"{place.url} does not hold {', '.join(missing)}; it holds {', '.join(list(entries)[:10])}.")
    return {name: entries[name] for name in wanted}


def _make_room(store: ContentStore, place: Place, needed: int, config: StorageConfig) -> None:
    """Evict what keeps the cache above its bound, or the disk too full. Raises StorageError if that is not enough."""
    store.evict(needed, bound=int(config.cache_gib * GIB))
    if (free := store.free()) < needed:
        raise StorageError(
            f"{place.url} needs {needed / GIB:.2f} GiB in {store.root}, where {free / GIB:.2f} GiB are free; make room "
            "there, or set LLMKIT_CACHE to a directory on another disk."
        )
