"""`llmkit fetch data=...`: rows of the hub, of files and of scripts become checked JSON Lines, here or in a bucket."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import COMMIT, FakeHub

from llmkit import fetch
from llmkit.config.schema import SourceConfig, StorageConfig
from llmkit.data.fetching import directory
from llmkit.data.reading.sources import open_source
from llmkit.remote import reach_with
from llmkit.storage import StorageError, open_place

SPLITS = {"train": 30, "test": 4}
SCRIPT = "def rows():\n    for n in range(9):\n        yield {'question': f'{n}+{n}?', 'answer': str(2 * n)}\n"


def rows(split: str) -> list[dict[str, Any]]:
    return [{"Problem": f"{split} {n}?", "answer": str(n)} for n in range(SPLITS[split])]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """It has the data set org/sums, of two splits, whose questions stand in a column named Problem."""
    root = tmp_path_factory.mktemp("sums")
    for split in SPLITS:
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(split)))
    with FakeHub({"datasets/org/sums": root}) as hub:
        yield hub


@pytest.fixture
def hub_fetch(hub: FakeHub, tmp_path: Path, run_llmkit: Callable[..., Any]) -> Callable[..., Any]:
    """A function: runs `llmkit fetch` with this hub."""
    return lambda *words: run_llmkit("fetch", *words, env=hub.environment(tmp_path / "hf"))


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine.py").write_text(SCRIPT)
    reach_with(StorageConfig())


def read(path: str, split: str = "train") -> list[dict[str, Any]]:
    """The rows as training reads them."""
    reach_with(StorageConfig())
    source = open_source(SourceConfig(path=path, split=split))
    return [row.values for block in source.blocks() for row in block.rows()]


def manifest(to: str) -> dict[str, Any]:
    return json.loads(open_place(to, StorageConfig()).read("manifest.json") or b"null")


def names(to: str) -> set[str]:
    return set(open_place(to, StorageConfig()).files())


@pytest.mark.parametrize("where", ["here", "bucket"])
def test_a_data_set_of_the_hub_comes_with_all_its_splits_and_its_commit(hub_fetch, s3_url, where):
    to = "sums" if where == "here" else s3_url
    done = hub_fetch("data.hub_id=org/sums", "data.columns={question: Problem}", f"to={to}")

    assert done.returncode == 0, done.stderr
    for split in SPLITS:
        expected = [{"question": row["Problem"], "answer": row["answer"]} for row in rows(split)]
        assert read(to, split) == expected
    said = manifest(to)
    assert said["source"] == {"hub_id": "org/sums", "hub_config": None, "split": None}
    assert (said["revision"], said["commit"]) == ("main", COMMIT)
    assert [facts["rows"] for facts in said["files"].values()] == [30, 4]
    assert done.stdout.splitlines()[-1] == f"next: llmkit train data.path={to} data.test=test"
    assert names(to) == {"train.jsonl", "test.jsonl", "manifest.json"}


def test_one_split_of_the_hub_is_fetched_alone(hub_fetch):
    done = hub_fetch("data.hub_id=org/sums", "data.split=test", "data.columns={question: Problem}", "to=sums")

    assert done.returncode == 0, done.stderr
    assert names("sums") == {"test.jsonl", "manifest.json"}

    again = hub_fetch("data.hub_id=org/sums", "data.columns={question: Problem}", "to=sums")
    assert again.returncode == 2
    assert "to=sums: holds what comes from elsewhere, org/sums test" in again.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.hub_id=org/none"], "data.hub_id=org/none: no such data set on the hub"),
        (["data.hub_id=org/sums"], "org/sums, split 'train', row 1: no known format"),
        (["data.hub_id=org/sums", "data.split=dev"], "has no split 'dev'"),
    ],
)
def test_what_cannot_be_fetched_is_told_and_leaves_nothing(hub_fetch, words, said, tmp_path):
    done = hub_fetch(*words, "to=sums")

    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "sums").exists()


def test_the_command_at_the_end_does_not_test_on_what_it_trains_on(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("SPLITS = ['test']\n" + SCRIPT.replace("rows()", "rows(split)"))

    assert fetch.main(["data.script=mine.py", "to=mine"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "next: llmkit train data.path=mine data.split=test"


def test_files_are_checked_and_come_to_a_bucket_with_their_splits(s3_url, tmp_path, capsys):
    assert fetch.main(["data.script=mine.py", "to=mine"]) == 0
    (tmp_path / "mine/test.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "mine/tokens.json").write_text('{"tokens": ["+"]}')

    assert fetch.main(["data.path=mine", f"to={s3_url}"]) == 0
    assert "1 special tokens" in capsys.readouterr().out
    assert names(s3_url) == {"train.jsonl", "test.jsonl", "tokens.json", "manifest.json"}
    assert read(s3_url) == read("mine")
    assert open_source(SourceConfig(path=s3_url)).special_tokens == ["+"]
    assert manifest(s3_url)["source"] == {"path": "mine", "split": None}


def test_the_rows_have_the_same_fingerprint_here_and_in_a_bucket(s3_url):
    for to in ("mine", s3_url):
        assert fetch.main(["data.script=mine.py", f"to={to}"]) == 0

    here, there = (open_source(SourceConfig(path=to)) for to in ("mine", s3_url))
    assert here.fingerprint() == there.fingerprint()


def test_the_demo_comes_to_a_directory(tmp_path):
    assert fetch.main(["data=demo", "to=demo-rows"]) == 0
    assert names("demo-rows") == {"train.jsonl", "validation.jsonl", "manifest.json"}


def test_a_script_replaces_in_a_bucket_what_it_has_fetched_there(s3_url, tmp_path):
    assert fetch.main(["data.script=mine.py", f"to={s3_url}/mine"]) == 0
    assert manifest(f"{s3_url}/mine")["script"]["path"] == "mine.py"
    (tmp_path / "mine.py").write_text("SPLITS = ['test']\n" + SCRIPT.replace("rows()", "rows(split)"))

    assert fetch.main(["data.script=mine.py", f"to={s3_url}/mine"]) == 0
    assert names(f"{s3_url}/mine") == {"test.jsonl", "manifest.json"}
    assert not (tmp_path / "cache/fetching").exists()


def test_a_fetch_to_a_bucket_that_failed_half_way_is_taken_up_by_the_same_command(s3_url, tmp_path, monkeypatch):
    assert fetch.main(["data.script=mine.py", f"to={s3_url}", "limit=3"]) == 0

    def fail(place: Any, scratch: Path, *_: Any, **__: Any) -> None:
        place.upload(scratch / "test.jsonl", "test.jsonl")
        raise StorageError("the store is gone")

    (tmp_path / "mine.py").write_text("SPLITS = ['train', 'test']\n" + SCRIPT.replace("rows()", "rows(split)"))
    with monkeypatch.context() as patch:
        patch.setattr(directory, "upload_files", fail)
        assert fetch.main(["data.script=mine.py", f"to={s3_url}"]) == 1
    assert names(s3_url) == {"train.jsonl", "test.jsonl", ".manifest.partial.json"}

    assert fetch.main(["data.script=mine.py", f"to={s3_url}"]) == 0
    assert names(s3_url) == {"train.jsonl", "test.jsonl", "manifest.json"}
    assert len(read(s3_url)) == 9


def foreign(url: str) -> None:
    open_place(url, StorageConfig()).write("notes.txt", b"mine")


def fetched_and_more(url: str) -> None:
    assert fetch.main(["data.script=mine.py", f"to={url}"]) == 0
    foreign(url)


def fetched_and_edited(url: str) -> None:
    assert fetch.main(["data.script=mine.py", f"to={url}"]) == 0
    place = open_place(url, StorageConfig())
    place.write("train.jsonl", (place.read("train.jsonl") or b"").replace(b"1", b"2"))


@pytest.mark.parametrize(
    ("arrange", "said"),
    [
        (foreign, "holds other things already (notes.txt)"),
        (fetched_and_more, "holds notes.txt, which the earlier fetch did not write"),
        (fetched_and_edited, "train.jsonl was changed after it was fetched"),
    ],
    ids=["foreign", "more", "edited"],
)
def test_what_the_user_has_in_a_bucket_stays(s3_url, capsys, arrange, said):
    arrange(s3_url)
    place = open_place(s3_url, StorageConfig())
    before = place.files()
    capsys.readouterr()

    assert fetch.main(["data.script=mine.py", f"to={s3_url}"]) == 2
    assert f"to={s3_url}: {said}" in capsys.readouterr().err
    assert place.files() == before


def test_a_bucket_that_refuses_is_told_before_the_script_runs(s3_url, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("raise AssertionError('ran')")

    assert fetch.main(["data.script=mine.py", "to=s3://llmkit-not-there/mine"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: s3://llmkit-not-there/mine")
    assert "ran" not in err
