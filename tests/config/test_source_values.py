"""`data.validation`, `data.test` and `data.datasets` mean what they say, whatever lies in the working directory."""

import pytest

from llmkit.config.schema import DataConfig, SourceConfig
from llmkit.config.sources import datasets_problem, names_split, split_source
from llmkit.errors import ConfigError

HUB = DataConfig(
    hub_id="org/rows",
    hub_config="main",
    commit="0123",
    format="alpaca",
    columns={"input": "text"},
    limit=3,
    weight=2.0,
    repeat=2,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory that holds files and a directory named like a split."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "test.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "test").mkdir()
    return tmp_path


@pytest.mark.parametrize("value", ["test", "validation_sft", "train[:10%]", "train[90%:]+test[:5]"])
def test_a_word_is_a_split_of_a_data_set_of_the_hub(folder, value):
    assert split_source(HUB, value, "data.test") == SourceConfig(
        hub_id="org/rows", hub_config="main", commit="0123", split=value, format="alpaca", columns={"input": "text"}
    )


def test_a_word_is_a_split_of_a_directory(folder):
    source = split_source(DataConfig(path=".", format="alpaca", limit=3), "test", "data.test")

    assert source == SourceConfig(path=".", split="test", format="alpaca")


@pytest.mark.parametrize("value", ["./test", "test/", "test.jsonl", "*.jsonl"])
@pytest.mark.parametrize("data", [HUB, DataConfig(path=".", format="alpaca", columns={"input": "text"})])
def test_a_path_is_a_source_with_the_layout_of_the_data(folder, data, value):
    source = split_source(data, value, "data.test")

    assert source == SourceConfig(path=value, format="alpaca", columns={"input": "text"})


@pytest.mark.parametrize("data", [DataConfig(path="rows.jsonl"), DataConfig(datasets=[SourceConfig(path=".")])])
def test_a_word_is_a_path_where_the_data_has_no_splits(folder, data):
    assert not names_split(data, "test")
    assert split_source(data, "test", "data.test") == SourceConfig(path="test")


@pytest.mark.parametrize("data", [HUB, DataConfig(path="rows.jsonl"), DataConfig(path="demo")])
def test_demo_is_the_held_out_part_of_the_demo(data):
    assert split_source(data, "demo", "data.validation") == SourceConfig(path="demo", split="validation")


def test_a_mapping_with_a_place_is_a_source_of_its_own():
    value = {"path": "a.csv", "format": "text", "columns": {"text": "body"}, "limit": 5}

    assert split_source(HUB, value, "data.test") == SourceConfig(
        path="a.csv", format="text", columns={"text": "body"}, limit=5
    )


def test_a_mapping_without_a_place_changes_the_data(folder):
    source = split_source(HUB, {"split": "test", "limit": 5}, "data.test")

    assert source == SourceConfig(
        hub_id="org/rows",
        hub_config="main",
        commit="0123",
        split="test",
        format="alpaca",
        columns={"input": "text"},
        limit=5,
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"pth": "a"}, "data.test: a source has no key 'pth'. Did you mean 'path'? Its keys: path, hub_id"),
        ({"path": "a", "weight": 2}, "data.test.weight: only training rows have it"),
        ({"path": "a", "repeat": 2}, "data.test.repeat: only training rows have it"),
        ({"path": "a", "limit": "few"}, "data.test.limit: "),
        ({"path": "a", "limit": 0}, "data.test.limit=0: must be greater than 0"),
        ({"path": "a", "format": "alpca"}, "data.test.format=alpca: must be one of auto, "),
        ({"path": "a", "format": "alpca"}, "Did you mean 'alpaca'?"),
        ({"path": "a", "columns": "b"}, "data.test.columns: "),
        ("", "data.test=: a file, the name of a split"),
        (3, "data.test=3: a file, the name of a split"),
        (["a"], "data.test=['a']: a file, the name of a split"),
    ],
)
def test_a_value_that_is_no_source_is_explained(value, said):
    with pytest.raises(ConfigError) as error:
        split_source(HUB, value, "data.test")
    assert said in str(error.value)


def test_all_unknown_keys_of_a_mapping_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        split_source(HUB, {"pth": "a", "weight": 2}, "data.test")
    assert len(error.value.problems) == 2


def test_a_mapping_without_a_place_is_none_of_several_sources():
    with pytest.raises(ConfigError, match="say where the rows are"):
        split_source(DataConfig(datasets=[SourceConfig(path="a")]), {"split": "test"}, "data.test")


@pytest.mark.parametrize(
    "value",
    [[], [{"path": "a"}], [{"path": "a", "weight": 0.5}, {"hub_id": "o/n", "columns": {"a": "b"}, "limit": None}]],
)
def test_a_list_of_sources_is_well_formed(value):
    assert datasets_problem(value) == ""


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("a.jsonl", "data.datasets=a.jsonl: expected a list of sources, [{path: FILE}"),
        (["a.jsonl"], "data.datasets[0]=a.jsonl: a source is a mapping; expected [{path: FILE}"),
        ([{"path": "a"}, {"pth": "b"}], "data.datasets[1]: a source has no key 'pth'. Did you mean 'path'?"),
        ([{"path": "a", "limit": "x"}], "data.datasets[0].limit: "),
        (None, "data.datasets=None: expected a list"),
    ],
)
def test_a_list_of_sources_that_is_none_is_explained(value, said):
    assert said in datasets_problem(value)
