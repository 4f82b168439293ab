"""Rows from a script of the user's, a data set of the hub or files become checked JSON Lines, with a manifest of them.

`<split>.jsonl` holds one row a line, each of a format that training knows; `tokens.json` the special tokens, if there
are any; `manifest.json` rows, bytes and sha256 of each file, and where they come from.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmkit.config.data_files import TOKENS_FILE
from llmkit.config.schema import DataConfig
from llmkit.data.fetching.checked_rows import WrittenSplit, write_rows
from llmkit.data.fetching.destination import Destination, Origin
from llmkit.data.fetching.directory import check_free, deliver, scratch_for, seen_from
from llmkit.data.fetching.source_rows import SourceRows
from llmkit.data.fetching.user_script import read_script, running
from llmkit.durable import sha256_of
from llmkit.errors import DataError, LlmkitError
from llmkit.rundir import write_json

Progress = Callable[[str, int], None]  # told split and rows so far, at every row


class Rows(Protocol):
    """What a fetch writes: a script that runs, or a source that was opened."""

    @property
    def splits(self) -> tuple[str, ...]: ...

    @property
    def tokens(self) -> tuple[str, ...]:
        """The special tokens that stand in the rows."""

    @property
    def layout(self) -> str:
        """The format of the rows, or `auto`."""

    def place(self, split: str) -> str:
        """How messages name a split's rows."""

    def rows(self, split: str) -> Generator[Any, None, None]:
        """The rows of the split, unchecked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What a fetch has written; `warnings` tell of rows that occur twice and of tokens that never do."""

    splits: dict[str, WrittenSplit]
    tokens: tuple[str, ...]
    warnings: list[str]

    @property
    def preference(self) -> bool:
        """Whether the rows are preference data."""
        return next(iter(self.splits.values())).preference


def fetch_script(script: Path, destination: Destination, *, limit: int | None = None, progress: Progress) -> Fetched:
    """Run the script and write what it yields, of each split at most `limit` rows.

    A directory appears when it is complete, and nothing is left behind otherwise; in a bucket the manifest comes last.
    An earlier fetch of the same script is replaced. Raises ConfigError if the destination holds anything else,
    DataError for what is wrong in the script or with a row, LlmkitError if the disk or the store fails.
    """
    file = read_script(script)
    origin = Origin({"script": {"path": seen_from(destination, file.path), "sha256": file.sha256}})
    with _disk_explained(destination):
        check_free(destination, origin, limit)  # before the script runs, which may take long
        with running(file) as opened:
            return _fetch(opened, lambda: origin, destination, limit=limit, progress=progress)


def fetch_source(
    data: DataConfig, destination: Destination, *, split: str | None, limit: int | None = None, progress: Progress
) -> Fetched:
    """Write the rows of a data set of the hub, of files or of the demo: all splits, or the one named.

    Raises what `fetch_script` does, and ConfigError for a source that cannot be had.
    """
    rows = SourceRows(data, split=split)
    with _disk_explained(destination):
        check_free(destination, rows.origin, limit)
        rows.open()
        return _fetch(rows, lambda: rows.origin, destination, limit=limit, progress=progress)


@contextmanager
def _disk_explained(destination: Destination) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # a script's own are DataErrors by now
        raise LlmkitError(f"to={destination.to}: cannot be written ({error.strerror}).") from error


def _fetch(
    rows: Rows, origin: Callable[[], Origin], destination: Destination, *, limit: int | None, progress: Progress
) -> Fetched:
    with scratch_for(destination) as scratch:
        fetched = _write(rows, scratch, limit=limit, progress=progress)
        check_free(destination, origin(), limit)  # again: there was time to put files there
        deliver(scratch, destination, _facts(fetched, scratch), origin(), limit)
    return fetched


def _write(rows: Rows, directory: Path, *, limit: int | None, progress: Progress) -> Fetched:
    splits: dict[str, WrittenSplit] = {}
    for split in rows.splits:
        with closing(rows.rows(split)) as yielded:
            splits[split] = write_rows(
                _counted(islice(yielded, limit), split, progress),
                directory / f"{split}.jsonl",
                place=rows.place(split),
                tokens=rows.tokens,
                layout=rows.layout,
            )
    kinds = {written.preference: split for split, written in splits.items()}
    if len(kinds) > 1:
        raise DataError(
            f"{rows.place(kinds[True])} holds preference data ({splits[kinds[True]].format}), split '{kinds[False]}' "
            f"does not ({splits[kinds[False]].format}); fetch them one by one."
        )
    if rows.tokens:
        write_json(directory / TOKENS_FILE, {"tokens": list(rows.tokens)})
    return Fetched(splits=splits, tokens=rows.tokens, warnings=[*_repeated(splits), *_never_seen(rows.tokens, splits)])


def _counted(rows: Iterator[Any], split: str, progress: Progress) -> Iterator[Any]:
    for count, row in enumerate(rows, start=1):
        progress(split, count)
        yield row


def _facts(fetched: Fetched, directory: Path) -> dict[str, Any]:
    """What the manifest says of each file."""
    facts: dict[str, Any] = {
        f"{split}.jsonl": {
            "rows": written.rows,
            "bytes": written.bytes,
            "sha256": written.sha256,
            "format": written.format,
        }
        for split, written in fetched.splits.items()
    }
    if fetched.tokens:
        file = directory / TOKENS_FILE
        facts[TOKENS_FILE] = {
            "tokens": len(fetched.tokens),
            "bytes": file.stat().st_size,
            "sha256": sha256_of(file),
        }
    return facts


def _repeated(splits: dict[str, WrittenSplit]) -> Iterator[str]:
    """Tell of rows that occur twice in a split, and of those of one split that occur in an earlier one too."""
    unique: dict[str, Any] = {}
    for split, written in splits.items():
        hashes = np.frombuffer(written.hashes, dtype=np.uint64)
        for earlier, known in unique.items():
            shared = np.flatnonzero(np.isin(hashes, known))
            if len(shared):
                yield (
                    f"{split}: {len(shared):,} of {len(hashes):,} rows occur in {earlier} too (the first: row "
                    f"{shared[0] + 1:,}); what is measured on them is not new to the model"
                )
        unique[split], firsts = np.unique(hashes, return_index=True)
        if repeats := len(hashes) - len(firsts):
            again = np.setdiff1d(np.arange(len(hashes)), firsts)[0]
            yield f"{split}: {repeats:,} of {len(hashes):,} rows repeat an earlier one (the first: row {again + 1:,})"


def _never_seen(tokens: tuple[str, ...], splits: dict[str, WrittenSplit]) -> Iterator[str]:
    for token in tokens:
        if not any(token in written.tokens_found for written in splits.values()):
            yield f"the token {token!r} occurs in no row"
