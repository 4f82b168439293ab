"""A file's hash is that of its content, always; an unchanged file is not read again to know it."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmkit.data.reading import content
from llmkit.data.reading.content import content_hash


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def settled(monkeypatch):
    """Files count as settled at once: tests do not wait for the clock."""
    monkeypatch.setattr(content, "SETTLED", -1.0)


def memos(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").rglob("*.json"))


def right(file: Path) -> str:
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()


@pytest.fixture
def reads(monkeypatch):
    """The number of files that were read."""
    counted = []
    digest = hashlib.file_digest
    monkeypatch.setattr(content.hashlib, "file_digest", lambda *a: (counted.append(1), digest(*a))[1])
    return counted


def test_the_hash_is_that_of_the_content(tmp_path):
    file = tmp_path / "rows"
    file.write_bytes(b"x" * 3_000_000)

    assert content_hash(file) == right(file)


@pytest.mark.usefixtures("settled")
def test_an_unchanged_file_is_read_once(tmp_path, reads):
    file = tmp_path / "rows"
    file.write_text("x")

    assert content_hash(file) == content_hash(file) == right(file)
    assert len(reads) == 1


def test_a_file_that_has_just_been_written_is_read_again(tmp_path, reads):
    file = tmp_path / "rows"
    file.write_text("x")

    assert content_hash(file) == content_hash(file)
    assert len(reads) == 2
    assert memos(tmp_path) == [], "it may be written to again without its times changing"


def test_a_file_that_has_lain_for_a_while_is_remembered(tmp_path, reads, monkeypatch):
    file = tmp_path / "rows"
    file.write_text("x")
    now = time.time()
    monkeypatch.setattr(content.time, "time", lambda: now + 3)

    assert content_hash(file) == content_hash(file)
    assert len(reads) == 1


def test_a_file_with_the_clock_turned_back_is_not_taken_for_an_old_one(tmp_path):
    file = tmp_path / "rows"
    file.write_text("x")
    os.utime(file, (1, 1))  # as `cp -p` and `tar` do; ctime tells that it has just changed
    content_hash(file)

    assert memos(tmp_path) == []


@pytest.mark.usefixtures("settled")
def test_an_edit_in_place_that_hides_its_time_is_seen(tmp_path):
    file = tmp_path / "rows"
    file.write_text("one")
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    content_hash(file)
    time.sleep(0.02)  # a tick of the kernel's clock
    with file.open("r+") as text:
        text.write("two")
    os.utime(file, ns=times)

    assert content_hash(file) == right(file)


@pytest.mark.usefixtures("settled")
def test_another_file_under_the_same_name_is_seen(tmp_path):
    file = tmp_path / "rows"
    for text in ("one", "two"):
        new = tmp_path / "new"
        new.write_text(text)
        os.utime(new, (1, 1))
        new.replace(file)

        assert content_hash(file) == right(file)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("broken", ["", "{", "[]", '{"state": 1}', "null"])
def test_a_broken_memo_is_made_anew(tmp_path, broken):
    file = tmp_path / "rows"
    file.write_text("x")
    content_hash(file)
    (memo,) = memos(tmp_path)
    memo.write_text(broken)

    assert content_hash(file) == right(file)
    assert json.loads(memo.read_text())["hash"] == right(file)


@pytest.mark.usefixtures("settled")
def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path):
    file = tmp_path / "rows"
    file.write_text("x")
    (tmp_path / "cache").write_text("a file where the directory should be")

    assert content_hash(file) == right(file)


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        content_hash(tmp_path / "nowhere")


HASH_OFTEN = """
import sys
from pathlib import Path
from llmkit.data.reading import content
content.SETTLED = -1.0
print(*{content.content_hash(Path(sys.argv[1])) for _ in range(200)})
"""


def test_processes_at_the_same_time_agree(tmp_path):
    file = tmp_path / "rows"
    file.write_text("x")
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", HASH_OFTEN, str(file)]
    hashing = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = [set(process.communicate(timeout=60)[0].split()) for process in hashing]

    assert set.union(*found) == {right(file)}
    assert list((tmp_path / "cache" / "hashes").iterdir()) == memos(tmp_path), "nothing is left half written"
    assert len(memos(tmp_path)) == 1
