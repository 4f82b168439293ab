"""What is wrong with the data's settings is told before anything starts, with the key, and all of it at once."""

import pytest

from llmkit.config.resolve import use_absolute_paths
from llmkit.config.schema import DataConfig, ModelConfig, SourceConfig, TrainConfig
from llmkit.config.validate_data import data_problems


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory: rows.jsonl, and d with train.jsonl and test.jsonl."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    for name in ("rows.jsonl", "d/train.jsonl", "d/test.jsonl"):
        (tmp_path / name).touch()
    return tmp_path


def problems(**settings) -> list[str]:
    return data_problems(TrainConfig(data=DataConfig(**{"validation": None, **settings})))


def problem(**settings) -> str:
    (found,) = problems(**settings)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"path": "rows.jsonl"},
        {"path": "d"},
        {"path": "*.jsonl"},
        {"path": "demo", "validation": "demo"},
        {"path": "demo", "validation": "validation"},
        {"hub_id": "org/rows"},
        {"path": "d", "hub_id": "org/rows"},
        {"path": "d", "validation": 0.1, "test": "test"},
        {"path": "d", "split": "test"},
        {"path": "d", "validation": "d/test.jsonl", "test": {"split": "test", "limit": 3}},
        {"hub_id": "org/rows", "validation": "train[:5%]", "test": "test"},
        {"path": "rows.jsonl", "test": {"hub_id": "org/rows", "split": "test"}},
        {"datasets": [SourceConfig(path="rows.jsonl"), SourceConfig(hub_id="org/rows", repeat=2)]},
        {"datasets": [SourceConfig(path="d", weight=1), SourceConfig(path="rows.jsonl", weight=2)]},
        {"path": "rows.jsonl", "special_tokens": ["<A>"]},
        {"path": "rows.jsonl", "special_tokens": "rows.jsonl"},
    ],
)
def test_what_is_right_is_not_complained_of(settings):
    assert problems(**settings) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "data=jsonl: say where the rows are, with data.path=FILE"),
        ({"path": "row.jsonl"}, "data.path=row.jsonl: does not exist"),
        ({"path": "row.jsonl"}, "Did you mean 'rows.jsonl'"),
        ({"path": "*.csv"}, "data.path=*.csv: no file matches"),
        ({"path": "d", "split": "tset"}, "data.path=d: the directory has no file of the split 'tset'"),
        ({"path": "rows.jsonl", "split": "test"}, "only directories and data sets of the hub have splits"),
        ({"path": "d", "validation": 20}, "data.validation=20: a share between 0 and 1, a file"),
        ({"path": "d", "validation": 0}, "data.validation=0: a share between 0 and 1"),
        ({"path": "d", "validation": True}, "data.validation=True: a share between 0 and 1"),
        ({"path": "d", "validation": ["a"]}, "data.validation=['a']: a share between 0 and 1"),
        ({"path": "d", "test": 0.1}, "data.test=0.1: a file, the name of a split"),
        ({"path": "d", "test": "rows.json"}, "data.test=rows.json: does not exist"),
        ({"path": "d", "test": "rows.json"}, "Did you mean 'rows.jsonl'"),
        ({"path": "d", "test": "tset"}, "data.test=tset: d: the directory has no file of the split 'tset'"),
        ({"path": "rows.jsonl", "test": "test"}, "data.test=test: does not exist"),
        ({"path": "rows.jsonl", "test": "test"}, "Splits have names only in a directory"),
        ({"path": "d", "test": {"path": "nowhere.csv"}}, "data.test={'path': 'nowhere.csv'}: "),
        ({"path": "d", "test": {"pth": "rows.jsonl"}}, "Did you mean 'path'"),
        ({"path": "rows.jsonl", "special_tokens": "row.jsonl"}, "data.special_tokens=row.jsonl: no such file"),
        ({"path": "rows.jsonl", "special_tokens": "row.jsonl"}, "Did you mean 'rows.jsonl'"),
        ({"datasets": [SourceConfig(path="d"), SourceConfig(path="e")]}, "data.datasets[1].path=e: does not exist"),
        ({"datasets": [SourceConfig()]}, "data.datasets[0]: say where the rows are, with data.datasets[0].path=FILE"),
        ({"datasets": [SourceConfig(path="d", limit=0)]}, "data.datasets[0].limit=0: must be greater than 0"),
        (
            {"datasets": [SourceConfig(path="d", format="alpac")]},
            "data.datasets[0].format=alpac: must be one of auto, ",
        ),
        (
            {"datasets": [SourceConfig(path="d", weight=1), SourceConfig(path="rows.jsonl")]},
            "data.datasets: data.datasets[1] has no weight, others do",
        ),
        ({"path": "d", "datasets": [SourceConfig(path="d")]}, "data.datasets: data.path=d is another source"),
        ({"hub_id": "o/n", "datasets": [SourceConfig(path="d")]}, "data.datasets: data.hub_id=o/n is another source"),
    ],
)
def test_what_is_wrong_is_named(settings, said):
    assert said in problem(**settings)


def test_every_problem_is_told():
    assert len(problems(path="nowhere", validation=3, test="nothing.csv", special_tokens="none.json")) == 4


def test_a_length_over_the_models_context_is_named():
    config = TrainConfig(
        model=ModelConfig(name="phi2", context_length=2048), data=DataConfig(path="rows.jsonl", max_length=4096)
    )

    assert data_problems(config) == ["data.max_length=4096: model=phi2 takes 2048 at most."]


def test_every_path_becomes_absolute_and_every_name_stays(folder):
    (folder / "tokens.json").touch()
    (folder / "run").mkdir()
    (folder / "test").mkdir()  # a split's name, where the data has splits
    data = DataConfig(
        path="d",
        datasets=[SourceConfig(path="rows.jsonl"), SourceConfig(path="d/*.jsonl"), SourceConfig(hub_id="org/rows")],
        special_tokens="tokens.json",
        validation={"path": "rows.jsonl", "limit": 3},
        test="test.jsonl",
    )
    config = TrainConfig(data=data, init_from="run")
    use_absolute_paths(config)

    assert data.path == str(folder / "d")
    assert [source.path for source in data.datasets] == [str(folder / "rows.jsonl"), str(folder / "d/*.jsonl"), None]
    assert data.special_tokens == str(folder / "tokens.json")
    assert data.validation == {"path": str(folder / "rows.jsonl"), "limit": 3}
    assert data.test == "test.jsonl", "what does not exist is left for the message"
    assert config.init_from == str(folder / "run")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"path": "d", "test": "test"}, "test"),
        ({"hub_id": "org/rows", "test": "test"}, "test"),
        ({"path": "rows.jsonl", "test": "test"}, "{folder}/test"),
        ({"path": "d", "test": "./test"}, "{folder}/test"),
        ({"path": "demo", "test": "demo"}, "demo"),
        ({"path": "d", "test": ""}, ""),
    ],
)
def test_the_name_of_a_split_is_no_path(folder, settings, expected):
    (folder / "test").mkdir()
    (folder / "demo").mkdir()
    config = TrainConfig(data=DataConfig(**settings, special_tokens=["rows.jsonl"]))
    use_absolute_paths(config)

    assert config.data.test == expected.format(folder=folder)
    assert config.data.special_tokens == ["rows.jsonl"], "a list is of tokens"
