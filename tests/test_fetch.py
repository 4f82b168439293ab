"""`llmkit fetch`: what a user's script yields becomes checked files, or one message and nothing else."""

import hashlib
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmkit import fetch
from llmkit.config.schema import SourceConfig
from llmkit.data.reading.sources import open_source

CHECKOUT = Path(__file__).parents[1]
EXAMPLES = CHECKOUT / "docs" / "examples"
GSM8K = CHECKOUT / "../shared/data/gsm8k"

TWO_SPLITS = """
SPLITS = ("train", "test")

def rows(split):
    for number in range({"train": 5, "test": 2}[split]):
        yield {"question": f"{split} {number}?", "answer": str(number)}
"""
SUMS = "def rows():\n    for n in range(9):\n        yield {'question': f'{n}+{n}?', 'answer': str(2 * n)}\n"

Script = Callable[..., Path]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """A function that writes a script and returns its path."""

    def write(text: str, name: str = "mine.py") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


@pytest.fixture
def to(tmp_path: Path) -> Path:
    """Where to fetch to: not there yet, nor is its parent."""
    return tmp_path / "data" / "mine"


def run(script: Path, to: Path, *more: str) -> int:
    return fetch.main([f"data.script={script}", f"to={to}", *more])


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def manifest(to: Path) -> dict[str, Any]:
    return json.loads((to / "manifest.json").read_text())


