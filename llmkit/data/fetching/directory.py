"""The directory that a fetch fills: its manifest, and how it is replaced without losing a file of the user's."""

import datetime
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmkit import __version__
from llmkit.data.fetching.user_script import ScriptFile
from llmkit.errors import ConfigError
from llmkit.rundir import write_json

MANIFEST = "manifest.json"
NAMES_SHOWN = 5


def write_manifest(directory: Path, files: dict[str, Any], *, to: Path, script: ScriptFile, limit: int | None) -> None:
    """Write what is in `directory`, which is to become `to`: facts per file, and where they come from."""
    manifest = {
        "files": files,
        "script": {"path": _seen_from(to, script), "sha256": script.sha256},
        "limit": limit,
        "llmkit": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_json(directory / MANIFEST, manifest)


def sha256_of(file: Path) -> str:
    """The SHA-256 of the file's content, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def check_free(to: Path, script: ScriptFile, limit: int | None) -> None:
    """Raise ConfigError unless `to` may be taken: absent, empty, or all of it an earlier fetch of this script."""
    other = "choose another to="
    if to == Path.cwd() or to in Path.cwd().parents:
        raise ConfigError(f"to={to}: holds the directory you work in, and is replaced as a whole; {other}.")
    if not to.exists():
        return
    if not to.is_dir():
        raise ConfigError(f"to={to}: is not a directory; {other}.")
    there = sorted(path.name for path in to.iterdir())
    if not there:
        return
    manifest = _read_manifest(to)
    if manifest is None:
        names = ", ".join(there[:NAMES_SHOWN]) + (", ..." if len(there) > NAMES_SHOWN else "")
        raise ConfigError(f"to={to}: holds other things already ({names}); {other}.")
    if strangers := [name for name in there if name not in manifest["files"] and name != MANIFEST]:
        raise ConfigError(f"to={to}: holds {strangers[0]}, which the earlier fetch did not write; move it, or {other}.")
    if script.sha256 != manifest["script"]["sha256"] and _seen_from(to, script) != manifest["script"]["path"]:
        raise ConfigError(f"to={to}: holds what another script has fetched, {manifest['script']['path']}; {other}.")
    if limit is not None and manifest["limit"] is None:
        raise ConfigError(f"to={to}: holds all rows of this script; limit={limit} would leave fewer: {other}.")
    for name, facts in manifest["files"].items():
        if name in there and sha256_of(to / name) != facts["sha256"]:
            raise ConfigError(f"to={to}: {name} was changed after it was fetched; move it, or {other}.")


@contextmanager
def scratch_beside(to: Path) -> Iterator[Path]:
    """A new directory on the disk of `to`; after the block it is gone, unless moved, with all that was made for it."""
    made = [parent for parent in to.parents if not parent.exists()]  # innermost first
    # Not tempfile.mkdtemp: its mode 0700 would survive the rename and lock other users out.
    scratch = to.with_name(f".{to.name}.{uuid.uuid4().hex}")
    try:
        try:
            scratch.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"to={to}: cannot be made ({error.strerror}); choose another to=.") from error
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # not empty: `to` is in it
                parent.rmdir()


def move_into_place(scratch: Path, to: Path) -> None:
    """Make the complete `scratch` the new `to`; an earlier one steps aside first, and comes back if that fails."""
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


def _seen_from(to: Path, script: ScriptFile) -> str:
    """The script's path relative to the directory: it tells nothing of the rest of the machine."""
    return os.path.relpath(script.path.resolve(), to)


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of an earlier fetch; None if there is none, or if another program's file has that name."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        manifest["script"]["path"], manifest["script"]["sha256"], manifest["limit"]
        [facts["sha256"] for facts in manifest["files"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest
