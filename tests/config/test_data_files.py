"""A path names the files a reader would expect, in a fixed order; where that is not clear it says so."""

from pathlib import Path

import pytest

from llmkit.config.data_files import file_type, find_files
from llmkit.errors import DataError


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A function that makes empty files in the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(*names: str) -> Path:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    return make


def found(path: str, split: str = "train") -> list[str]:
    return [file.as_posix() for file in find_files(path, split=split, said=f"data.path={path}")]


def refusal(path: str, split: str = "train") -> str:
    with pytest.raises(DataError) as error:
        found(path, split)
    message = str(error.value)
    assert message.startswith(f"data.path={path}: ")
    return message


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", "jsonl"),
        ("a.ndjson.gz", "jsonl"),
        ("a.b.JSON", "json"),
        ("a.csv", "csv"),
        ("a.Parquet.GZ", "parquet"),
        ("a.txt", None),
        ("a.gz", None),
        ("jsonl", None),
        (".jsonl", None),
        ("a.jsonl.zip", None),
    ],
)
def test_the_extension_tells_the_type(name, kind):
    assert file_type(Path(name)) == kind


def test_a_file_is_itself(files):
    files("rows.csv")

    assert found("rows.csv") == ["rows.csv"]


@pytest.mark.parametrize("name", ["[a].jsonl", "a*.jsonl", "rows?.json"])
def test_a_file_whose_name_looks_like_a_glob_is_itself(files, name):
    files(name, "a.jsonl", "rows1.json")

    assert found(name) == [name]


@pytest.mark.parametrize("name", ["rows.txt", "rows", "rows.gz", "rows.xlsx", "rows.jsonl.zip"])
def test_a_file_of_another_type_says_which_are_read(files, name):
    files(name)

    message = refusal(name)
    assert f"{name} is of no type that llmkit reads" in message
    for legal in (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".gz"):
        assert legal in message


def test_what_is_not_there_names_the_nearest(files):
    files("chats.jsonl")

    assert "does not exist" in refusal("chat.jsonl")
    assert "Did you mean 'chats.jsonl'" in refusal("chat.jsonl")


# Directories


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet", "train.csv.gz", "train-00000-of-00001.parquet"])
def test_a_directory_gives_the_files_of_the_split(files, name):
    files(f"d/{name}", "d/test.jsonl", "d/README.md", "d/other.json")

    assert found("d") == [f"d/{name}"]


def test_parts_of_a_split_are_read_in_order(files):
    names = [f"d/train-0000{n}-of-00003.parquet" for n in range(3)]
    files(*reversed(names), "d/test-00000-of-00001.parquet")

    assert found("d") == names
    assert found("d", "test") == ["d/test-00000-of-00001.parquet"]


def test_a_split_may_have_any_name(files):
    files("d/train_sft.jsonl", "d/train.jsonl")

    assert found("d", "train_sft") == ["d/train_sft.jsonl"]
    assert found("d") == ["d/train.jsonl"]


def test_a_directory_without_names_of_splits_gives_all_files_sorted(files):
    files("d/b.jsonl", "d/a.ndjson", "d/c.jsonl.gz", "d/notes.txt", "d/.hidden.jsonl", "d/sub/e.jsonl")

    assert found("d") == ["d/a.ndjson", "d/b.jsonl", "d/c.jsonl.gz"]


@pytest.mark.parametrize("name", ["tokens.json", "manifest.json", "dataset_info.json"])
def test_files_about_the_rows_are_no_rows(files, name):
    files("d/rows.json", f"d/{name}")

    assert found("d") == ["d/rows.json"]
    assert found("d/*.json") == ["d/rows.json"]


def test_a_split_that_is_not_there_says_what_is(files):
    files("d/train.jsonl", "d/valid.jsonl")

    message = refusal("d", "validation")
    assert "no file of the split 'validation', such as validation.jsonl" in message
    assert "it holds: train.jsonl, valid.jsonl" in message


@pytest.mark.parametrize("name", ["test.jsonl", "training.jsonl", "dev-00000-of-00001.parquet", "Valid.csv"])
def test_rows_of_another_split_are_not_trained_on(files, name):
    files(f"d/{name}", f"d/more{Path(name).suffix}")

    message = refusal("d")
    assert f"the directory has no train.jsonl, or train of another type, but {name}" in message
    assert "data.split" in message


def test_a_directory_without_rows_says_what_it_holds(files):
    files("d/a.txt", *(f"d/b{n}.txt" for n in range(9)), "e/x/y")

    assert "no file that llmkit reads (it holds: a.txt, b0.txt, " in refusal("d")
    assert "and 2 more" in refusal("d")
    assert "(it holds: x)" in refusal("e")


@pytest.mark.parametrize(
    "names", [("train.jsonl", "train.parquet"), ("train-1.csv", "train-2.json"), ("a.json", "b.csv")]
)
def test_files_of_several_types_may_be_the_same_rows(files, names):
    files(*(f"d/{name}" for name in names))

    assert "the same rows; name one of them, or a glob" in refusal("d")


def test_a_missing_part_of_a_split_is_seen(files):
    files("d/train-00000-of-00003.parquet", "d/train-00002-of-00003.parquet")

    assert "2 of 3 parts are there" in refusal("d")


def test_a_split_that_is_there_whole_and_in_parts_is_not_read_twice(files):
    files("d/train.parquet", "d/train-00000-of-00001.parquet")

    assert "may hold the same rows" in refusal("d")


# Globs


def test_a_glob_gives_its_files_sorted(files):
    files("d/b.jsonl", "d/a.jsonl", "e/c.jsonl", "e/tokens.json", "e/f/g.jsonl")

    assert found("*/*.json*") == ["d/a.jsonl", "d/b.jsonl", "e/c.jsonl"]
    assert found("**/*.jsonl") == ["d/a.jsonl", "d/b.jsonl", "e/c.jsonl", "e/f/g.jsonl"]


def test_a_glob_that_matches_nothing_is_named(files):
    files("a.jsonl")

    assert "no file matches" in refusal("*.csv")


def test_a_glob_that_matches_another_type_names_the_file(files):
    files("a.jsonl", "b.txt")

    assert "b.txt is of no type" in refusal("*")


@pytest.mark.parametrize("path", ["rows.jsonl", "*.jsonl"])
def test_files_have_no_splits(files, path):
    files("rows.jsonl")

    assert "'test' cannot be read: only directories and data sets of the hub have splits" in refusal(path, "test")
