"""Where a fetch writes to: a directory here or in a bucket, with a manifest of what is in it that is written last."""

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit import __version__
from llmkit.config.schema import StorageConfig
from llmkit.durable import sha256_of
from llmkit.errors import ConfigError
from llmkit.remote import is_remote
from llmkit.storage import Entry, Place, open_place

MANIFEST = "manifest.json"
UNFINISHED = ".manifest.partial.json"  # the same of a fetch that is not complete: what it has brought so far
NAMES_SHOWN = 5
OTHER = "choose another to="


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a fetch takes things from, as a manifest says it: `script`, or `source` with `revision` and `commit`."""

    facts: dict[str, Any]

    def made(self, manifest: Mapping[str, Any]) -> bool:
        """Whether an earlier fetch from here wrote the manifest. A script may have been edited, or else moved."""
        ours, theirs = self.facts.get("script"), manifest.get("script")
        if ours and theirs:
            return ours["sha256"] == theirs["sha256"] or ours["path"] == theirs["path"]
        return not theirs and self.facts.get("source") == manifest.get("source")


class Destination:
    """The place that `to=` names. Raises ConfigError for an address that is not well formed."""

    def __init__(self, to: str, storage: StorageConfig):
        self.to = to
        self.place: Place = open_place(to, storage)
        self.directory = None if is_remote(to) else Path(to).expanduser().resolve()
        if self.directory and self.directory.exists() and not self.directory.is_dir():
            raise ConfigError(f"to={to}: is not a directory; {OTHER}.")

    def read(self, name: str) -> dict[str, Any] | None:
        """The manifest of this name; None if there is none, or if another program's file has the name."""
        if self.directory and not self.directory.exists():
            return None
        content = self.place.read(name)
        try:
            manifest = json.loads(content or b"")
            [(facts["sha256"], facts["bytes"]) for facts in manifest["files"].values()]
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return manifest if "script" in manifest or "source" in manifest else None

    def write(self, name: str, files: Mapping[str, Any], origin: Origin, **more: Any) -> None:
        """Write the manifest: facts per file, and where they come from."""
        self.place.write(name, json.dumps(as_manifest(files, origin, **more), indent=2).encode() + b"\n")

    def refuse_if_taken(self, there: Mapping[str, Entry], manifest: Mapping[str, Any] | None, origin: Origin) -> None:
        """Raise ConfigError if `there` is something, and it did not come from `origin`."""
        if not there:
            return
        if manifest is None:
            names = ", ".join(list(there)[:NAMES_SHOWN]) + (", ..." if len(there) > NAMES_SHOWN else "")
            raise ConfigError(f"to={self.to}: holds other things already ({names}); {OTHER}.")
        if not origin.made(manifest):
            raise ConfigError(f"to={self.to}: holds what {_described(manifest)}; {OTHER}.")

    def refuse_strangers(self, there: Mapping[str, Entry], manifest: Mapping[str, Any]) -> None:
        """Raise ConfigError if `there` is a file of which the manifest does not know."""
        if strangers := [name for name in there if name not in {*manifest["files"], MANIFEST, UNFINISHED}]:
            first = strangers[0].partition("/")[0]
            raise ConfigError(
                f"to={self.to}: holds {first}, which the earlier fetch did not write; move it, or {OTHER}."
            )

    def refuse_changed(self, there: Mapping[str, Entry], manifest: Mapping[str, Any]) -> None:
        """Raise ConfigError if a file is not as it was fetched: somebody's work would be lost."""
        for name, facts in manifest["files"].items():
            if name in there and not self.is_as_fetched(name, facts, there[name]):
                raise ConfigError(
                    f"to={self.to}: {name} was changed after it was fetched; move it (it is then fetched again), or "
                    f"{OTHER}."
                )

    def is_as_fetched(self, name: str, facts: Mapping[str, Any], entry: Entry) -> bool:
        """Whether a file is the one that `facts` of a manifest are about; a file in a bucket is not read for that."""
        if entry.size != facts["bytes"]:
            return False
        if entry.version == facts.get("version"):
            return True
        return self.directory is not None and sha256_of(self.directory / name) == facts["sha256"]


def as_manifest(files: Mapping[str, Any], origin: Origin, **more: Any) -> dict[str, Any]:
    """What a manifest says."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"files": dict(files), **origin.facts, **more, "llmkit": __version__, "date": date}


def with_versions(files: Mapping[str, Mapping[str, Any]], there: Mapping[str, Entry]) -> dict[str, Any]:
    """The facts of files, each with what the place says when it has not changed since."""
    return {name: {**facts, "version": there[name].version} for name, facts in files.items()}


def _described(manifest: Mapping[str, Any]) -> str:
    if "script" in manifest:
        return f"another script has fetched, {manifest['script']['path']}"
    return "comes from elsewhere, " + " ".join(str(value) for value in manifest["source"].values() if value)
