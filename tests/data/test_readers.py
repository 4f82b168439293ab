"""Rows are read exactly from every type of file, in pieces, and what is broken is named with its file and line."""

import csv
import gzip
import json
import pickle
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmkit.data.reading.blocks import BLOCK_BYTES, BLOCK_ROWS
from llmkit.data.reading.readers import read_file
from llmkit.errors import DataError

SHARED = Path(__file__).parents[2] / "../shared/data"
ROWS = [{"question": f"{n}+{n}?", "answer": f"{2 * n} é\u2028😀"} for n in range(5)]


def write_jsonl(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_json(file: Path, rows: list[dict]) -> None:
    file.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def write_csv(file: Path, rows: list[dict]) -> None:
    with file.open("w", newline="", encoding="utf-8") as text:
        writer = csv.DictWriter(text, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(file: Path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), file)


TYPES = {"jsonl": write_jsonl, "ndjson": write_jsonl, "json": write_json, "csv": write_csv, "parquet": write_parquet}


@pytest.fixture
def make(tmp_path):
    """A function: extension (with .gz or not) and rows, or the very bytes -> a file."""

    def write(extension: str, content: list[dict] | bytes) -> Path:
        file = tmp_path / f"rows.{extension.removesuffix('.gz')}"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            TYPES[extension.removesuffix(".gz")](file, content)
        if extension.endswith(".gz"):
            zipped = file.with_name(f"{file.name}.gz")
            zipped.write_bytes(gzip.compress(file.read_bytes()))
            return zipped
        return file

    return write


def read(file: Path, **options) -> list:
    return [row for block in read_file(file, **options) for row in block.rows()]


def values(file: Path, **options) -> list[dict]:
    return [row.values for row in read(file, **options)]


def refusal(file: Path) -> str:
    with pytest.raises(DataError) as error:
        read(file)
    message = str(error.value)
    assert message.startswith(str(file)), "the file is named"
    assert "\n" not in message
    return message


EVERY_TYPE = [f"{extension}{zipped}" for extension in TYPES for zipped in ("", ".gz")]


@pytest.mark.parametrize("extension", EVERY_TYPE)
def test_every_type_of_file_gives_its_rows(make, extension):
    assert values(make(extension, ROWS)) == ROWS


@pytest.mark.parametrize("extension", ["JSONL", "Json", "CSV", "Parquet.GZ"])
def test_capitals_in_an_extension_do_not_matter(make, extension):
    lower = make(extension.lower(), ROWS)
    file = lower.rename(lower.with_name(f"rows.{extension}"))

    assert values(file) == ROWS


@pytest.mark.parametrize("extension", EVERY_TYPE)
@pytest.mark.parametrize("limit", [1, 3, 5, 9])
def test_a_limit_gives_the_first_rows(make, extension, limit):
    assert values(make(extension, ROWS), limit=limit) == ROWS[:limit]


@pytest.mark.parametrize(
    ("extension", "numbers"), [("jsonl", [1, 2, 3, 4, 5]), ("json", [1, 2, 3, 4, 5]), ("parquet", [0, 1, 2, 3, 4])]
)
def test_every_row_knows_its_file_and_number(make, extension, numbers):
    file = make(extension, ROWS)

    assert [(row.source, row.number) for row in read(file)] == [(str(file), number) for number in numbers]


@pytest.mark.parametrize("extension", EVERY_TYPE)
def test_blocks_go_to_other_processes_in_pieces_that_know_their_length(make, extension):
    rows = [{"n": str(n)} for n in range(2 * BLOCK_ROWS + 1)]
    blocks = [pickle.loads(pickle.dumps(block)) for block in read_file(make(extension, rows))]

    assert [row.values for block in blocks for row in block.rows()] == rows
    assert max(map(len, blocks)) <= BLOCK_ROWS
    assert [len(block) for block in blocks] == [len(block.rows()) for block in blocks]


@pytest.mark.parametrize("extension", EVERY_TYPE)
def test_large_rows_come_in_smaller_blocks(make, extension):
    rows = [{"n": str(n), "text": "x" * (BLOCK_BYTES // 4)} for n in range(12)]
    blocks = list(read_file(make(extension, rows)))

    assert [row.values for block in blocks for row in block.rows()] == rows
    assert max(len(block) for block in blocks) <= 4


@pytest.mark.parametrize("extension", ["jsonl", "json", "csv", "jsonl.gz", "json.gz", "csv.gz"])
def test_memory_does_not_grow_with_the_file(make, extension):
    rows = [{"n": str(n), "text": "x" * 1000} for n in range(24_000)]  # 24 MB
    file = make(extension, rows)
    del rows
    tracemalloc.start()
    count = sum(len(block) for block in read_file(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert count == 24_000
    assert peak < 4 * BLOCK_BYTES, "16 MB"


@pytest.mark.parametrize("extension", ["parquet", "parquet.gz"])
def test_memory_does_not_grow_with_a_row_group(make, extension):
    file = make(extension, [{"n": n, "text": f"{n % 97:x}" * 1000} for n in range(20_000)])
    before = pa.total_allocated_bytes()
    largest = max(pa.total_allocated_bytes() - before for _ in read_file(file))

    assert largest < 8 * BLOCK_BYTES, "of 20 MB in one row group"


def test_a_limited_block_of_a_table_sends_no_more_than_its_rows(make):
    file = make("parquet", [{"text": "x" * 100} for _ in range(BLOCK_ROWS)])
    (block,) = read_file(file, limit=2)

    assert len(pickle.dumps(block)) < 3000


# JSON Lines


def test_each_line_is_a_row_that_knows_its_place(make):
    file = make("jsonl", b'{"a": 1}\n\n  \n{"a": "\xc3\xa9\\u2028"}')

    rows = read(file)
    assert [row.values for row in rows] == [{"a": 1}, {"a": "é\u2028"}]
    assert [row.place() for row in rows] == [f"{file}, row 1", f"{file}, row 4"]


@pytest.mark.parametrize(
    "content", [b'{"a": 1}\r\n{"a": 2}\r\n', b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n'], ids=["CRLF", "BOM"]
)
@pytest.mark.parametrize("extension", ["jsonl", "json"])
def test_lines_from_windows_are_read(make, extension, content):
    assert values(make(extension, content)) == [{"a": 1}, {"a": 2}]


def test_a_character_that_ends_a_line_elsewhere_does_not_here(make):
    assert values(make("jsonl", '{"a": "x\u2028y\u0085z"}'.encode())) == [{"a": "x\u2028y\u0085z"}]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1}\n{"a": }\n', "line 2: not JSON (Expecting value at column 7): {"),
        (b'{"a": 1}\n"text"\n', 'line 2: a JSON object is expected, found: "text"'),
        (b'{"a": 1}\n\n[1]\n', "line 3: a JSON object is expected, found: [1]"),
        (b'{\n"a": 1\n}', "line 1: not JSON"),
        (b'{"a": 1} {"a": 2}', "line 1: not JSON (Extra data at column 10)"),
        ('{"a": 1}'.encode("utf-16"), "line 1: not UTF-8"),
        (b'{"a": "\\ud83d"}', "line 1: holds half a surrogate pair"),
        (b'{"a": 1}\n' + b'{"a":' * 100_000, "line 2: nested too deeply"),
    ],
)
def test_a_broken_line_is_named(make, content, said):
    assert said in refusal(make("jsonl", content))


def test_a_broken_line_is_shown_by_its_first_characters(make):
    message = refusal(make("jsonl", b'{"a": ' + b"x" * 1000))

    assert message.endswith('{"a": ' + "x" * 194)


def test_bytes_that_are_not_text_are_named_with_their_line_however_far_down(make):
    file = make("jsonl", b'{"a": 1}\n' * 7000 + b'{"a": "\xff"}\n' + b'{"a": 1}\n' * 700)

    assert "line 7001: not UTF-8 text (invalid start byte at byte 8)" in refusal(file)


def test_a_surrogate_pair_is_text(make):
    assert values(make("jsonl", b'{"a": "\\ud83d\\ude00"}')) == [{"a": "😀"}]


def test_a_limit_stops_before_what_is_broken(make):
    assert values(make("jsonl", b'{"n": 1}\n{"n": 2}\nnot JSON\n'), limit=2) == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize("content", [b"", b"\n\n  \n", b"\xef\xbb\xbf", b"\n" * (2 * BLOCK_ROWS)])
@pytest.mark.parametrize("extension", ["jsonl", "json", "jsonl.gz"])
def test_a_file_without_rows_has_no_blocks(make, extension, content):
    assert list(read_file(make(extension, content))) == []


def test_rows_after_many_blank_lines_are_found(make):
    (row,) = read(make("jsonl", b"\n" * (2 * BLOCK_ROWS) + b'{"a": 1}'))

    assert (row.values, row.number) == ({"a": 1}, 2 * BLOCK_ROWS + 1)


# JSON, and either type under the other's name


@pytest.mark.parametrize(
    "content", [b'[{"a": 1}, {"a": 2}]', b' \n\t[\n{"a":1}\n,{"a":2}]\n', b'\xef\xbb\xbf[{"a":1},{"a":2}]']
)
@pytest.mark.parametrize("extension", ["json", "jsonl", "json.gz", "jsonl.gz"])
def test_an_array_is_recognised_under_either_name(make, extension, content):
    assert values(make(extension, content)) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("content", [b'{"a": 1}\n{"a": 2}', b'\n\n{"a": 1}\n\n{"a": 2}\n', b'{"a": 1}\r\n{"a": 2}\r\n'])
@pytest.mark.parametrize("extension", ["json", "json.gz"])
def test_lines_are_recognised_under_the_name_of_json(make, extension, content):
    assert values(make(extension, content)) == [{"a": 1}, {"a": 2}]


def test_one_line_under_the_name_of_json_is_one_row(make):
    row = {"messages": [{"role": "user", "content": "hi"}]}

    assert values(make("json", json.dumps(row).encode())) == [row]


@pytest.mark.parametrize("holder", ["data", "rows", "examples"])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_may_hold_the_array(make, holder, indent):
    content = {"version": 12, "about": {"data": [1]}, holder: [{"a": 1}, {"a": 2}], "end": [None, "]"]}

    assert values(make("json", json.dumps(content, indent=indent).encode())) == [{"a": 1}, {"a": 2}]


def test_lines_with_a_column_of_that_name_are_rows(make):
    content = b'{"data": [{"a": 1}]}\n{"data": [{"a": 2}]}\n'

    assert values(make("json", content)) == [{"data": [{"a": 1}]}, {"data": [{"a": 2}]}]


def test_json_means_the_same_in_an_array_and_in_lines(make):
    content = (
        b'{"i": 123456789012345678901234567890, "f": 1e400, "n": null, "s": "\\ud83d\\ude00 \\u00e9 \xc3\xa9 \\n"}'
    )

    assert values(make("json", b"[" + content + b"]")) == values(make("jsonl", content))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[\n{"a": 1},\n{"a": }\n]', "line 3: not JSON (Expecting value at column 7): {"),
        (b'[\n{"a": 1}\n{"a": 2}\n]', "line 3: not JSON (Expecting ',' at column 1)"),
        (b'[{"a": 1},\n]', "line 2: not JSON (Expecting a value at column 1)"),
        (b'[{"a": 1},\n', "line 2: the JSON ends in the middle"),
        (b'[{"a": "x', "line 1: not JSON (Unterminated string starting at at column 8)"),
        (b'[{"a": 1}]\n[{"a": 2}]', "line 2: not JSON (more text after the end at column 1)"),
        (b'[{"a": 1}]\n\xc3', "line 2: not UTF-8 text"),
        (b'[{"a": 1},\n1]', "line 2: a JSON object is expected, found: 1"),
        (b'[{"a": 1},\n["b"]]', 'line 2: a JSON object is expected, found: ["b"]'),
        (b'[\n\n{"a": "\xff"}]', "line 3: not UTF-8 text (invalid start byte)"),
        (b'[{"a": 1},\n{"a": "\\ud83d"}]', "line 2: holds half a surrogate pair"),
        (b'[{"a":\n' + b"[" * 100_000, "nested too deeply"),
        ('[{"a": 1}]'.encode("utf-16"), "line 1: not UTF-8"),
        (b"text", "line 1: not JSON"),
        (b'{\n"a": 1,\n"b": []}', "one JSON object, with the keys 'a', 'b'; rows are an array of objects"),
        (b'{"data": [],\n"rows": []}', "both 'data' and 'rows' hold rows"),
        (b'{"data": [{"a": 1}],\n"rest": x}', "line 2: not JSON (Expecting value at column 9)"),
    ],
)
def test_a_broken_json_file_is_named_with_its_line(make, content, said):
    assert said in refusal(make("json", content))


def test_the_line_of_what_is_broken_is_right_however_far_down(make):
    rows = [{"text": "x\n" * 50, "n": n} for n in range(40_000)]  # more than is in memory at a time
    text = json.dumps(rows, indent=1).replace('"n": 39990', '"n": 0x', 1)
    line = text[: text.index("0x")].count("\n") + 1

    assert f"line {line}: not JSON (Expecting ',' delimiter at column 9)" in refusal(make("json", text.encode()))


# CSV


def test_cells_are_text_with_commas_quotes_and_lines_inside(make):
    content = 'question,answer\r\n"a, b","say ""hi""\nthere"\r\n\r\n1,\n'
    rows = read(make("csv", content.encode()))

    assert [row.values for row in rows] == [
        {"question": "a, b", "answer": 'say "hi"\nthere'},
        {"question": "1", "answer": ""},
    ]
    assert [row.number for row in rows] == [2, 5], "the lines that rows begin in"


def test_a_byte_order_mark_is_no_part_of_the_first_column(make):
    assert values(make("csv", b"\xef\xbb\xbfa,b\n1,2\n")) == [{"a": "1", "b": "2"}]


def test_a_cell_may_be_large(make):
    assert values(make("csv", b"text,n\n" + b"x" * 10**6 + b",1\n")) == [{"text": "x" * 10**6, "n": "1"}]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a,b\n1,2\n\n3\n", "line 4: 1 cells, but the header has 2 columns (a, b): 3"),
        (b'a,b\n"1\n2",2\n1,2,3\n', "line 4: 3 cells, but the header has 2 columns (a, b): 1,2,3"),
        (b'a,b\n1,"2\n3\n', "line 2: not CSV (unexpected end of data)"),
        (b'a,b\n1,"2"x\n', "line 2: not CSV"),
        (b"a,b\n1,\xff\n", "line 2: not UTF-8 text (invalid start byte at byte 3)"),
        (b"a;b\n1;2\n", "line 1: columns are separated by commas, not by ';': a;b"),
        (b"a\tb\n1\t2\n", "not by '\\t'"),
        (b"a,,b\n1,2,3\n", "line 1: the first line names the columns; one has no name"),
        (b"a,b,a\n1,2,3\n", "line 1: two columns are named 'a'"),
        ("a,b\n1,2\n".encode("utf-16"), "line 1: not UTF-8"),
    ],
)
def test_a_broken_table_is_named_with_its_line(make, content, said):
    assert said in refusal(make("csv", content))


