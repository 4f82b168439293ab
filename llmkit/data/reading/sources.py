"""Where rows come from: files, directories and globs, here or in a bucket, the hub, or the shipped demo."""

import hashlib
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Protocol

from llmkit.config.data_files import TOKENS_FILE, file_type, find_files, is_gzipped
from llmkit.config.schema import DataConfig, SourceConfig
from llmkit.config.sources import split_source
from llmkit.data.reading.blocks import Block
from llmkit.data.reading.content import content_hash, file_state
from llmkit.data.reading.hub import HubSource
from llmkit.data.reading.readers import read_file
from llmkit.data.reading.remote_files import fetch_files
from llmkit.errors import ConfigError, DataError, did_you_mean
from llmkit.remote import is_remote

__all__ = [
    "Block",
    "Source",
    "listed_tokens",
    "open_source",
    "open_training_sources",
    "shipped_demo",
    "split_source",
    "training_sources",
]

DEMO_SPLITS = ("train", "validation")


class Source(Protocol):
    """The rows of one data source, in order. Opened; read only by `blocks`."""

    name: str  # the path, or the hub's org/name
    special_tokens: list[str]  # of a tokens.json beside the rows
    parts: list[str]  # what its blocks call their source, in order: the files

    def fingerprint(self) -> str:
        """A hash of the content: what was touched or copied has the same, what differs in a character another."""

    def blocks(self) -> Iterator[Block]:
        """The rows, `limit` applied, in pieces that take a few MB. Raises ConfigError for what cannot be read."""


def training_sources(data: DataConfig) -> list[tuple[str, SourceConfig]]:
    """The sources of the training rows, with the config's name for each."""
    if data.datasets:
        return [(f"data.datasets[{index}]", source) for index, source in enumerate(data.datasets)]
    return [("data", data)]


def open_training_sources(data: DataConfig, *, preference: bool = False) -> list[Source]:
    """Those of `training_sources`, opened: see `open_source`."""
    return [open_source(source, key=key, preference=preference) for key, source in training_sources(data)]


def listed_tokens(sources: list[Source]) -> list[str]:
    """The special tokens that lie beside the rows, without repetition."""
    return list(dict.fromkeys(token for source in sources for token in source.special_tokens))


def open_source(source: SourceConfig, *, key: str = "data", preference: bool = False) -> Source:
    """The source that `source` describes. Of a data set of the hub it finds the commit, and fills in `source.commit`.

    Args:
        key: the config's name for `source` (`data.datasets[1]`), for messages.
        preference: read the preference part of the demo.

    Raises:
        ConfigError: there is no such source, or the hub cannot be reached.
        StorageError: a bucket cannot be reached.
    """
    if source.path == "demo":
        return FileSource("demo", [shipped_demo(source.split, preference=preference)], limit=source.limit)
    said = f"{key}.path={source.path}"
    if source.path and is_remote(source.path):
        fetched = fetch_files(source.path, split=source.split, said=said)
        return FileSource(source.path, list(fetched.values()), limit=source.limit, names=list(fetched))
    if source.path:
        return FileSource(source.path, find_files(source.path, split=source.split, said=said), limit=source.limit)
    if source.hub_id:
        return HubSource(source, key=key)
    raise ConfigError(f"{key}: say where the rows are, with {key}.path=FILE.")


def shipped_demo(split: str, *, preference: bool = False) -> Path:
    """The demo's file for `train` or `validation`, of conversations or of preference pairs."""
    if split not in DEMO_SPLITS:
        near = did_you_mean(split, DEMO_SPLITS)
        raise DataError(f"demo: has no split '{split}', but {' and '.join(DEMO_SPLITS)}.{near}")
    name = f"preference_{split}.jsonl" if preference else f"{split}.jsonl"
    return Path(str(resources.files("llmkit.data") / "demo" / name))


class FileSource:
    """The rows of some files, one file after the other.

    Args:
        names: what the files are called, where they are copies of others; nobody changes copies.
    """

    def __init__(self, name: str, files: list[Path], *, limit: int | None, names: list[str] | None = None):
        self.name = name
        self.special_tokens = _special_tokens(files)
        self.parts = names or [str(file) for file in files]
        self._files, self._limit = files, limit
        self._are_copies = names is not None
        self._states: list[list[int]] | None = None  # of the files, when they were hashed

    def fingerprint(self) -> str:
        """A hash of type and content of the files in their order, wherever they are and whatever their names."""
        digest = hashlib.blake2b(digest_size=16)
        states = []
        for file in self._files:
            try:
                states.append(file_state(file))
                digest.update(f"{file_type(file)} {is_gzipped(file)} {content_hash(file)}\n".encode())
            except OSError as error:
                raise DataError(f"{file}: cannot be read ({error.strerror}).") from error
        self._states = states
        return digest.hexdigest()

    def blocks(self) -> Iterator[Block]:
        """The rows, `limit` applied, in pieces. Raises DataError that names file and line for what cannot be read."""
        left = self._limit
        for file, name in zip(self._files, self.parts, strict=True):
            if left == 0:
                break
            for block in read_file(file, name=name, limit=left):
                left = None if left is None else left - len(block)
                yield block
        if self._are_copies:  # other runs link to them, which changes a file's times
            return
        # Else rows would be kept in the cache under the hash of others.
        for file, state in zip(self._files, self._states or [], strict=False):
            if not file.exists() or file_state(file) != state:
                raise DataError(f"{file}: has changed while it was read; start again when it is complete.")


def _special_tokens(files: list[Path]) -> list[str]:
    """The tokens in the `tokens.json` of each directory that holds a file, without repetition.

    Raises DataError if one holds anything but `{"tokens": ["...", ...]}`.
    """
    tokens: dict[str, None] = {}
    for folder in dict.fromkeys(file.parent for file in files):
        path = folder / TOKENS_FILE
        if path.is_file():
            tokens |= dict.fromkeys(_read_tokens(path))
    return list(tokens)


def _read_tokens(path: Path) -> list[str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
    found = content.get("tokens") if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(token, str) and token for token in found):
        raise DataError(
            f'{path}: beside rows it lists their special tokens, {{"tokens": ["<USER>", ...]}}; rename it if it is '
            "something else."
        )
    return found
