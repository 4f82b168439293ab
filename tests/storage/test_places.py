"""One suite over every kind of place: what is written is read, and only what is not there is absent."""

import hashlib
import os
import time
from pathlib import Path

import pytest
from storage_files import MIB, everything_in

from llmkit.errors import ConfigError
from llmkit.storage import StorageError, download_files, open_place, upload_files

# Sizes around the border between one request and several parts (5 MiB here).
SIZES = [0, 1, 5 * MIB - 1, 5 * MIB, 5 * MIB + 1, 12 * MIB + 345]


def test_an_empty_place_has_no_files_and_reads_as_absent(place):
    assert place.files() == {}
    assert place.read("not/there") is None


def test_what_is_written_is_read_and_replaced(place):
    place.write("folder/note", b"first")
    assert place.read("folder/note") == b"first"
    place.write("folder/note", b"second")
    assert place.read("folder/note") == b"second"
    assert list(place.files()) == ["folder/note"]


@pytest.mark.parametrize("size", SIZES)
def test_a_file_comes_back_as_it_was_sent(place, make_file, tmp_path, size):
    source = make_file(size)
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    place.upload(source, "a/file", sha256=sha256)

    assert place.files()["a/file"].size == size
    assert place.download("a/file", tmp_path / "back", sha256=sha256, size=size) == sha256
    assert place.download("a/file", tmp_path / "back") == sha256
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_names_keep_spaces_and_letters_of_other_languages(place, make_file, tmp_path):
    names = ["with space/a+b&c=d%20.txt", "häuser/模型.bin", "quote'\"<>"]
    for name in names:
        place.write(name, name.encode())

    assert sorted(place.files()) == sorted(names)
    download_files(place, names, tmp_path / "back")
    assert everything_in(tmp_path / "back") == {name: name.encode() for name in names}


def test_a_listing_has_all_its_pages(place):
    if place.url.startswith("s3:"):
        place.bucket.client.meta.events.register(
            "provide-client-params.s3.ListObjectsV2", lambda params, **_: params | {"MaxKeys": 2}
        )
    for number in range(7):
        place.write(f"many/{number}", b"")
    assert list(place.files()) == [f"many/{number}" for number in range(7)]


def test_a_directory_of_a_place_is_a_place_and_hides_its_neighbours(place):
    place.write("run/checkpoints/a", b"1")
    place.write("run-2/b", b"2")

    assert list(place.place("run").files()) == ["checkpoints/a"]
    assert list(place.files("run")) == ["run/checkpoints/a"]
    assert place.place("run/checkpoints").read("a") == b"1"


def test_a_version_changes_with_the_content_and_only_with_it(place):
    place.write("note", b"one")
    before = place.files()["note"]
    assert place.files()["note"] == before
    time.sleep(0.02)
    place.write("note", b"two")
    assert place.files()["note"] != before


def test_deleted_files_are_gone_and_deleting_them_again_is_no_error(place):
    place.write("a/b", b"")
    place.write("c", b"")
    place.delete(["a/b"])
    place.delete(["a/b", "never/there"])
    assert list(place.files()) == ["c"]


def test_a_file_that_is_not_what_was_written_is_not_sent(place, make_file):
    with pytest.raises(StorageError, match="is not what was written"):
        place.upload(make_file(11 * MIB), "file", sha256="0" * 64)
    with pytest.raises(StorageError, match="is not what was written"):
        place.upload(make_file(100), "file", sha256="0" * 64)
    assert place.files() == {}
    assert place.abort_stale_uploads(older_than=0) == 0


@pytest.mark.parametrize("size", [100, 11 * MIB])
def test_a_file_without_the_hash_it_should_have_does_not_appear(place, make_file, tmp_path, size):
    place.upload(make_file(size), "file")
    with pytest.raises(StorageError, match="SHA-256"):
        place.download("file", tmp_path / "back" / "file", sha256="0" * 64)
    with pytest.raises(StorageError, match=r"bytes"):
        place.download("file", tmp_path / "back" / "file", size=size + 1)
    assert everything_in(tmp_path / "back") == {}