@pytest.mark.parametrize("content", [b"", b"a,b\n", b"\n\n"])
def test_a_table_without_rows_has_no_blocks(make, content):
    assert list(read_file(make("csv", content))) == []


# Parquet, gzip, and files that cannot be read


def test_nested_values_of_a_table_are_rows_like_any(make):
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}], "n": 1, "x": 0.5}

    assert values(make("parquet", [row])) == [row]


def test_a_table_of_several_row_groups_is_read_in_order(tmp_path):
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"n": list(range(2500))}), file, row_group_size=700)

    assert [row.values["n"] for row in read(file)] == list(range(2500))
    assert [row.number for row in read(file)] == list(range(2500))
    assert [row.values["n"] for row in read(file, limit=1001)] == list(range(1001))


@pytest.mark.parametrize("extension", ["parquet", "parquet.gz"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"no table at all, but text that goes on for a while"])
def test_what_is_no_table_is_named(make, extension, content):
    assert "not a Parquet file that can be read" in refusal(make(extension, content))


@pytest.mark.parametrize("extension", [name for name in EVERY_TYPE if name.endswith(".gz")])
@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"text" + b, lambda b: b[:20] + b"\0\0" + b[22:]])
def test_a_broken_gzip_file_is_named(make, extension, damage):
    file = make(extension, ROWS)
    file.write_bytes(damage(file.read_bytes()))

    assert "not a whole gzip file" in refusal(file)


@pytest.mark.parametrize("extension", EVERY_TYPE)
def test_a_file_that_is_not_there_is_named(tmp_path, extension):
    assert "does not exist" in refusal(tmp_path / f"nowhere.{extension}")


def test_a_directory_in_the_place_of_a_file_cannot_be_read(tmp_path):
    (tmp_path / "rows.jsonl").mkdir()

    assert "cannot be read (Is a directory)" in refusal(tmp_path / "rows.jsonl")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not beside the checkout (../shared/data)")
@pytest.mark.parametrize(
    ("name", "count", "columns"),
    [
        ("gsm8k/train.jsonl", 7473, {"question", "answer"}),
        ("gsm8k/test.jsonl", 1319, {"question", "answer"}),
        ("llama-factory/alpaca_en_demo.json", 999, {"instruction", "input", "output"}),
        ("llama-factory/dpo_en_demo.json", 300, {"conversations", "chosen", "rejected"}),
    ],
)
def test_the_real_files_are_read_whole(name, count, columns):
    rows = values(SHARED / name)

    assert len(rows) == count
    assert all(row.keys() == columns for row in rows)
    text = (SHARED / name).read_text(encoding="utf-8")
    assert rows == (json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()])
