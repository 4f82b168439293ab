"""Rows from a user's script become a directory of checked JSON Lines, with a manifest of what is in it.

`<split>.jsonl` holds one row a line, each of a format that training knows; `tokens.json` the script's special tokens,
if it has any; `manifest.json` rows, bytes and sha256 of each file, and where they come from.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.config.data_files import TOKENS_FILE
from llmkit.data.fetching.checked_rows import WrittenSplit, write_rows
from llmkit.data.fetching.directory import check_free, move_into_place, scratch_beside, sha256_of, write_manifest
from llmkit.data.fetching.user_script import UserScript, read_script, running
from llmkit.errors import DataError, LlmkitError
from llmkit.rundir import write_json

Progress = Callable[[str, int], None]  # told split and rows so far, at every row


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


def fetch_rows(script: Path, to: Path, *, limit: int | None = None, progress: Progress) -> Fetched:
    """Run the script and write what it yields, of each split at most `limit` rows, to the directory `to`.

    The directory appears when it is complete, and nothing is left behind otherwise. An earlier fetch of the same
    script is replaced. Raises ConfigError if `to` holds anything else, DataError for what is wrong in the script or
    with a row, LlmkitError if the disk fails.
    """
    to, file = to.resolve(), read_script(script)
    try:
        check_free(to, file, limit)  # before the script runs, which may take long
        with running(file) as opened, scratch_beside(to) as scratch:
            fetched = _write(opened, scratch, limit=limit, progress=progress)
            write_manifest(scratch, _facts(fetched, scratch), to=to, script=file, limit=limit)
            check_free(to, file, limit)  # again: there was time to put files there
            move_into_place(scratch, to)
    except OSError as error:  # the script's own are DataErrors by now
        raise LlmkitError(f"to={to}: cannot be written ({error.strerror}).") from error
    return fetched


def _write(script: UserScript, directory: Path, *, limit: int | None, progress: Progress) -> Fetched:
    splits: dict[str, WrittenSplit] = {}
    for split in script.splits:
        with closing(script.rows(split)) as rows:
            splits[split] = write_rows(
                _counted(islice(rows, limit), split, progress),
                directory / f"{split}.jsonl",
                place=script.place(split),
                tokens=script.tokens,
            )
    kinds = {written.preference: split for split, written in splits.items()}
    if len(kinds) > 1:
        raise DataError(
            f"{script.path}: split '{kinds[True]}' holds preference data ({splits[kinds[True]].format}), split "
            f"'{kinds[False]}' does not ({splits[kinds[False]].format}); fetch them with two scripts."
        )
    if script.tokens:
        write_json(directory / TOKENS_FILE, {"tokens": list(script.tokens)})
    return Fetched(
        splits=splits, tokens=script.tokens, warnings=[*_repeated(splits), *_never_seen(script.tokens, splits)]
    )


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
