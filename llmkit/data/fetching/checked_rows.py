"""A split's rows, written as JSON Lines as they come: every one is JSON as it stands, and of one known format."""

import hashlib
import json
import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.data.formats.table import FORMATS, check_format, convert, detect_format
from llmkit.data.rows import EXCERPT, Row
from llmkit.errors import DataError

# Checked and written at a time. The first batch is one row and each is ten times the one before, so that what is
# wrong from the start is said at once, also of rows that take a second each.
BATCH_ROWS, BATCH_CHARACTERS = 1000, 2**22
# How a value becomes JSON, by a method that its type has (numpy and torch, dates, bytes, named tuples).
REMEDIES = ("tolist", "isoformat", "decode", "_asdict")


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenSplit:
    """One split's file as it was written."""

    rows: int
    bytes: int
    sha256: str
    format: str
    preference: bool
    hashes: "array[int]"  # per row, 8 bytes of a hash of what is learnt from it, whatever its id
    tokens_found: frozenset[str]


def write_rows(
    rows: Iterable[Any], file: Path, *, place: str, tokens: Iterable[str], layout: str = "auto"
) -> WrittenSplit:
    """Check the rows and write them to `file`, one JSON object a line, holding one batch of them in memory.

    `place` is how messages name the rows, `layout` their format; `auto` finds it out. Of the special `tokens` it is
    found out which occur.
    Raises DataError with place, row number (from 1, the line of the file) and the row's first characters, for a row
    that is not a JSON object and for one that is not of the first row's format; and for a split without rows.
    """
    sha256, hashes, count, size = hashlib.sha256(), array("Q"), 0, 0
    preference = False
    sought = {token: json.dumps(token, ensure_ascii=False)[1:-1] for token in tokens}  # as a line spells it
    unseen = set(sought)
    with file.open("wb") as out:
        for lines in _batches(_lines(rows, place)):
            # What is checked is what is written: a script may go on to change a row that it has yielded.
            parsed = [Row(json.loads(line), place, count + number) for number, line in enumerate(lines, start=1)]
            if not count:
                layout, preference = _detect(parsed[0]) if layout == "auto" else _check(parsed[0], layout)
            hashes.extend(_hashes(parsed, layout, preference=preference))
            for line in lines:
                encoded = f"{line}\n".encode()
                sha256.update(encoded)
                size += out.write(encoded)
                unseen -= {token for token in unseen if sought[token] in line}
            count += len(lines)
    if not count:
        raise DataError(f"{place}: yielded no rows.")
    return WrittenSplit(
        rows=count,
        bytes=size,
        sha256=sha256.hexdigest(),
        format=layout,
        preference=preference,
        hashes=hashes,
        tokens_found=frozenset(sought) - unseen,
    )


def _lines(rows: Iterable[Any], place: str) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(
                f"{place}, row {number}: a row must be a dict, found {type(row).__name__}: {repr(row)[:EXCERPT]}"
            )
        try:
            fault = _fault(row, "")
        except RecursionError:
            fault = "the row contains itself, or is nested too deeply for JSON"
        if fault:
            raise DataError(f"{place}, row {number}: {fault}. The row begins: {repr(row)[:EXCERPT]}")
        yield json.dumps(row, ensure_ascii=False)


def _batches(lines: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters, full = 0, 1
    for line in lines:
        batch.append(line)
        characters += len(line)
        if len(batch) >= full or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters, full = [], 0, min(full * 10, BATCH_ROWS)
    if batch:
        yield batch


def _fault(value: Any, where: str) -> str | None:
    """What JSON would refuse or change in `value`, which stands at `where` of the row; None if nothing."""
    if value is None or isinstance(value, bool | int):
        return None
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return f"'{where}' holds half a surrogate pair (\\ud800 to \\udfff), which is not text"
        return None
    if isinstance(value, float):
        if math.isfinite(value):
            return None
        return f"'{where}' is {value!r}, which JSON does not have; yield None, or leave the column out"
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                return f"the key {key!r} {f'of {where!r} ' if where else ''}is not text; JSON has only texts as keys"
            inner = f"{where}.{key}" if where else key
            if fault := _fault(key, inner) or _fault(value[key], inner):
                return fault
        return None
    if isinstance(value, list | tuple) and not hasattr(value, "_asdict"):
        return next(filter(None, (_fault(item, f"{where}[{index}]") for index, item in enumerate(value))), None)
    kind = type(value)
    remedy = next((f"; its .{name}() can be" for name in REMEDIES if hasattr(value, name)), "")
    return f"'{where}' is of the type {kind.__module__}.{kind.__qualname__}, which is not JSON{remedy}"


def _detect(row: Row) -> tuple[str, bool]:
    """The row's format, and whether it is one of preference data. Raises DataError if there is none."""
    errors = {}
    for preference in (True, False):
        try:
            return detect_format(row, {}, preference=preference), preference
        except DataError as error:
            errors[preference] = error
    meant = any(name.startswith(("chosen", "rejected")) for name in row.values)
    raise DataError(f"{errors[meant]}\nA script can yield its columns under the names of a format.") from errors[meant]


def _check(row: Row, layout: str) -> tuple[str, bool]:
    """The format that is asked for, and whether it is one of preference data. Raises DataError if it does not fit."""
    preference = FORMATS[layout].preference
    check_format(row, layout, {}, preference=preference)
    return layout, preference


def _hashes(rows: list[Row], layout: str, *, preference: bool) -> Iterator[int]:
    """Convert the rows as training would, and hash what each says."""
    examples = convert(rows, layout, {}, preference=preference)
    assert len(examples) == len(rows), "one example per row"
    for example in examples:
        yield int.from_bytes(hashlib.blake2b(repr(example).encode(), digest_size=8).digest())
