"""Rows are read exactly, and whatever is not JSON Lines is named with its file and line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit.config.schema import DataConfig
from llmkit.data.sources import read_jsonl, read_training_rows, read_validation_rows
from llmkit.errors import DataError

CHECKOUT = Path(__file__).parents[2]
GSM8K = CHECKOUT / "../shared/data/gsm8k"


def values(path):
    return [row.values for row in read_jsonl(path)]


def refusal(path) -> str:
    with pytest.raises(DataError) as error:
        list(read_jsonl(path))
    assert str(path) in str(error.value)
    return str(error.value)


def write(tmp_path, content: bytes) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    return file


def test_each_line_is_a_row_that_knows_its_place(tmp_path):
    file = write(tmp_path, b'{"a": 1}\n\n  \n{"a": "\xc3\xa9\\u2028"}')

    rows = list(read_jsonl(file))
    assert [row.values for row in rows] == [{"a": 1}, {"a": "é\u2028"}]
    assert [row.place() for row in rows] == [f"{file}, row 1", f"{file}, row 4"]


@pytest.mark.parametrize(
    "content", [b'{"a": 1}\r\n{"a": 2}\r\n', b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n'], ids=["CRLF", "BOM"]
)
def test_files_from_windows_are_read(tmp_path, content):
    assert values(write(tmp_path, content)) == [{"a": 1}, {"a": 2}]


def test_a_character_that_ends_a_line_elsewhere_does_not_here(tmp_path):
    assert values(write(tmp_path, '{"a": "x\u2028y\u0085z"}'.encode())) == [{"a": "x\u2028y\u0085z"}]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1}\n{"a": }\n', "line 2: not JSON (Expecting value at column 7)"),
        (b'{"a": 1}\n"text"\n', "line 2: a JSON object is expected"),
        (b'[\n{"a": 1},\n', "line 1: not JSON"),
        (b'[\n{"a": 1},\n', "A JSON array is not JSON Lines: write one object a line"),
        (b'[{"a": 1},\n', "A JSON array is not JSON Lines: write one object a line"),
        (b'[{"a": 1}]\n', "A JSON array is not JSON Lines: write one object a line"),
        ('{"a": 1}'.encode("utf-16"), "line 1: not UTF-8"),
        (b'{"a": "\\ud83d"}', "line 1: holds half a surrogate pair"),
    ],
)
def test_a_broken_line_is_named(tmp_path, content, said):
    assert said in refusal(write(tmp_path, content))


def test_bytes_that_are_not_text_are_named_with_their_line_however_far_down(tmp_path):
    file = write(tmp_path, b'{"a": 1}\n' * 700 + b'{"a": "\xff"}\n' + b'{"a": 1}\n' * 700)

    assert "line 701: not UTF-8" in refusal(file)


def test_a_surrogate_pair_is_text(tmp_path):
    assert values(write(tmp_path, b'{"a": "\\ud83d\\ude00"}')) == [{"a": "😀"}]


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere.jsonl")


def test_a_directory_in_the_place_of_a_file_cannot_be_read(tmp_path):
    assert "cannot be read (Is a directory)" in refusal(tmp_path)


def test_a_directory_gives_its_train_file(chats_file, tmp_path):
    chats_file(name="train.jsonl")

    assert len(read_training_rows(DataConfig(path=str(tmp_path)))) == 8


def test_a_directory_without_a_train_file_says_what_it_holds(chats_file, tmp_path):
    chats_file(name="training.jsonl")

    with pytest.raises(DataError, match=r"has no train\.jsonl \(it holds: training\.jsonl\)"):
        read_training_rows(DataConfig(path=str(tmp_path)))


def test_limit_reads_the_first_rows_only(chats_file):
    file = chats_file({"n": 1}, {"n": 2}, "this is not JSON")

    assert [row.values["n"] for row in read_training_rows(DataConfig(path=str(file), limit=2))] == [1, 2]


def test_an_empty_held_out_file_is_named(chats_file):
    with pytest.raises(DataError, match="holds no rows"):
        read_validation_rows(str(chats_file("")))


def test_the_whole_of_gsm8k_is_read():
    if not GSM8K.is_dir():
        pytest.skip(f"the real data is not on this machine: {GSM8K}")
    rows = read_training_rows(DataConfig(path=str(GSM8K)))

    assert len(rows) == 7473
    assert all(row.values.keys() == {"question", "answer"} for row in rows)


@pytest.mark.parametrize("offline", ["0", "1"])
def test_hub_data_that_cannot_be_reached_says_what_to_do(tmp_path, offline):
    code = (
        "import time; time.sleep = lambda seconds: None\n"  # the hub's client waits between its tries
        "from llmkit.config.schema import DataConfig; from llmkit.data.sources import read_training_rows\n"
        "try: read_training_rows(DataConfig(hub_id='org/nothing'))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    # Read when huggingface_hub is imported, so in a process of its own. Nothing listens at that port.
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True, cwd=CHECKOUT, check=True
    )

    assert done.stdout.startswith("ConfigError data.hub_id=org/nothing cannot be loaded: ")
    for words in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "data.path=DIR"):
        assert words in done.stdout
