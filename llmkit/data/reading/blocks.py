"""Rows on their way from a file to a process that works on them: cheap to send, parsed where they arrive."""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmkit.data.rows import EXCERPT, Row
from llmkit.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

# A block is full with so many rows or so many bytes, whichever is first; one row may be larger.
BLOCK_ROWS = 1000
BLOCK_BYTES = 4 * 2**20
HALF_SURROGATE = "holds half a surrogate pair (\\ud800 to \\udfff), which is not text."


class Block(ABC):
    """Some rows of one source, in its order. It can be pickled; its length is its number of rows."""

    __slots__ = ()
    source: str  # the file, or the hub's org/name

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def rows(self) -> list[Row]:
        """The rows, parsed. Raises DataError that names file and line."""


@dataclass(frozen=True, slots=True)
class Lines(Block):
    """Lines of a JSON Lines file as they are, blank ones included."""

    source: str
    first: int  # number of the first line, from 1
    lines: list[bytes]
    count: int  # lines that are not blank

    def __len__(self) -> int:
        return self.count

    def rows(self) -> list[Row]:
        return [
            Row(parse_line(line, f"{self.source}, line {number}"), self.source, number)
            for number, line in enumerate(self.lines, start=self.first)
            if not is_blank(line)
        ]


@dataclass(frozen=True, slots=True)
class Records(Block):
    """Rows that are parsed already."""

    source: str
    first: int  # number of the first row
    values: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.values)

    def rows(self) -> list[Row]:
        return [Row(values, self.source, number) for number, values in enumerate(self.values, start=self.first)]


@dataclass(frozen=True, slots=True)
class Cells(Block):
    """Rows of a CSV file: their cells, all text."""

    source: str
    columns: list[str]
    numbers: list[int]  # the line that each row begins in, from 1
    cells: list[list[str]]

    def __len__(self) -> int:
        return len(self.cells)

    def rows(self) -> list[Row]:
        return [
            Row(dict(zip(self.columns, cells, strict=True)), self.source, number)
            for number, cells in zip(self.numbers, self.cells, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Batch(Block):
    """Rows of a table in Arrow's form."""

    source: str
    first: int  # index of the first row in the table, from 0
    table: "pa.RecordBatch"

    def __len__(self) -> int:
        return self.table.num_rows

    def rows(self) -> list[Row]:
        try:
            records = self.table.to_pylist()
        except UnicodeDecodeError as error:
            where = f"{self.source}, rows {self.first} to {self.first + len(self) - 1}"
            raise DataError(f"{where}: a text in them is not UTF-8 ({error.reason}).") from error
        return Records(self.source, self.first, records).rows()


def is_blank(line: bytes) -> bool:
    """Whether nothing but white space is in it."""
    return not line or line.isspace()


def parse_line(line: bytes, place: str) -> dict[str, Any]:
    """The JSON object in a line. Raises DataError, beginning with `place`, for anything else."""
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text ({error.reason} at byte {error.start + 1}).") from error
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error.msg} at column {error.colno}): {text[:EXCERPT]}") from error
    except RecursionError:
        raise DataError(f"{place}: nested too deeply to be read: {text[:EXCERPT]}") from None
    if not isinstance(values, dict):
        raise DataError(f"{place}: a JSON object is expected, found: {text[:EXCERPT]}")
    if "\\u" in text and has_half_surrogate(values):
        raise DataError(f"{place}: {HALF_SURROGATE}")
    return values


def has_half_surrogate(value: Any) -> bool:
    """Whether a text in it is none: JSON can spell half a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
