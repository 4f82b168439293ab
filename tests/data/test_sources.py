"""A source names its rows, hashes their content and gives them in order, whatever files they lie in."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest

from llmkit.config.schema import DataConfig, SourceConfig
from llmkit.data.reading.sources import open_source, shipped_demo
from llmkit.errors import ConfigError, DataError

GSM8K = Path(__file__).parents[2] / "../shared/data/gsm8k"


def source_of(path, **settings):
    return open_source(SourceConfig(path=str(path), **settings))


def numbers(source) -> list:
    return [row.values["n"] for block in source.blocks() for row in block.rows()]


@pytest.fixture
def write(tmp_path):
    """A function: a file's name and numbers -> the file, a row `{"n": NUMBER}` for each."""

    def lines(name: str, *values: object) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps({"n": value}) + "\n" for value in values))
        return file

    return lines


# Rows


def test_a_directory_gives_the_rows_of_its_split(write, tmp_path):
    write("train.jsonl", 1, 2)
    write("test.jsonl", 3)

    assert numbers(source_of(tmp_path)) == [1, 2]
    assert numbers(source_of(tmp_path, split="test")) == [3]


def test_files_are_read_one_after_the_other_whatever_their_types(write, tmp_path):
    write("b.jsonl", 3, 4)
    (tmp_path / "a.json").write_text('[{"n": 1}, {"n": 2}]')
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"n": 5}'))

    assert numbers(source_of(f"{tmp_path}/*")) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 9])
def test_a_limit_counts_over_all_files(write, tmp_path, limit):
    write("a.jsonl", 1, 2)
    write("b.jsonl", 3, 4)

    assert numbers(source_of(tmp_path, limit=limit)) == [1, 2, 3, 4][:limit]


def test_a_limit_leaves_files_after_it_alone(write, tmp_path):
    write("a.jsonl", 1, 2)
    (tmp_path / "b.jsonl").write_text("not JSON")

    assert numbers(source_of(tmp_path, limit=2)) == [1, 2]
    with pytest.raises(DataError, match=r"b\.jsonl, line 1: not JSON"):
        numbers(source_of(tmp_path, limit=3))


def test_opening_a_source_reads_no_rows(write, tmp_path):
    (tmp_path / "rows.jsonl").write_text("not JSON")

    assert source_of(tmp_path).name == str(tmp_path)


@pytest.mark.parametrize(("split", "count"), [("train", 142), ("validation", 36)])
def test_the_demo_ships_with_its_splits(split, count):
    source = open_source(SourceConfig(path="demo", split=split))

    assert source.name == "demo"
    assert sum(map(len, source.blocks())) == count


def test_the_demo_has_a_part_of_pairs():
    assert shipped_demo("train", preference=True).name == "preference_train.jsonl"


def test_a_split_the_demo_lacks_is_named():
    with pytest.raises(DataError, match=r"demo: has no split 'trian', but train and validation\. Did you mean 'train'"):
        open_source(SourceConfig(path="demo", split="trian"))


def test_a_source_without_a_place_is_named():
    with pytest.raises(ConfigError, match=r"data.datasets\[1\]: say where the rows are"):
        open_source(SourceConfig(), key="data.datasets[1]")


def test_what_is_not_there_is_named_by_its_key(tmp_path):
    with pytest.raises(DataError, match=r"data.test.path=.*nowhere.jsonl: does not exist"):
        open_source(SourceConfig(path=str(tmp_path / "nowhere.jsonl")), key="data.test")


def test_the_whole_of_gsm8k_is_read():
    if not GSM8K.is_dir():
        pytest.skip(f"the real data is not on this machine: {GSM8K}")
    source = open_source(DataConfig(path=str(GSM8K)))
    rows = [row for block in source.blocks() for row in block.rows()]

    assert len(rows) == 7473
    assert all(row.values.keys() == {"question", "answer"} for row in rows)
    assert sum(map(len, open_source(DataConfig(path=str(GSM8K), split="test")).blocks())) == 1319


