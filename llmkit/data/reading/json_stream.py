"""The rows of a JSON array, one after the other: neither the file nor the array is ever in memory as a whole.

ijson would do, but turns half a surrogate pair into a question mark, refuses numbers that json takes, and does not say
in which line a file is broken (3.6).
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from llmkit.data.reading.blocks import HALF_SURROGATE, has_half_surrogate
from llmkit.data.rows import EXCERPT
from llmkit.errors import DataError

HOLDERS = ("data", "rows", "examples")  # keys under which an object may hold the array
CHUNK = 2**20
SPACE = re.compile(r"[ \t\n\r]*")
# A value whose end is not read yet looks broken at most so many characters before the text in memory ends (a pair of
# \\uXXXX escapes), or holds a text without an end.
HALF_READ = 16
ENDLESS = "Unterminated string"


Sized = tuple[int, dict[str, Any]]  # an object, and how many characters it was written with


def read_array(source: str, file: IO[bytes]) -> Iterator[Sized]:
    """The objects of the array that the file is, or that its one object holds under a key of HOLDERS.

    Raises DataError with file and line for anything else.
    """
    text = _Text(source, file)
    yield from text.objects() if text.peek() == "[" else _held_objects(text)
    if text.peek():
        raise text.broken("more text after the end")


def _held_objects(text: "_Text") -> Iterator[Sized]:
    keys: list[str] = []
    holder = None
    text.take("{")
    while text.peek() != "}":
        if keys:
            text.take(",")
        keys.append(str(text.value()))
        text.take(":")
        if keys[-1] in HOLDERS and text.peek() == "[":
            if holder:
                raise DataError(f"{text.source}: both '{holder}' and '{keys[-1]}' hold rows; keep one of them.")
            holder = keys[-1]
            yield from text.objects()
        else:
            text.value()
    text.take("}")
    if not holder:
        found = ", ".join(f"'{key}'" for key in keys) or "none"
        raise DataError(
            f"{text.source}: one JSON object, with the keys {found}; rows are an array of objects, [{{...}}, {{...}}], "
            f"one under the key {' or '.join(HOLDERS)}, or one object a line."
        )


class _Text:
    """The text of a file: read as far as it is needed, forgotten when it is used."""

    def __init__(self, source: str, file: IO[bytes]):
        self.source = source
        self._file = file
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text, self._at = "", 0  # what is in memory, and how much of it is used
        self._size = 0  # of the last value, in characters
        self._lines, self._column = 0, 0  # of what is forgotten: its lines, and the characters after the last one

    def peek(self) -> str:
        """The next character that is not white space, or an empty string at the end."""
        while True:
            space = SPACE.match(self._text, self._at)
            assert space is not None, "it matches nothing, too"
            self._at = space.end()
            if self._at < len(self._text) or not self._read():
                return self._text[self._at : self._at + 1]

    def take(self, character: str) -> None:
        """Go past it. Raises DataError if something else is next."""
        if self.peek() != character:
            raise self.broken(f"Expecting '{character}'")
        self._at += 1

    def objects(self) -> Iterator[Sized]:
        """The objects of the array that begins here. Raises DataError if it holds something else."""
        self.take("[")
        while self.peek() != "]":
            value = self.value()
            if not isinstance(value, dict):
                found = json.dumps(value)[:EXCERPT]
                raise DataError(f"{self.source}, line {self._line()}: a JSON object is expected, found: {found}")
            yield self._size, value
            if self.peek() != "]":
                self.take(",")
                if self.peek() == "]":
                    raise self.broken("Expecting a value")
        self.take("]")

    def value(self) -> Any:
        """The value that begins here. Raises DataError if it is broken."""
        self.peek()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                may_go_on = error.pos > len(self._text) - HALF_READ or error.msg.startswith(ENDLESS)
                if not (may_go_on and self._read()):
                    raise self.broken(error.msg, error.pos) from error
            except RecursionError:
                raise self.broken("nested too deeply to be read") from None
            else:
                if end == len(self._text) and self._read():  # of a number, more digits may follow
                    continue
                if self._text.find("\\u", self._at, end) >= 0 and has_half_surrogate(value):
                    raise DataError(f"{self.source}, line {self._line()}: {HALF_SURROGATE}")
                self._size, self._at = end - self._at, end
                return value

    def broken(self, what: str, at: int | None = None) -> DataError:
        """The error that says what is wrong at `at` (default: here), with its line."""
        at = self._at if at is None else at
        start = self._text.rfind("\n", 0, at) + 1
        line = self._lines + self._text.count("\n", 0, at) + 1
        column = at - start + 1 + (self._column if start == 0 else 0)
        if at >= len(self._text):
            return DataError(f"{self.source}, line {line}: the JSON ends in the middle; is the file complete?")
        excerpt = self._text[max(start, at - EXCERPT // 2) :][:EXCERPT].split("\n")[0]
        return DataError(f"{self.source}, line {line}: not JSON ({what} at column {column}): {excerpt}")

    def _line(self) -> int:
        return self._lines + self._text.count("\n", 0, self._at) + 1

    def _read(self) -> bool:
        """Read on, at least as much as is unused, so that a large value is not tried too often; False at the end."""
        chunk = self._file.read(max(CHUNK, len(self._text) - self._at))
        try:
            more = self._utf8.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line = self._lines + self._text.count("\n") + error.object[: error.start].count(b"\n") + 1
            raise DataError(f"{self.source}, line {line}: not UTF-8 text ({error.reason}).") from error
        if not chunk:
            return False
        used = self._text[: self._at]
        if newlines := used.count("\n"):
            self._lines, self._column = self._lines + newlines, 0
        self._column += len(used) - (used.rfind("\n") + 1)
        self._text, self._at = self._text[self._at :] + more, 0
        return True
