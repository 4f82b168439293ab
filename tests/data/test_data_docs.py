"""docs/data.md shows what llmkit reads: its table is that of the code, and every example converts."""

import json
import re
from pathlib import Path

import pytest

from llmkit.data.formats.table import FORMATS, convert, detect_format
from llmkit.data.rows import Row

DOCS = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
# Each example, with the format its section is about.
SECTIONS = [
    (section[1] or "messages", json.loads(example))
    for section in re.finditer(r"^#+ (?:`(\w+)`)?.*\n((?:(?!#).*\n)*)", DOCS, re.MULTILINE)
    for example in re.findall(r"```json\n(.*?)```", section[2], re.DOTALL)
]


def test_the_table_of_formats_is_that_of_the_code():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) ?\| (sft|dpo) \|$", DOCS, re.MULTILINE)

    assert [
        (name, set(re.findall(r"`(\w+)`", columns)), set(re.findall(r"`(\w+)`", also)), recipe)
        for name, columns, also, recipe in rows
    ] == [
        (name, set(layout.columns), set(layout.optional), "dpo" if layout.preference else "sft")
        for name, layout in FORMATS.items()
    ]


def test_every_format_has_an_example():
    assert {name for name, _ in SECTIONS} == set(FORMATS)


@pytest.mark.parametrize(("name", "values"), SECTIONS)
def test_an_example_is_what_its_section_says(name, values):
    row, preference = Row(values, "docs", 1), FORMATS[name].preference

    assert detect_format(row, {}, preference=preference) == name
    assert len(convert([row], name, {}, preference=preference)) == 1
