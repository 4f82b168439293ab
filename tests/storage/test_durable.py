"""Writing that survives a crash: whole or not at all."""

import hashlib
import os

import pytest

from llmkit import durable


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "note"
    durable.write_text(path, "first")
    durable.write_text(path, "zweites ü")
    assert path.read_text(encoding="utf-8") == "zweites ü"
    assert os.listdir(tmp_path) == ["note"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "note"
    durable.write_bytes(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        durable.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["note"]


def test_the_content_is_on_the_disk_before_its_name_and_the_name_before_the_call_returns(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        steps.append("directory" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def noted_replace(*paths: object) -> None:
        steps.append("rename")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    durable.write_bytes(tmp_path / "note", b"1")
    assert steps == ["file", "rename", "directory"]


def test_a_tree_is_synced_files_first_and_the_top_last(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("x", "a/y", "a/b/z"):
        (tmp_path / name).touch()
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    durable.sync_tree(tmp_path)

    names = [os.path.relpath(path, tmp_path) for path in synced]
    assert sorted(names[:3]) == ["a/b/z", "a/y", "x"]
    assert names[3:] == ["a/b", "a", "."]


def test_the_hash_is_that_of_the_content(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert durable.sha256_of(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()