def everything(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """Check that it ended as a user's mistake does, in one message with these words, and return the message."""
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    for word in words:
        assert word in err
    return err


# What comes out


def test_each_split_becomes_a_file_of_its_rows_in_order(script, to):
    assert run(script(TWO_SPLITS), to) == 0

    assert read(to / "train.jsonl") == [{"question": f"train {n}?", "answer": str(n)} for n in range(5)]
    assert read(to / "test.jsonl") == [{"question": f"test {n}?", "answer": str(n)} for n in range(2)]
    assert everything(to) == {"train.jsonl", "test.jsonl", "manifest.json"}


@pytest.mark.parametrize(
    "text",
    [
        SUMS,
        "SPLITS = 'train'\n" + SUMS,
        SUMS.replace("rows()", "rows(count=9)"),
        "def rows(name):\n    assert name == 'train'\n    return [{'question': '1?', 'answer': '1'}]",
        "def rows(split='test'):\n    assert split == 'train'\n    return iter([{'text': 'a'}])",
    ],
    ids=["no argument", "one name", "argument with a default", "returns a list", "default split"],
)
def test_a_script_without_splits_makes_train(script, to, text):
    assert run(script(text), to) == 0
    assert everything(to) == {"train.jsonl", "manifest.json"}


def test_the_manifest_says_what_is_in_the_files_and_where_they_come_from(script, to):
    path = script("TOKENS = ['?']\n" + TWO_SPLITS)
    run(path, to)

    said = manifest(to)
    assert list(said["files"]) == ["train.jsonl", "test.jsonl", "tokens.json"]
    for name, facts in said["files"].items():
        content = (to / name).read_bytes()
        assert (facts["bytes"], facts["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert [facts.get("rows") for facts in said["files"].values()] == [5, 2, None]
    assert said["files"]["train.jsonl"]["format"] == "question_answer"
    assert said["script"] == {"path": "../../mine.py", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert said["limit"] is None


@pytest.mark.parametrize(
    "tokens", ["TOKENS = ('<A>', '</A>')", "def tokens():\n    yield '<A>'\n    yield '</A>'"], ids=["list", "function"]
)
def test_special_tokens_are_written_beside_the_rows(script, to, capsys, tokens):
    run(script(f"{tokens}\ndef rows():\n    yield {{'text': '<A>hello</A>'}}"), to)

    assert json.loads((to / "tokens.json").read_text()) == {"tokens": ["<A>", "</A>"]}
    shown = capsys.readouterr()
    assert "2 special tokens" in shown.out
    assert "warning" not in shown.err


def test_rows_are_written_as_they_are_whatever_their_text(script, to):
    row = {"question": 'Zoë 🦉\n"line\u2028two"\t\\', "answer": "é\u0000", "id": 7, "meta": {"a": [1, 2.5, None, True]}}
    run(script(f"def rows():\n    yield {row!r}"), to)

    assert len((to / "train.jsonl").read_bytes().split(b"\n")) == 2
    assert json.loads((to / "train.jsonl").read_text(encoding="utf-8")) == row


def test_a_row_that_the_script_changes_after_yielding_it_is_written_as_it_was_yielded(script, to):
    run(script("def rows():\n  row = {}\n  for n in range(30):\n    row['text'] = str(n)\n    yield row"), to)

    assert [row["text"] for row in read(to / "train.jsonl")] == [str(n) for n in range(30)]


def test_what_is_fetched_is_what_training_reads(script, to):
    run(script("TOKENS = ['?']\n" + TWO_SPLITS), to)

    for split in ("train", "test"):
        source = open_source(SourceConfig(path=str(to), split=split))
        read_again = [row.values for block in source.blocks() for row in block.rows()]
        assert read_again == read(to / f"{split}.jsonl")


def next_command(out: str) -> list[str]:
    words = shlex.split(out.splitlines()[-1].removeprefix("next: "))
    assert words[:2] == ["llmkit", "train"]
    return words[2:]


def test_the_command_named_at_the_end_trains_on_what_was_fetched(script, tmp_path, capsys, compose):
    to = tmp_path / "my data"
    run(script(TWO_SPLITS), to)

    words = next_command(capsys.readouterr().out)
    assert words == [f"data.path={to}", "data.test=test"]
    assert compose(*words).data.path == str(to)


def test_for_preference_data_the_command_named_is_dpo(script, to, capsys):
    run(script("def rows():\n    yield {'prompt': 'Hi', 'chosen': 'Hello!', 'rejected': 'What?'}"), to)

    assert next_command(capsys.readouterr().out) == ["recipe=dpo", f"data.path={to}"]
    assert manifest(to)["files"]["train.jsonl"]["format"] == "preference"


def test_without_a_train_split_the_command_names_the_first(script, to, capsys):
    run(script("SPLITS = ['main', 'validation']\ndef rows(split):\n    yield {'text': split}"), to)

    assert next_command(capsys.readouterr().out) == [
        f"data.path={to}",
        "data.split=main",
        "data.validation=validation",
    ]


# How the script runs


def test_a_script_imports_what_lies_beside_it_and_nothing_is_left_there(script, tmp_path, to):
    script("def sums():\n    return [{'question': '1+1?', 'answer': '2'}]", name="sums_of_mine.py")
    before = list(sys.path)

    assert run(script("from sums_of_mine import sums\ndef rows():\n    yield from sums()"), to) == 0
    assert not (tmp_path / "__pycache__").exists()
    assert sys.path == before


def test_a_script_may_define_dataclasses_and_change_the_directory(script, to, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (
        "import dataclasses, os\n@dataclasses.dataclass\nclass Problem:\n    text: 'str'\n"
        "def rows():\n    os.chdir('/')\n    yield dataclasses.asdict(Problem('one'))"
    )
    script(text)

    assert fetch.main(["data.script=mine.py", "to=data/mine"]) == 0
    assert read(to / "train.jsonl") == [{"text": "one"}]


def test_a_limit_takes_the_first_rows_of_each_split_and_closes_the_script(script, to, tmp_path):
    text = (
        "import itertools, pathlib\nSPLITS = ('train', 'test')\ndef rows(split):\n    try:\n"
        "        for n in itertools.count():\n            yield {'text': f'{split} {n}'}\n"
        "    finally:\n        (pathlib.Path(__file__).parent / f'{split}.closed').touch()"
    )

    assert run(script(text), to, "limit=12") == 0
    assert [row["text"] for row in read(to / "test.jsonl")] == [f"test {n}" for n in range(12)]
    assert manifest(to)["limit"] == 12
    assert {path.name for path in tmp_path.glob("*.closed")} == {"train.closed", "test.closed"}


def test_a_mistake_in_closing_the_script_is_told_too(script, to, capsys):
    text = "def rows():\n    try:\n        while True:\n            yield {'text': 'a'}\n    finally:\n        1 / 0"

    refused(capsys, run(script(text), to, "limit=2"), "mine.py:6, in rows: 1 / 0", "ZeroDivisionError")


def test_rows_pass_through_in_constant_memory(script, to):
    text = "def rows():\n    for n in range(12_000):\n        yield {'question': str(n), 'answer': 'a' * 5000}"
    path = script(text)
    tracemalloc.start()
    try:
        run(path, to)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert (to / "train.jsonl").stat().st_size > 60e6
    assert peak < 25e6


def test_a_long_fetch_says_how_far_it_is(script, to, capsys, monkeypatch):
    monkeypatch.setattr(fetch, "SECONDS_PER_LINE", 0.0)
    run(script(SUMS), to)

    assert capsys.readouterr().err.splitlines()[-1] == "train: 9 rows so far"


def test_a_short_fetch_says_nothing_on_the_way(script, to, capsys):
    run(script(SUMS), to)

    assert capsys.readouterr().err == ""


# Rows that occur twice


def test_rows_that_say_the_same_are_counted_whatever_their_id(script, to, capsys):
    text = "def rows():\n    for n in range(10):\n        yield {'id': n, 'question': f'{n % 7}?', 'answer': 'yes'}"

    assert run(script(text), to) == 0
    err = capsys.readouterr().err
    assert err == "warning: train: 3 of 10 rows repeat an earlier one (the first: row 8)\n"


def test_rows_of_a_later_split_that_occur_in_an_earlier_one_are_counted(script, to, capsys):
    text = (
        "SPLITS = ('train', 'test')\ndef rows(split):\n"
        "    for n in range(10) if split == 'train' else (30, 31, 4, 9):\n        yield {'text': f'number {n}'}"
    )

    assert run(script(text), to) == 0
    err = capsys.readouterr().err
    assert "test: 2 of 4 rows occur in train too (the first: row 3)" in err
    assert err.count("warning") == 1


def test_a_token_that_no_row_has_is_named(script, to, capsys):
    text = "TOKENS = ['<A>', '\"<B>\"', '<C>']\ndef rows():\n    yield {'text': 'x <A> \"<B>\" y'}"

    assert run(script(text), to) == 0
    assert capsys.readouterr().err == "warning: the token '<C>' occurs in no row\n"


# Scripts that are wrong


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def row():\n    yield {}", ["defines no rows", "Did you mean 'row'?", "def rows(split)"]),
        ("", ["defines no rows"]),
        ("rows = [{'text': 'a'}]", ["rows is a list", "not a function"]),
        ("def rows(split, config):\n    yield {}", ["split, config", "given a split at most"]),
        ("def rows(*, name):\n    yield {}", ["arguments name"]),
        ("SPLITS = ('train', 'test')\n" + SUMS, ["names 2 splits", "rows takes no argument"]),
        ("SPLITS = ()\n" + SUMS, ["SPLITS is ()"]),
        ("SPLITS = ['../train']\n" + SUMS, ["'../train'"]),
        ("SPLITS = ['train-1']\n" + SUMS, ["'train-1'", "no number after a -"]),
        ("SPLITS = [1]\n" + SUMS, ["SPLITS names 1"]),
        ("SPLITS = ['train', 'Train']\ndef rows(split):\n    yield {}", ["twice: train, Train"]),
        ("TOKENS = '<A>'\n" + SUMS, ["a list of texts", "found '<A>'"]),
        ("TOKENS = ['<A>', '<A>']\n" + SUMS, ["'<A>' twice"]),
        ("TOKENS = ['<A> ']\n" + SUMS, ["'<A> '", "without spaces"]),
        ("TOKENS = [7]\n" + SUMS, ["hold 7"]),
        ("TOKENS = ['<A>']\ndef tokens(): return TOKENS\n" + SUMS, ["both TOKENS and tokens()"]),
        ("def tokens(): return [][0]\n" + SUMS, ["tokens(): IndexError", "mine.py:1, in tokens"]),
        ("def rows(:\n    yield {}", ["does not run", "SyntaxError", "line 1"]),
        ("import nowhere_at_all\n" + SUMS, ["mine.py:1", "No module named 'nowhere_at_all'"]),
        ("import sys\nsys.exit('no data here')\n" + SUMS, ["SystemExit: no data here", "mine.py:2"]),
    ],
)
def test_a_script_that_cannot_be_used_is_told_in_one_message(script, to, tmp_path, capsys, text, words):
    refused(capsys, run(script(text), to), str(to.parents[1]), *words)
    assert everything(tmp_path) == {"mine.py"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return None", ["rows() returned nothing (None)", "it must yield rows"]),
        ("return {'text': 'a'}", ["rows() returned a dict"]),
        ("return 'abc'", ["rows() returned a str"]),
        ("yield ['a']", ["row 1", "must be a dict, found list", "['a']"]),
        ("yield from ()", ["yielded no rows"]),
        ("import numpy\n    yield {'text': 'a', 'n': numpy.int64(3)}", ["'n' is of the type numpy.int64", ".tolist()"]),
        (
            "import numpy\n    yield {'text': 'a', 'n': [{'m': numpy.ones(2)}]}",
            ["'n[0].m' is of the type numpy.ndarray"],
        ),
        (
            "import datetime\n    yield {'text': datetime.date(2026, 1, 1)}",
            ["'text' is of the type datetime.date", ".isoformat()"],
        ),
        ("yield {'text': b'a'}", ["'text' is of the type builtins.bytes", ".decode()"]),
        ("yield {'text': {'a'}}", ["'text' is of the type builtins.set, which is not JSON. The"]),
        ("yield {'text': 'a', 'score': float('nan')}", ["'score' is nan", "yield None"]),
        ("yield {'text': 'a', 'meta': {1: 'b'}}", ["the key 1 of 'meta'", "only texts as keys"]),
        ("yield {'text': 'a\\ud800'}", ["'text' holds half a surrogate pair"]),
        ("row = {'text': 'a'}\n    row['self'] = row\n    yield row", ["the row contains itself"]),
        ("yield {'Problem': 'a', 'Solution': 'b'}", ["row 1", "Problem, Solution", "The row begins: {"]),
        ("yield {'chosen': 'a'}", ["row 1", "preference", "The row begins: {"]),
        ("yield {'question': 'a', 'answer': 5, 'id': 'q7'}", ["row 1 (id q7)", "'answer' must be text", '{"question"']),
    ],
)
def test_a_row_that_cannot_be_used_is_told_with_its_place(script, to, tmp_path, capsys, body, words):
    text = f"def rows(split):\n    {body}"

    refused(capsys, run(script(text), to), "mine.py, split 'train'", *words)
    assert everything(tmp_path) == {"mine.py"}


def test_a_row_unlike_the_first_is_found_wherever_it_stands(script, to, capsys):
    text = (
        "def rows():\n    for n in range(9000):\n        yield {'question': 'a', 'answer': 'b' if n != 4321 else None}"
    )

    err = refused(
        capsys, run(script(text), to), "row 4322", "'answer' must be text", '{"question": "a", "answer": null}'
    )
    assert len(err) < 600


def test_a_long_row_is_shown_by_its_beginning(script, to, capsys):
    text = "def rows():\n    yield {'text': 'word ' * 10_000, 'n': object()}"

    assert len(refused(capsys, run(script(text), to), "word word")) < 500


def test_what_is_wrong_with_the_first_row_is_told_before_the_second_is_asked_for(script, to, capsys):
    text = "def rows():\n    yield {'nothing': 'known'}\n    raise AssertionError('asked for more')"

    assert "asked for more" not in refused(capsys, run(script(text), to), "nothing")


def test_preference_data_in_one_split_and_none_in_the_other_is_refused(script, to, capsys):
    text = (
        "SPLITS = ('train', 'test')\ndef rows(split):\n    pair = {'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}\n"
        "    yield pair if split == 'train' else {'text': 'a'}"
    )

    refused(capsys, run(script(text), to), "'train' holds preference data", "'test' does not")


def test_an_exception_is_shown_with_the_lines_of_the_script_alone(script, to, tmp_path, capsys):
    text = (
        "import json\n"
        "def rows(split):\n"
        "    for n in range(3):\n"
        "        yield {'question': 'a', 'answer': str(n)}\n"
        "    read('{')\n"
        "def read(text):\n"
        "    return json.loads(text)\n"
    )
    path = script(text)

    err = refused(
        capsys, run(path, to), "mine.py, split 'train', after 3 rows: json.decoder.JSONDecodeError: Expecting"
    )
    assert err.splitlines()[1:] == [f"  {path}:5, in rows: read('{{')", f"  {path}:7, in read: return json.loads(text)"]
    assert everything(tmp_path) == {"mine.py"}


def test_what_an_exception_was_raised_from_is_shown_too(script, to, capsys):
    text = (
        "def rows():\n    yield {'text': 'a'}\n    try:\n        {}['key']\n    except KeyError as error:\n"
        "        raise RuntimeError('generation failed') from error"
    )

    err = refused(capsys, run(script(text), to), "after 1 rows: RuntimeError: generation failed")
    assert "caused by KeyError: 'key'" in err
    assert "mine.py:4, in rows: {}['key']" in err


def test_an_environment_variable_that_is_not_set_is_named_as_one(to, script, monkeypatch, capsys):
    monkeypatch.delenv("MY_FILE", raising=False)
    path = script("import os\ndef rows():\n    yield {'text': os.environ['MY_FILE']}\n")

    err = refused(capsys, run(path, to), "the environment variable MY_FILE is not set")
    assert "KeyError" not in err


def test_a_script_that_is_not_there_is_named(tmp_path, to, capsys):
    refused(capsys, run(tmp_path / "nowhere.py", to), "nowhere.py", "No such file")


# The directory


def test_a_failure_leaves_what_was_fetched_before(script, to, tmp_path):
    run(script(TWO_SPLITS), to)
    before = {path: path.read_bytes() for path in to.iterdir()}
    script(TWO_SPLITS + "    if split == 'test': raise ValueError")

    assert run(tmp_path / "mine.py", to) == 2
    assert {path: path.read_bytes() for path in to.iterdir()} == before
    assert everything(tmp_path / "data") == {"mine", *(f"mine/{path.name}" for path in before)}


def test_a_failure_leaves_directories_that_were_there(script, to):
    to.parent.mkdir()

    assert run(script("def rows():\n    1 / 0"), to) == 2
    assert list(to.parent.iterdir()) == []


def test_the_same_script_again_replaces_what_it_fetched_though_it_was_edited(script, to):
    run(script("TOKENS = ['?']\n" + TWO_SPLITS), to)
    to.chmod(0o750)

    assert run(script(SUMS), to) == 0
    assert everything(to) == {"train.jsonl", "manifest.json"}
    assert len(read(to / "train.jsonl")) == 9
    assert [path.name for path in to.parent.iterdir()] == ["mine"]
    assert to.stat().st_mode & 0o777 == 0o750


def test_a_script_that_was_moved_replaces_what_it_fetched(script, to):
    run(script(SUMS), to)

    assert run(script(SUMS, name="moved.py"), to) == 0
    assert manifest(to)["script"]["path"] == "../../moved.py"


def test_a_trial_gives_way_to_the_whole_and_not_the_other_way_round(script, to, capsys):
    path = script(SUMS)
    assert run(path, to, "limit=2") == 0
    assert run(path, to, "limit=3") == 0
    assert run(path, to) == 0
    capsys.readouterr()

    refused(capsys, run(path, to, "limit=2"), "all rows", "limit=2", "choose another to=")
    assert len(read(to / "train.jsonl")) == 9


def test_an_empty_directory_is_filled(script, to):
    to.mkdir(parents=True)

    assert run(script(SUMS), to) == 0
    assert len(read(to / "train.jsonl")) == 9


def test_a_link_to_a_directory_stays_a_link(script, to, tmp_path):
    to.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(to)

    assert run(script(SUMS), link) == 0
    assert run(script(SUMS), link) == 0
    assert link.is_symlink()
    assert everything(to) == {"train.jsonl", "manifest.json"}


def foreign_file(to: Path) -> None:
    to.mkdir(parents=True)
    (to / "train.jsonl").write_text("mine\n")


def foreign_manifest(to: Path) -> None:
    to.mkdir(parents=True)
    (to / "manifest.json").write_text('{"files": ["a"]}')


def a_file(to: Path) -> None:
    to.parent.mkdir()
    to.write_text("mine\n")


def fetched_and(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def arrange(to: Path) -> None:
        (to.parents[1] / "mine.py").write_text(SUMS)
        assert run(to.parents[1] / "mine.py", to) == 0
        change(to)

    return arrange


@pytest.mark.parametrize(
    ("arrange", "words"),
    [
        (foreign_file, ["holds other things already (train.jsonl)"]),
        (foreign_manifest, ["holds other things already (manifest.json)"]),
        (a_file, ["is not a directory"]),
        (fetched_and(lambda to: (to / "notes.txt").write_text("mine")), ["holds notes.txt"]),
        (fetched_and(lambda to: (to / "more").mkdir()), ["holds more"]),
        (fetched_and(lambda to: (to / "train.jsonl").write_text("{}\n")), ["train.jsonl was changed"]),
        (
            fetched_and(lambda to: (to.parents[1] / "mine.py").rename(to.parents[1] / "theirs.py")),
            ["another script", "../../mine.py"],
        ),
    ],
    ids=["foreign file", "foreign manifest", "a file", "notes", "a directory", "edited", "other script"],
)
def test_what_the_user_has_there_is_refused_and_stays(script, to, tmp_path, capsys, arrange, words):
    arrange(to)
    name = "other.py" if (tmp_path / "theirs.py").exists() else "mine.py"
    path = script("# edited\n" + SUMS, name=name)
    before = everything(tmp_path)
    content = (to / "train.jsonl").read_bytes() if (to / "train.jsonl").exists() else b""
    capsys.readouterr()

    refused(capsys, run(path, to), f"to={to}", *words)
    assert everything(tmp_path) == before
    assert not content or (to / "train.jsonl").read_bytes() == content


def test_the_directory_one_works_in_is_not_replaced(script, tmp_path, monkeypatch, capsys):
    path = script(SUMS)
    (tmp_path / "work" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "inner")

    for to in (".", ".."):
        refused(capsys, fetch.main([f"data.script={path}", f"to={to}"]), "the directory you work in")


def test_a_directory_that_is_taken_is_told_before_the_script_runs(script, to, capsys):
    foreign_file(to)

    assert "ran" not in refused(capsys, run(script("raise AssertionError('ran')"), to), "holds other things")


def test_files_that_appear_during_the_fetch_stay(script, to, capsys):
    text = (
        f"import pathlib\ndef rows():\n    yield {{'text': 'a'}}\n    to = pathlib.Path({str(to)!r})\n"
        "    to.mkdir()\n    (to / 'notes.txt').write_text('mine')"
    )

    refused(capsys, run(script(text), to), "notes.txt")
    assert everything(to.parent) == {"mine", "mine/notes.txt"}


def test_a_place_that_cannot_be_written_is_named(script, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")

    refused(
        capsys, run(script(SUMS), tmp_path / "file" / "inner"), "file/inner", "cannot be made", "choose another to="
    )


def start(tmp_path: Path, path: Path, to: Path, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "llmkit", "fetch", f"data.script={path}", f"to={to}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_ctrl_c_leaves_nothing_behind(script, to, tmp_path):
    text = (
        "import pathlib, time\ndef rows():\n    for n in range(2000):\n        yield {'text': str(n)}\n"
        "    (pathlib.Path(__file__).parent / 'ready').touch()\n    time.sleep(60)\n    yield {'text': 'late'}"
    )
    # A shell starts what runs in its background with SIGINT ignored, and children inherit that.
    listens = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = start(tmp_path, script(text), to, preexec_fn=listens)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert any(file.stat().st_size for file in to.parent.rglob("train.jsonl"))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert err == ""
    assert everything(tmp_path) == {"mine.py", "ready"}


def test_a_disk_that_fails_is_told_and_leaves_nothing_behind(script, to, tmp_path):
    text = "def rows():\n    for n in range(5000):\n        yield {'text': f'row number {n}'}"
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    process = start(tmp_path, script(text), to, preexec_fn=small)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 1
    assert err == f"error: to={to}: cannot be written (File too large).\n"
    assert everything(tmp_path) == {"mine.py"}


# The command line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["what to fetch is missing", "data.script=FILE.py", "to=PLACE is missing", "--help"]),
        (["data.script=a.py"], ["to=PLACE is missing"]),
        (["script=a.py", "to=b"], ["Did you mean 'data.script'?"]),
        (["a.py", "to=b"], ["Did you mean data.script=a.py?"]),
        (["data.scripts=a.py", "too=b"], ["'data.script'?", "'to'?"]),
        (["--limit", "data.script=a.py", "to=b"], ["--limit", "data.script=, to=, limit="]),
        (["data.script=a.py", "to="], ["to: needs a value"]),
        (["data.script=a.py", "to=b", "to=c"], ["to is given twice: b and c"]),
        (["data.script=a.py", "to=b", "limit=0"], ["limit=0", "above 0"]),
        (["data.script=a.py", "to=b", "limit=many"], ["limit=many"]),
        (["data.script=a.py", "model=tiny", "to=b"], ["data.script and model", "one of them"]),
        (["model=phi2,tinyllama", "to=b"], ["add -m"]),
        (["-m", "model.hub_id=org/name", "to=b"], ["-m", "model=NAME,NAME"]),
        (["-m", "data=gsm8k", "to=b"], ["-m", "one by one"]),
        (["model=phi2", "to=b", "limit=3"], ["limit", "no rows"]),
        (["data=gsm8k", "to=b", "allow=[*.json]"], ["allow", "only models"]),
        (["data=gsm8k", "data.max_length=3", "to=b"], ["data.max_length=3: fetch takes"]),
        (["model=phi3", "to=b"], ["model=phi3", "Did you mean 'phi2'?"]),
        (["model=tiny", "to=b"], ["model=tiny", "not from the hub"]),
        (["model=phi2", "to=gs://bucket/models"], ["gs://", "s3://BUCKET/PATH"]),
    ],
)
def test_a_wrong_command_names_all_its_mistakes(capsys, argv, words):
    assert fetch.main(argv) == 2
    err = capsys.readouterr().err
    for word in words:
        assert word in err


def test_the_help_says_that_the_code_runs_here(capsys):
    assert fetch.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "its code runs here, with your rights" in out
    assert all(key in out for key in fetch.KEYS)


def test_a_fetch_imports_nothing_heavy(script, to, tmp_path):
    program = (
        "import sys\nfrom llmkit.fetch import main\n"
        f"assert main(['data.script={script(SUMS)}', 'to={to}']) == 0\n"
        "print(*{'torch', 'transformers', 'datasets', 'trl', 'pyarrow'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.splitlines()[-1] == ""


# The examples of the documentation


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the files of GSM8K are not beside the checkout (../shared/data/gsm8k)")
def test_the_gsm8k_example_fetches_all_problems_without_their_annotations(to, monkeypatch):
    monkeypatch.setenv("GSM8K_DIR", str(GSM8K))

    assert run(EXAMPLES / "gsm8k.py", to) == 0
    files = manifest(to)["files"]
    assert [(name, facts["rows"], facts["format"]) for name, facts in files.items()] == [
        ("train.jsonl", 7473, "question_answer"),
        ("test.jsonl", 1319, "question_answer"),
    ]
    original = read(GSM8K / "train.jsonl")[0]
    fetched = read(to / "train.jsonl")[0]
    assert fetched["question"] == original["question"]
    assert "48/2 = 24 clips" in fetched["answer"]
    assert not any("<<" in row["answer"] for row in read(to / "train.jsonl"))


def test_the_dialogue_example_makes_turns_between_special_tokens(to, tmp_path, monkeypatch, capsys):
    dialogues = tmp_path / "dialogues.zip"
    with zipfile.ZipFile(dialogues, "w") as archive:
        archive.writestr("talks/00.txt", "A: Is the shop open\non Sundays?\nB: From ten to four.\nA: Thanks.\n")
        archive.writestr("talks/01.txt", "\ufeffB: Hello!\nA: Zoë?\r\nB: Yes?\r\nB: Speaking.\n")
        archive.writestr("talks/02.txt", "A: Nobody answers.\n")
        archive.writestr("readme.md", "A: not a dialogue\nB: at all\n")
    monkeypatch.setenv("DIALOGUES", str(dialogues))

    assert run(EXAMPLES / "dialogue_zip.py", to) == 0
    assert read(to / "test.jsonl") == [
        {
            "id": "talks/00.txt",
            "input": "<USER>Is the shop open on Sundays?</USER><ASSISTANT>From ten to four.</ASSISTANT>",
        }
    ]
    assert read(to / "train.jsonl") == [
        {"id": "talks/01.txt", "input": "<USER>Zoë?</USER><ASSISTANT>Yes? Speaking.</ASSISTANT>"}
    ]
    tokens = ["<USER>", "</USER>", "<ASSISTANT>", "</ASSISTANT>"]
    assert json.loads((to / "tokens.json").read_text()) == {"tokens": tokens}
    assert {facts.get("format") for facts in manifest(to)["files"].values()} == {"role_markers", None}
    shown = capsys.readouterr()
    assert shown.err == ""
    assert next_command(shown.out) == [f"data.path={to}", "data.chat_template=role-markers", "data.test=test"]


def test_the_dialogue_example_names_what_it_misses(to, monkeypatch, capsys):
    monkeypatch.delenv("DIALOGUES", raising=False)

    refused(capsys, run(EXAMPLES / "dialogue_zip.py", to), "the environment variable DIALOGUES has to name the zip")
