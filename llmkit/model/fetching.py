"""A hub model, brought to a directory or a bucket: its weights once, in safetensors, every file verified.

`manifest.json`, written last, says what is there: model, revision and commit, and size and SHA-256 of each file. What a
fetch that was killed has brought stands in a manifest of its own, so the same command goes on with what is missing.
"""

import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from llmkit import durable
from llmkit.byte_progress import Progress, byte_progress, in_bytes
from llmkit.config.schema import ModelConfig
from llmkit.data.fetching.destination import MANIFEST, OTHER, UNFINISHED, Destination, Origin, with_versions
from llmkit.errors import ConfigError, LlmkitError
from llmkit.model.files import model_files
from llmkit.model.hub import HubFile, HubModel, look_up
from llmkit.model.source import explained
from llmkit.storage import Entry, StorageError, cache_dir
from llmkit.storage.names import check_names

FILES_AT_A_TIME = 4
SCRATCH = ".fetching"  # in a directory; of a bucket it is in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedModel:
    """What a fetch of a model has found or brought."""

    hub_id: str
    commit: str
    files: dict[str, HubFile]
    brought: int  # how many of them were not there yet
    offline: bool  # what was there to fetch is what the Hugging Face cache has

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())


def fetch_model(
    config: ModelConfig, destination: Destination, *, allow: Sequence[str] = (), ignore: Sequence[str] = ()
) -> FetchedModel:
    """Bring the files of a hub model that loading it takes to `destination`, those that are not there yet.

    Args:
        allow: shell patterns; if there are any, only files that match one are fetched.
        ignore: shell patterns of files that are not fetched.

    Raises:
        ConfigError: there is no such model, it has no safetensors, or the destination holds something else.
        LlmkitError: the hub, the store or the disk fails; the same command goes on.
    """
    model = look_up(config)
    wanted = _wanted(config, model, allow, ignore)
    origin = Origin({"source": {"hub_id": model.hub_id}, "revision": model.revision, "commit": model.commit})
    with _disk_explained(destination), _alone(destination) as scratch:
        there = destination.place.files()
        there.pop(UNFINISHED, None)
        finished = destination.read(MANIFEST)
        manifest = finished or destination.read(UNFINISHED)
        destination.refuse_if_taken(there, manifest, origin)
        if finished:
            destination.refuse_changed(there, finished)
        known = manifest["files"] if manifest else {}
        _refuse_fewer(destination, model, wanted, known)
        kept = {
            name: known[name] for name, file in wanted.items() if _is_there(destination, file, known.get(name), there)
        }
        missing = [file for name, file in wanted.items() if name not in kept]
        if missing or not finished or finished.get("commit") != model.commit or known.keys() != wanted.keys():
            fetch = _Fetch(config, model, destination, origin, scratch)
            fetch.run(missing, kept, stale=known.keys() - wanted.keys())
        destination.place.delete([UNFINISHED])
    return FetchedModel(
        hub_id=model.hub_id, commit=model.commit, files=wanted, brought=len(missing), offline=model.offline
    )


class _Fetch:
    """The way of the missing files to the destination."""

    def __init__(self, config: ModelConfig, model: HubModel, destination: Destination, origin: Origin, scratch: Path):
        self.config, self.model, self.destination, self.origin = config, model, destination, origin
        self.place, self.directory, self.scratch = destination.place, destination.directory, scratch

    def run(self, missing: list[HubFile], kept: dict[str, Any], *, stale: set[str]) -> None:
        """Bring the `missing` files beside those `kept`, remove the `stale` ones, and write the manifest last."""
        files = dict(kept)
        if not self.directory:
            with suppress(StorageError):  # not everybody may list them, and they cost no more than room
                self.place.abort_stale_uploads()
        at_a_time = _check_space(self.destination, self.scratch, missing)
        ways = 1 if self.directory else 2  # to here, and from here to the bucket
        with byte_progress(f"fetching {self.model.hub_id}", ways * sum(file.size for file in missing)) as progress:
            for number, (file, path, sha256) in enumerate(self._obtained(missing, at_a_time, progress)):
                if not number:  # from here on a reader finds no manifest, until all is there
                    self._record(UNFINISHED, files)
                    self.place.delete([MANIFEST])
                self._put(file, path, sha256, progress)
                files[file.name] = {"bytes": file.size, "sha256": sha256, "digest": file.digest}
                self._record(UNFINISHED, files)
        self.place.delete(stale)
        self._record(MANIFEST, files)

    def _record(self, manifest: str, files: Mapping[str, Any]) -> None:
        # A file here is hashed again when it matters; one in a bucket is known by what the bucket says of it.
        recorded = files if self.directory else with_versions(files, self.place.files())
        self.destination.write(manifest, recorded, self.origin)

    def _obtained(
        self, missing: list[HubFile], at_a_time: int, progress: Progress
    ) -> Iterator[tuple[HubFile, Path, str]]:
        """Each file with its place on this machine and its SHA-256, as they come; `at_a_time` of them lie here."""
        from huggingface_hub.errors import RepositoryNotFoundError

        room = threading.Semaphore(at_a_time)

        def obtain(file: HubFile) -> tuple[HubFile, Path, str]:
            room.acquire()
            return (file, *self.model.obtain(file, self.scratch, progress))

        # Not concurrent.futures: its threads would keep the program alive after Ctrl-C until their downloads are done.
        pool = ThreadPool(at_a_time)
        try:
            for obtained in pool.imap_unordered(obtain, sorted(missing, key=lambda file: -file.size)):
                yield obtained
                room.release()
        except RepositoryNotFoundError:  # everybody may see what a gated model has, not everybody may have it
            with explained(self.config):
                raise
        finally:
            pool.terminate()

    def _put(self, file: HubFile, path: Path, sha256: str, progress: Progress) -> None:
        """Bring a verified file to its destination: moved where it can be, else copied or sent, and verified again."""
        is_ours = path.is_relative_to(self.scratch)
        if self.directory and is_ours:
            target = self.directory / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            durable.sync(path)
            os.replace(path, target)
            durable.sync(target.parent)
            return
        self.place.upload(path, file.name, sha256=sha256)
        if not self.directory:
            progress(file.size)
        if is_ours:
            path.unlink()


