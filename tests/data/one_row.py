"""One row of any format, converted: what the tests of chat and of preference formats share."""

import pytest

from llmkit.data.formats.table import FORMATS, convert
from llmkit.data.rows import Row
from llmkit.errors import DataError

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "1+1?"}


def one(layout, row):
    """The conversation or the pair that the row becomes."""
    (example,) = convert([Row(row, "rows.jsonl", 1)], layout, {}, preference=FORMATS[layout].preference)
    return example


def refusal(layout, row) -> str:
    """The message with which the row is refused."""
    with pytest.raises(DataError) as error:
        one(layout, row)
    return str(error.value)
