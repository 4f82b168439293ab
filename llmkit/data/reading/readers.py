"""Files of rows -> blocks, a piece at a time, so that memory does not grow with the file."""

import codecs
import csv
import gzip
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

from llmkit.config.data_files import file_type, is_gzipped
from llmkit.data.reading.blocks import BLOCK_BYTES, BLOCK_ROWS, Batch, Block, Cells, Lines, Records, is_blank
from llmkit.data.reading.json_stream import HOLDERS, read_array
from llmkit.data.rows import EXCERPT
from llmkit.errors import DataError

# Of a JSON file that may be JSON Lines, in bytes; a longer line is taken for the whole array.
LARGEST_FIRST_LINE = 64 * 2**20
PARQUET_BUFFER = 2**20  # bytes of a column that are read at a time; without one, all of a row group


def read_file(path: Path, *, limit: int | None = None, name: str | None = None) -> Iterator[Block]:
    """The rows of a file of any type, `limit` of them at most, in its order.

    Raises DataError that names the file, and the line where there is one; blocks of lines leave it to their `rows`.

    Args:
        name: what messages call the file, if not by its path.
    """
    source = name or str(path)
    with _explained(source):
        if file_type(path) == "parquet":
            with _unzipped(path) as file:
                yield from _read_parquet(source, file, limit)
            return
        with _open(path) as file:
            if file_type(path) == "csv":
                yield from _read_csv(source, file, limit)
            elif _holds_lines(path, file):
                yield from _read_lines(source, file, limit)
            else:
                yield from _read_json(source, file, limit)


def _holds_lines(path: Path, file: IO[bytes]) -> bool:
    """Whether it is JSON Lines, by its first characters: both types are found under both extensions."""
    head = file.read(64).removeprefix(codecs.BOM_UTF8)
    while head and is_blank(head):
        head = file.read(64)
    file.seek(0)
    first = head.lstrip()[:1]
    if first != b"{" or file_type(path) == "jsonl":
        return first != b"["
    line = b""
    while is_blank(line) and (line := file.readline(LARGEST_FIRST_LINE)):
        line = line.removeprefix(codecs.BOM_UTF8)
    rest = b" "
    while is_blank(rest) and rest:
        rest = file.read(64)
    file.seek(0)
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # an object over several lines, or a line that is an array and all its rows
        return False
    return bool(rest) or not any(isinstance(row.get(key), list) for key in HOLDERS)


def _read_lines(source: str, file: IO[bytes], limit: int | None) -> Iterator[Lines]:
    lines: list[bytes] = []
    first, size, count, total = 1, 0, 0, 0
    for number, line in enumerate(file, start=1):  # bytes: a text file is decoded in pieces, and the line stays unknown
        if total == limit:
            break
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        lines.append(line)
        size += len(line)
        if not is_blank(line):
            count, total = count + 1, total + 1
        if len(lines) == BLOCK_ROWS or size >= BLOCK_BYTES:
            if count:
                yield Lines(source, first, lines, count)
            lines, first, size, count = [], number + 1, 0, 0
    if count:
        yield Lines(source, first, lines, count)


def _read_json(source: str, file: IO[bytes], limit: int | None) -> Iterator[Records]:
    rows: list[dict[str, Any]] = []
    first, size = 1, 0
    for characters, row in islice(read_array(source, file), limit):
        rows.append(row)
        size += characters
        if len(rows) == BLOCK_ROWS or size >= BLOCK_BYTES:
            yield Records(source, first, rows)
            rows, first, size = [], first + len(rows), 0
    if rows:
        yield Records(source, first, rows)


def _read_csv(source: str, file: IO[bytes], limit: int | None) -> Iterator[Cells]:
    csv.field_size_limit(sys.maxsize)  # 128 KiB by default
    rows = _csv_rows(source, file)
    head, columns = next(rows, (1, []))
    _check_header(columns, f"{source}, line {head}")
    numbers: list[int] = []
    cells: list[list[str]] = []
    size = 0
    for number, row in islice(rows, limit):
        if len(row) != len(columns):
            raise DataError(
                f"{source}, line {number}: {len(row)} cells, but the header has {len(columns)} columns "
                f"({', '.join(columns)}): {','.join(row)[:EXCERPT]}"
            )
        numbers.append(number)
        cells.append(row)
        size += sum(map(len, row))
        if len(cells) == BLOCK_ROWS or size >= BLOCK_BYTES:
            yield Cells(source, columns, numbers, cells)
            numbers, cells, size = [], [], 0
    if cells:
        yield Cells(source, columns, numbers, cells)


def _csv_rows(source: str, file: IO[bytes]) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the number of the line it begins in."""
    reader = csv.reader(_text_lines(source, file), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{source}, line {number}: not CSV ({error}).") from error
        if row is None:
            return
        if row:
            yield number, row


def _check_header(columns: list[str], place: str) -> None:
    if len(columns) == 1 and (separator := next((mark for mark in ";\t|" if mark in columns[0]), "")):
        raise DataError(f"{place}: columns are separated by commas, not by {separator!r}: {columns[0][:EXCERPT]}")
    if columns and not all(columns):
        raise DataError(f"{place}: the first line names the columns; one has no name: {','.join(columns)[:EXCERPT]}")
    if doubled := [name for name in columns if columns.count(name) > 1]:
        raise DataError(f"{place}: two columns are named '{doubled[0]}'.")


def _text_lines(source: str, file: IO[bytes]) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            place = f"{source}, line {number}"
            raise DataError(f"{place}: not UTF-8 text ({error.reason} at byte {error.start + 1}).") from error


def _read_parquet(source: str, path: Path, limit: int | None) -> Iterator[Batch]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False, buffer_size=PARQUET_BUFFER) as file:
        facts = file.metadata
        size = sum(facts.row_group(group).total_byte_size for group in range(facts.num_row_groups))
        at_once = max(1, min(BLOCK_ROWS, BLOCK_BYTES * facts.num_rows // max(size, 1)))
        first, left = 0, facts.num_rows if limit is None else limit
        batches = file.iter_batches(batch_size=min(at_once, max(left, 1)))
        while left > 0 and (batch := next(batches, None)) is not None:
            # Values that repeat take little room in the file, and all of it here.
            piece = max(1, BLOCK_BYTES * len(batch) // max(batch.nbytes, 1))
            for start in range(0, min(len(batch), left), piece):
                yield Batch(source, first + start, batch.slice(start, min(piece, left - start)))
            first, left = first + len(batch), left - len(batch)


@contextmanager
def _unzipped(path: Path) -> Iterator[Path]:
    """The file, or if it is gzipped a temporary copy that is not: Parquet is read from its end."""
    if not is_gzipped(path):
        yield path
        return
    with tempfile.NamedTemporaryFile(prefix="llmkit-", suffix=".parquet") as copy:
        with gzip.open(path) as file:
            shutil.copyfileobj(file, copy)
        copy.flush()
        yield Path(copy.name)


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if is_gzipped(path) else path.open("rb")  # type: ignore[return-value]


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turn errors of files that cannot be read into messages that name them."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{source}: does not exist.") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{source}: not a whole gzip file ({error}).") from error
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror or error}).") from error
    except Exception as error:
        if type(error).__module__.startswith("pyarrow"):  # imported only where there is a Parquet file
            raise DataError(f"{source}: not a Parquet file that can be read ({str(error).splitlines()[0]}).") from error
        raise
