"""Rows that were fetched, put where they belong: a directory is replaced as a whole, a bucket's files one by one."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmkit.byte_progress import byte_progress
from llmkit.data.fetching.destination import (
    MANIFEST,
    OTHER,
    UNFINISHED,
    Destination,
    Origin,
    as_manifest,
    with_versions,
)
from llmkit.durable import sync_tree
from llmkit.errors import ConfigError
from llmkit.rundir import write_json
from llmkit.storage import Entry, StorageError, cache_dir, upload_files


def check_free(destination: Destination, origin: Origin, limit: int | None) -> None:
    """Raise ConfigError unless the place may be taken: absent, empty, or all of it an earlier fetch from there."""
    to, directory = destination.to, destination.directory
    if directory and (directory == Path.cwd() or directory in Path.cwd().parents):
        raise ConfigError(f"to={to}: holds the directory you work in, and is replaced as a whole; {OTHER}.")
    there, finished = _there(destination), destination.read(MANIFEST)
    manifest = finished or destination.read(UNFINISHED)
    destination.refuse_if_taken(there, manifest, origin)
    if manifest is None:
        return
    destination.refuse_strangers(there, manifest)
    if limit is not None and manifest.get("limit") is None:
        raise ConfigError(f"to={to}: holds all rows of this source; limit={limit} would leave fewer: {OTHER}.")
    if finished:
        destination.refuse_changed(there, finished)


@contextmanager
def scratch_for(destination: Destination) -> Iterator[Path]:
    """A new directory, on the disk of a local destination; after the block it is gone, unless moved, with all that was
    made for it.
    """
    to = destination.directory or cache_dir() / "fetching" / "rows"
    made = [parent for parent in to.parents if not parent.exists()]  # innermost first
    # Not tempfile.mkdtemp: its mode 0700 would survive the rename and lock other users out.
    scratch = to.with_name(f".{to.name}.{uuid.uuid4().hex}")
    try:
        try:
            scratch.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"to={destination.to}: cannot be made ({error.strerror}); {OTHER}.") from error
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # not empty: `to` is in it
                parent.rmdir()


def deliver(scratch: Path, destination: Destination, files: dict[str, Any], origin: Origin, limit: int | None) -> None:
    """Make the complete `scratch` the content of the destination, with the manifest of `files`, and replace an earlier
    fetch.
    """
    if destination.directory:
        write_json(scratch / MANIFEST, as_manifest(files, origin, limit=limit))
        _move_into_place(scratch, destination.directory)
        return
    place = destination.place
    earlier = destination.read(MANIFEST) or destination.read(UNFINISHED) or {"files": {}}
    with suppress(StorageError):  # not everybody may list them, and they cost no more than room
        place.abort_stale_uploads()
    # From here on a reader finds no manifest, until all of it is there; who fetches again knows whose files these are.
    destination.write(UNFINISHED, earlier["files"] | files, origin, limit=limit)
    place.delete([MANIFEST])
    with byte_progress(f"sending to {place.url}", sum(facts["bytes"] for facts in files.values())) as progress:
        hashes = {name: facts["sha256"] for name, facts in files.items()}
        upload_files(place, scratch, files, hashes=hashes, progress=progress)
    place.delete(earlier["files"].keys() - files.keys())
    destination.write(MANIFEST, with_versions(files, place.files()), origin, limit=limit)
    place.delete([UNFINISHED])


def _there(destination: Destination) -> dict[str, Entry]:
    """The files of the place; here everything that lies in it, since all of it is replaced."""
    directory = destination.directory
    if directory is None:
        return destination.place.files()
    if not directory.exists():
        return {}
    return {path.name: Entry(path.stat().st_size, "") for path in sorted(directory.iterdir())}


def _move_into_place(scratch: Path, to: Path) -> None:
    """Make the complete `scratch` the new `to`; an earlier one steps aside first, and comes back if that fails."""
    sync_tree(scratch)
    if not to.exists():
        scratch.rename(to)
        return
    shutil.copymode(to, scratch)
    aside = to.with_name(f".{to.name}.{uuid.uuid4().hex}")
    try:
        to.rename(aside)
        scratch.rename(to)
    except BaseException:
        if aside.exists() and not to.exists():
            aside.rename(to)
        raise
    shutil.rmtree(aside)


def seen_from(destination: Destination, path: Path) -> str:
    """A path relative to the directory, which tells nothing of the rest of the machine; of a bucket its name alone."""
    return os.path.relpath(path.resolve(), destination.directory) if destination.directory else path.name