def _wanted(config: ModelConfig, model: HubModel, allow: Sequence[str], ignore: Sequence[str]) -> dict[str, HubFile]:
    try:
        names = model_files(model.files, allow=allow, ignore=ignore)
    except ConfigError as error:
        raise ConfigError(f"model={config.name}: {model.hub_id} at {model.commit[:8]} {error}") from error
    if not names:
        raise ConfigError(
            f"model={config.name}: allow={list(allow)} ignore={list(ignore)} leave no file of {model.hub_id}; it has "
            f"{', '.join(model_files(model.files))}."
        )
    check_names(names, model.hub_id)
    return {name: model.files[name] for name in names}


def _is_there(
    destination: Destination, file: HubFile, facts: Mapping[str, Any] | None, there: Mapping[str, Entry]
) -> bool:
    """Whether an earlier fetch has brought this very content, and it has not changed since."""
    if facts is None or file.name not in there or facts.get("digest") != file.digest:
        return False
    return destination.is_as_fetched(file.name, facts, there[file.name])


def _refuse_fewer(
    destination: Destination, model: HubModel, wanted: Mapping[str, HubFile], known: Mapping[str, Any]
) -> None:
    """Raise ConfigError if patterns leave out what an earlier fetch has brought: it would be deleted."""
    if fewer := sorted(known.keys() & model.files.keys() - wanted.keys()):
        raise ConfigError(
            f"to={destination.to}: holds {fewer[0]}, which these settings leave out (allow, ignore); {OTHER}."
        )


@contextmanager
def _alone(destination: Destination) -> Iterator[Path]:
    """A directory for files on their way, on the destination's own disk where it has one; what a killed fetch has left
    there goes first. Raises ConfigError if another fetch to the same place is under way.
    """
    fetching = cache_dir() / "fetching"
    name = hashlib.sha256(str(destination.directory or destination.place.url).encode()).hexdigest()[:32]
    scratch = destination.directory / SCRATCH if destination.directory else fetching / name
    fetching.mkdir(parents=True, exist_ok=True)
    with (fetching / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"to={destination.to}: another fetch writes there; wait for it, or {OTHER}.") from None
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            if destination.directory:
                with suppress(OSError):  # not empty: something has been fetched
                    destination.directory.rmdir()


def _check_space(destination: Destination, scratch: Path, missing: Sequence[HubFile]) -> int:
    """How many files may lie in `scratch` at a time. Raises LlmkitError, with the numbers, if the disk is too small."""
    scratch.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(scratch).free
    sizes = sorted((file.size for file in missing), reverse=True)
    if destination.directory:
        needed, what = sum(sizes), "the files need"
    else:
        needed, what = sum(sizes[:1]), "files lie on this machine on their way to the bucket; the largest needs"
    if needed > free:
        move = OTHER if destination.directory else "set LLMKIT_CACHE to a directory on another disk"
        raise LlmkitError(
            f"to={destination.to}: {what} {in_bytes(needed)} and the disk of {scratch.parent} has "
            f"{in_bytes(free)} free; make room, or {move}."
        )
    fitting = (count for count in range(FILES_AT_A_TIME, 1, -1) if sum(sizes[:count]) <= free)
    return next(fitting, 1)


@contextmanager
def _disk_explained(destination: Destination) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LlmkitError(f"to={destination.to}: cannot be written ({error.strerror or error}).") from error