def test_a_file_that_is_not_there_cannot_be_fetched(place, tmp_path):
    with pytest.raises(StorageError, match="nowhere"):
        place.download("nowhere", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_several_files_go_up_and_down_and_progress_counts_every_byte(place, make_file, tmp_path):
    sizes = {"model.bin": 11 * MIB, "config.json": 100, "deep/er/tokenizer": 0}
    for seed, (name, size) in enumerate(sizes.items()):
        make_file(size, name, seed=seed)
    up, down = [], []
    upload_files(place, tmp_path / "made", sizes, progress=up.append)
    hashes = download_files(place, sizes, tmp_path / "back", sizes=sizes, progress=down.append)

    assert sum(up) == sum(down) == sum(sizes.values())
    assert everything_in(tmp_path / "back") == everything_in(tmp_path / "made")
    assert hashes == {name: hashlib.sha256((tmp_path / "made" / name).read_bytes()).hexdigest() for name in sizes}


def test_what_was_begun_and_never_ended_is_tidied_away_once_it_is_old(place):
    begin_upload(place)
    assert place.files() == {}
    if not place.url.startswith("s3:"):  # moto dates every upload to 2010; see test_faults.py
        assert place.abort_stale_uploads(older_than=3600) == 0
    assert place.abort_stale_uploads(older_than=-5) == 1
    assert place.abort_stale_uploads(older_than=-5) == 0


def begin_upload(place):
    if place.url.startswith("s3:"):
        place.bucket.client.create_multipart_upload(Bucket=place.bucket.name, Key=f"{place.prefix}/file")
    else:
        place.directory.mkdir()
        (place.directory / f".file.{'0' * 32}").touch()


def test_an_upload_leaves_no_part_behind(place, make_file):
    place.upload(make_file(11 * MIB), "file")
    assert place.abort_stale_uploads(older_than=-5) == 0


@pytest.mark.parametrize(
    "name", ["../out", "a/../../out", "/etc/out", "a\\..\\out", "C:/out", "a\0b", "a//b", "", ".", "a/" + "b" * 256]
)
def test_a_name_that_leads_outside_is_refused_before_anything_is_written(place, tmp_path, name):
    with pytest.raises(StorageError, match="the name"):
        download_files(place, ["fine", name], tmp_path / "back" / "here")
    with pytest.raises(StorageError, match="the name"):
        place.read(name)
    assert not (tmp_path / "back").exists()


def test_one_name_cannot_be_a_file_and_a_directory(place, tmp_path):
    with pytest.raises(StorageError, match="both 'a' and 'a/b'"):
        download_files(place, ["a", "a/b"], tmp_path / "back")


def test_nothing_is_written_through_a_link(place, tmp_path):
    place.write("link/file", b"1")
    (tmp_path / "back").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "back" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="is a link"):
        download_files(place, ["link/file"], tmp_path / "back")
    assert everything_in(tmp_path / "elsewhere") == {}


def test_a_directory_that_cannot_be_written_is_named(place, make_file, tmp_path):
    place.write("file", b"1")
    (tmp_path / "blocked").write_text("a file")
    with pytest.raises(StorageError, match="blocked"):
        place.download("file", tmp_path / "blocked" / "file")


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("s3://", "the name of the bucket is missing"),
        ("s3:///path", "the name of the bucket is missing"),
        ("s3://Bad!Name/x", "is not a bucket's name"),
        ("s3://bucket/a/../b", "contains '.' or '..'"),
        ("s3://bucket/a//b", "empty directory name"),
        ("gs://bucket/path", "s3://BUCKET/PATH"),
        ("az://bucket/path", "s3://BUCKET/PATH"),
    ],
)
def test_an_address_that_is_not_well_formed_says_what_is_wrong(config, address, told):
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")):
        open_place(address, config)


def test_a_path_on_this_machine_is_a_place_whatever_it_is_called(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = open_place("runs/a:b", config)
    place.write("x", b"1")
    assert Path("runs/a:b/x").read_bytes() == b"1"
    assert os.listdir("runs/a:b") == ["x"]
