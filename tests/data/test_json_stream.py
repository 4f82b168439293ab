"""Reading an array a piece at a time gives what reading it whole gives, wherever the pieces end."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.data.reading import json_stream
from llmkit.data.reading.json_stream import read_array
from llmkit.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ARRAYS = st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), max_size=5)


def read(content: bytes, chunk: int) -> list:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        return [value for _, value in read_array("FILE", io.BytesIO(content))]


@given(
    rows=ARRAYS,
    chunk=st.integers(1, 60),
    indent=st.none() | st.integers(0, 2),
    ascii_only=st.booleans(),
    held=st.booleans(),
)
def test_an_array_in_pieces_is_the_array(rows, chunk, indent, ascii_only, held):
    content = json.dumps({"n": 1234, "data": rows, "end": -5} if held else rows, indent=indent, ensure_ascii=ascii_only)

    assert read(content.encode(), chunk) == rows


@given(rows=ARRAYS, chunk=st.integers(1, 60), share=st.floats(0, 1, exclude_max=True))
def test_an_array_that_ends_early_is_an_error(rows, chunk, share):
    content = json.dumps(rows, ensure_ascii=False).encode()

    with pytest.raises(DataError, match=r"^FILE, line 1: "):
        read(content[: int(share * len(content))], chunk)


def test_an_array_broken_early_is_refused_without_reading_on():
    file = io.BytesIO(b'[{"a": 1}, {"a": oops}, ' + b'{"a": 1}, ' * 500_000)
    with pytest.raises(DataError, match="line 1: not JSON"):
        list(read_array("FILE", file))

    assert file.tell() <= 2 * json_stream.CHUNK


def test_sizes_are_those_of_the_text():
    assert [size for size, _ in read_array("FILE", io.BytesIO(b'[{"a": 1},  {"bc" : 22} ]'))] == [8, 11]
