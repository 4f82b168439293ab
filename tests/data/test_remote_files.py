"""Rows in a bucket are the same as on this machine: the same files are meant, the same rows come, in the same words."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Cut, FaultProxy, denied

from llmkit.config.schema import SourceConfig, StorageConfig
from llmkit.data.reading.sources import open_source
from llmkit.errors import ConfigError, DataError
from llmkit.remote import reach_with
from llmkit.storage import StorageError, open_place, upload_files

ROWS = {
    "train.jsonl": '{"n": 1}\n{"n": 2}\n',
    "test.jsonl": '{"n": 3}\n',
    "tokens.json": '{"tokens": ["<A>"]}',
    "manifest.json": "{}",
    "parts/a-00000-of-00002.jsonl": '{"n": 4}\n',
    "parts/a-00001-of-00002.jsonl": '{"n": 5}\n',
    "deep/er/rows.json": '[{"n": 6}]',
    "broken/rows.jsonl": '{"n": 7}\n{"n":\n',
}


@pytest.fixture
def bucket(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a directory with the files of ROWS; beside the working directory `here` with the same."""
    for name, text in ROWS.items():
        file = tmp_path / "here" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    upload_files(open_place(s3_url, StorageConfig()), tmp_path / "here", ROWS)
    reach_with(StorageConfig())
    yield s3_url
    reach_with(StorageConfig())


def source_of(path: str, **settings: Any) -> Any:
    return open_source(SourceConfig(path=path, **settings))


def numbers(source: Any) -> list[int]:
    return [row.values["n"] for block in source.blocks() for row in block.rows()]


@pytest.mark.parametrize(
    ("path", "settings", "expected"),
    [
        ("", {}, [1, 2]),
        ("/", {}, [1, 2]),
        ("", {"split": "test"}, [3]),
        ("", {"limit": 1}, [1]),
        ("/train.jsonl", {}, [1, 2]),
        ("/parts", {}, [4, 5]),
        ("/parts", {"split": "a"}, [4, 5]),
        ("/t*.jsonl", {}, [3, 1, 2]),
        ("/*/*-0000[01]-*.jsonl", {}, [4, 5]),
        ("/**/rows.json", {}, [6]),
    ],
)
def test_the_same_rows_come_as_from_this_machine(bucket, path, settings, expected):
    remote, here = source_of(bucket + path, **settings), source_of("here" + path, **settings)

    assert numbers(remote) == expected == numbers(here)
    assert remote.fingerprint() == here.fingerprint()
    assert remote.special_tokens == here.special_tokens
    assert remote.name == bucket + path


def test_a_source_names_its_files_by_their_addresses(bucket):
    assert source_of(f"{bucket}/parts").parts == [f"{bucket}/parts/a-0000{n}-of-00002.jsonl" for n in (0, 1)]

    with pytest.raises(DataError, match=rf"{bucket}/broken/rows.jsonl, line 2"):
        numbers(source_of(f"{bucket}/broken/rows.jsonl"))


def test_only_what_is_read_is_fetched_and_only_once(bucket, tmp_path):
    assert numbers(source_of(f"{bucket}/parts/a-00000-of-00002.jsonl")) == [4]
    sets = [path for path in (tmp_path / "cache/objects/sets").rglob("*") if path.is_file()]
    assert [path.name for path in sets] == ["a-00000-of-00002.jsonl"]


def test_rows_that_change_in_the_bucket_are_fetched_anew_by_the_next_run(bucket):
    before = source_of(f"{bucket}/train.jsonl").fingerprint()
    open_place(bucket, StorageConfig()).write("train.jsonl", b'{"n": 8}\n')
    assert numbers(source_of(f"{bucket}/train.jsonl")) == [1, 2], "a run reads what it has begun with"
    reach_with(StorageConfig())

    source = source_of(f"{bucket}/train.jsonl")
    assert numbers(source) == [8]
    assert source.fingerprint() != before


@pytest.mark.parametrize(
    ("path", "split", "words"),
    [
        ("/trian.jsonl", "train", ["there is no such file or directory", "Did you mean 'train.jsonl'?"]),
        ("/nothing", "train", ["there is no such file or directory"]),
        ("/x*.jsonl", "train", ["no file in the bucket matches"]),
        ("/train.jsonl", "test", ["only directories and data sets of the hub have splits"]),
        ("", "validation", ["no file of the split 'validation'", "it holds: broken, deep, manifest.json"]),
        ("/deep", "train", ["has no file that llmkit reads", "it holds: er"]),
    ],
)
def test_what_is_not_there_is_told_as_for_a_path_of_this_machine(bucket, path, split, words):
    with pytest.raises(ConfigError) as error:
        source_of(bucket + path, split=split)
    assert str(error.value).startswith(f"data.path={bucket}{path}: ")
    for word in words:
        assert word in str(error.value)


def test_a_store_that_does_not_answer_is_not_taken_for_one_that_holds_nothing(s3_url):
    with pytest.raises(StorageError, match="there is no such bucket"):
        source_of("s3://llmkit-not-there/rows.jsonl")
    reach_with(StorageConfig(endpoint_url="http://127.0.0.1:9", max_attempts=1))
    try:
        with pytest.raises(StorageError, match="s3://llmkit-tests"):
            source_of("s3://llmkit-tests/rows.jsonl")
    finally:
        reach_with(StorageConfig())


def test_a_store_that_denies_access_is_told_with_the_address(bucket, s3_server):
    with FaultProxy(s3_server.endpoint) as proxy:
        proxy.faults = [denied()]
        reach_with(StorageConfig(endpoint_url=proxy.endpoint))
        with pytest.raises(StorageError, match=f"{bucket}/train.jsonl .*access denied") as error:
            source_of(f"{bucket}/train.jsonl")
    assert error.value.exit_code == 1


def test_a_connection_that_breaks_is_taken_up(bucket, s3_server):
    with FaultProxy(s3_server.endpoint) as proxy:
        proxy.faults = [Cut(method="GET", path="train.jsonl", after_bytes=5)]
        reach_with(StorageConfig(endpoint_url=proxy.endpoint))
        assert numbers(source_of(f"{bucket}/train.jsonl")) == [1, 2]


def test_a_tokens_file_that_is_wrong_is_told(bucket):
    open_place(bucket, StorageConfig()).write("tokens.json", json.dumps(["<A>"]).encode())

    with pytest.raises(DataError, match="beside rows it lists their special tokens"):
        source_of(f"{bucket}/train.jsonl")