# Special tokens


def test_a_file_of_tokens_beside_the_rows_is_read_and_is_no_row(write, tmp_path):
    write("rows.json", 1)
    (tmp_path / "tokens.json").write_text('{"tokens": ["<A>", "<B>", "<A>"]}')

    for path in (tmp_path, tmp_path / "rows.json", f"{tmp_path}/*.json"):
        source = source_of(path)
        assert source.special_tokens == ["<A>", "<B>"]
        assert numbers(source) == [1]


def test_tokens_of_several_directories_are_put_together(write, tmp_path):
    for folder, token in (("one", "<A>"), ("two", "<B>")):
        write(f"{folder}/rows.jsonl", 1)
        (tmp_path / folder / "tokens.json").write_text(json.dumps({"tokens": ["<C>", token]}))

    assert source_of(f"{tmp_path}/*/rows.jsonl").special_tokens == ["<C>", "<A>", "<B>"]


def test_rows_without_a_file_of_tokens_have_none(write, tmp_path):
    write("rows.jsonl", 1)

    assert source_of(tmp_path).special_tokens == []


@pytest.mark.parametrize("content", ['["<A>"]', '{"tokens": "<A>"}', '{"tokens": [1]}', '{"tokens": [""]}', "{}", "x"])
def test_a_file_of_tokens_that_is_none_is_named(write, tmp_path, content):
    write("rows.jsonl", 1)
    (tmp_path / "tokens.json").write_text(content)

    with pytest.raises(DataError) as error:
        source_of(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/tokens.json: ")


# Fingerprint


def test_touching_copying_and_renaming_rows_keeps_their_fingerprint(write, tmp_path):
    file = write("one/rows.jsonl", 1, 2)
    before = source_of(file).fingerprint()
    os.utime(file, (1, 1))
    copy = shutil.copy(file, tmp_path / "copy.jsonl")

    assert source_of(file).fingerprint() == before
    assert source_of(copy).fingerprint() == before
    assert source_of(tmp_path / "one").fingerprint() == before
    assert source_of(Path(copy).rename(tmp_path / "other.ndjson")).fingerprint() == before


def test_one_other_character_changes_the_fingerprint(write):
    file = write("rows.jsonl", 1, 2)
    before = source_of(file).fingerprint()
    write("rows.jsonl", 1, 3)

    assert source_of(file).fingerprint() != before


def test_order_and_division_of_files_change_the_fingerprint(write, tmp_path):
    write("a.jsonl", 1, 2)
    write("b.jsonl", 3)
    first = source_of(tmp_path).fingerprint()
    (tmp_path / "a.jsonl").rename(tmp_path / "c.jsonl")
    swapped = source_of(tmp_path).fingerprint()
    write("c.jsonl", 1)
    write("b.jsonl", 3, 2)

    assert len({first, swapped, source_of(tmp_path).fingerprint()}) == 3


def test_the_type_that_content_is_read_as_is_part_of_the_fingerprint(tmp_path):
    content = "a\n1\n"
    (tmp_path / "rows.csv").write_text(content)
    (tmp_path / "rows.json").write_text(content)

    assert source_of(tmp_path / "rows.csv").fingerprint() != source_of(tmp_path / "rows.json").fingerprint()


def test_rows_that_change_while_they_are_read_are_refused(write):
    file = write("rows.jsonl", 1)
    source = source_of(file)
    source.fingerprint()
    write("rows.jsonl", 1, 2)

    with pytest.raises(DataError, match=r"rows\.jsonl: has changed while it was read"):
        numbers(source)


def test_a_file_that_goes_away_before_it_is_hashed_is_named(write):
    file = write("rows.jsonl", 1)
    source = source_of(file)
    file.unlink()

    with pytest.raises(DataError, match=r"rows\.jsonl: cannot be read \(No such file or directory\)"):
        source.fingerprint()
