"""The cache: where it is, and that what is made in it is made once and never seen half made."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llmkit.storage import build_once, cache_dir


def seen(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name != ".locks"]


def test_of_two_that_want_it_at_the_same_time_one_builds_and_the_other_waits_for_it(tmp_path):
    started, go_on = threading.Event(), threading.Event()
    builders, results = [], []

    def build(directory: Path) -> None:
        builders.append(directory)
        started.set()
        assert go_on.wait(10)
        (directory / "all").touch()

    threads = [threading.Thread(target=lambda: results.append(build_once(tmp_path / "made", build))) for _ in "ab"]
    threads[0].start()
    assert started.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert results == [tmp_path / "made"] * 2
    assert len(builders) == 1
    assert seen(tmp_path) == ["made"]


def test_a_builder_that_fails_leaves_nothing_and_the_next_one_succeeds(tmp_path):
    def fail(directory: Path) -> None:
        (directory / "half").touch()
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        build_once(tmp_path / "made", fail)
    assert seen(tmp_path) == []
    assert (build_once(tmp_path / "made", lambda directory: (directory / "all").touch()) / "all").exists()


def test_what_a_killed_builder_leaves_does_not_count_and_is_removed_by_the_next(tmp_path):
    target = tmp_path / "made"
    code = f"""
import os, pathlib
from llmkit.storage import build_once
def build(directory):
    (directory / "half").touch()
    os.kill(os.getpid(), 9)
build_once(pathlib.Path({str(target)!r}), build)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert not target.exists()
    assert len(seen(tmp_path)) == 1
    build_once(target, lambda directory: (directory / "all").touch())
    assert [file.name for file in target.iterdir()] == ["all"]
    assert seen(tmp_path) == ["made"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LLMKIT_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"LLMKIT_CACHE": "~/a"}, "/home/someone/a"),
        ({"LLMKIT_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/llmkit"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/someone/.cache/llmkit"),
        ({}, "/home/someone/.cache/llmkit"),
    ],
)
def test_the_cache_is_where_the_environment_says(environment, expected, monkeypatch):
    monkeypatch.delenv("LLMKIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in ({"HOME": "/home/someone"} | environment).items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)
