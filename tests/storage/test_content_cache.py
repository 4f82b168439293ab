"""The cache of fetched files: once per content, safe with several jobs and with killed ones, bounded, and read only."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_proxy import FaultProxy, Slow
from storage_files import MIB, everything_in

from llmkit.storage import Place, StorageError, content_store, open_place, upload_files
from llmkit.storage.content import GIB, fetch_directory


@pytest.fixture(autouse=True)
def new_process(monkeypatch) -> Iterator[None]:
    """Directories are held while a process lives: each test is one of its own."""
    monkeypatch.setattr(content_store, "_in_use", {})
    yield
    for directory in list(content_store._in_use):
        end_use(directory)


def end_use(directory: Path) -> None:
    """As if the process that used it had ended."""
    os.close(content_store._in_use.pop(directory))


@pytest.fixture
def proxy(s3_server, s3_url) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def counted(proxy, s3_url, config) -> Place:
    """A place whose requests are counted."""
    return open_place(s3_url, dataclasses.replace(config, endpoint_url=proxy.endpoint, addressing_style="path"))


def fetches(proxy: FaultProxy) -> int:
    """How many objects were fetched; a listing is no object."""
    return sum(method == "GET" and "list-type" not in path for method, path in proxy.requests)


def fill(place: Place, **files: bytes) -> None:
    for name, data in files.items():
        place.write(name.replace("__", "/"), data)


def kept(cache: Path) -> int:
    """Bytes of all contents in the cache, each counted once."""
    states = {path.stat().st_ino: path.stat() for path in (cache / "objects").rglob("*") if path.is_file()}
    return sum(state.st_size for state in states.values() if not state.st_mode & 0o200)


def test_a_directory_holds_what_the_place_does_and_cannot_be_written(s3_place, config):
    fill(s3_place, config=b"{}", deep__er__weights=b"123")
    directory = fetch_directory(s3_place, config=config)

    assert everything_in(directory) == {"config": b"{}", "deep/er/weights": b"123"}
    assert all(not path.stat().st_mode & 0o222 for path in directory.rglob("*") if path.is_file())


def test_only_the_files_asked_for_are_fetched(counted, proxy, config):
    fill(counted, a=b"1", b=b"2")
    proxy.requests.clear()
    assert everything_in(fetch_directory(counted, ["b"], config=config)) == {"b": b"2"}
    assert fetches(proxy) == 1


def test_a_place_on_this_machine_is_its_own_directory(tmp_path, config):
    (tmp_path / "model").mkdir()
    assert fetch_directory(open_place(tmp_path / "model", config), config=config) == tmp_path / "model"


@pytest.mark.parametrize(
    ("names", "told"), [(None, "holds no files"), (["model.bin"], "does not hold model.bin; it holds a")]
)
def test_what_is_not_there_is_an_error(s3_place, config, names, told):
    if names:
        fill(s3_place, a=b"1")
    with pytest.raises(StorageError, match=told):
        fetch_directory(s3_place, names, config=config)


def test_what_has_not_changed_is_not_fetched_again(counted, proxy, config):
    fill(counted, a=b"1", b=b"2")
    first = fetch_directory(counted, config=config)
    proxy.requests.clear()
    assert fetch_directory(counted, config=config) == first
    assert fetches(proxy) == 0


def test_only_what_has_changed_is_fetched_again_and_the_old_directory_stays(counted, proxy, config):
    fill(counted, a=b"1", b=b"2")
    first = fetch_directory(counted, config=config)
    fill(counted, b=b"3")
    proxy.requests.clear()
    second = fetch_directory(counted, config=config)

    assert fetches(proxy) == 1
    assert everything_in(first) == {"a": b"1", "b": b"2"}
    assert everything_in(second) == {"a": b"1", "b": b"3"}


def test_what_was_written_again_with_the_same_content_gives_the_same_directory(s3_place, config):
    fill(s3_place, a=b"1")
    first = fetch_directory(s3_place, config=config)
    fill(s3_place, a=b"1")
    assert fetch_directory(s3_place, config=config) == first


def test_a_content_with_two_names_is_stored_once(s3_place, config, own_cache):
    content = b"x" * 100_000
    fill(s3_place, one__a=content, two__b=content)
    first = fetch_directory(s3_place.place("one"), config=config)
    second = fetch_directory(s3_place.place("two"), config=config)

    assert (first / "a").stat().st_ino == (second / "b").stat().st_ino
    assert kept(own_cache) == 100_000


def test_a_content_that_somebody_changed_is_fetched_again(s3_place, config):
    fill(s3_place, a=b"12")
    path = fetch_directory(s3_place, config=config) / "a"
    path.chmod(0o644)
    path.write_bytes(b"13")
    fill(s3_place, b=b"new")
    assert everything_in(fetch_directory(s3_place, config=config)) == {"a": b"12", "b": b"new"}


def test_a_file_system_without_hard_links_gets_copies(s3_place, config, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    fill(s3_place, a=b"1", b=b"1")
    directory = fetch_directory(s3_place, config=config)
    assert everything_in(directory) == {"a": b"1", "b": b"1"}
    assert fetch_directory(s3_place, config=config) == directory


def test_a_bucket_that_lists_names_that_lead_outside_is_refused(s3_place, config, own_cache):
    s3_place.bucket.client.put_object(
        Bucket=s3_place.bucket.name, Key=f"{s3_place.prefix}/a/../../../../out", Body=b"evil"
    )
    with pytest.raises(StorageError, match=r"a/../../../../out.*not fetched"):
        fetch_directory(s3_place, config=config)
    assert not own_cache.exists()


# --- the bound -----------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first_and_what_is_in_use_stays(s3_place, config, own_cache, monkeypatch):
    config.cache_gib = 350_000 / GIB
    names = ["first", "second", "third", "fourth"]
    for seed, name in enumerate(names):
        s3_place.write(f"{name}/file", bytes([seed]) * 100_000)
    directories = {}
    for name in ("first", "second", "third"):
        directories[name] = fetch_directory(s3_place.place(name), config=config)
        if name != "first":  # this process goes on using the first one; the others' users have ended
            end_use(directories[name])
        time.sleep(0.02)
    fetch_directory(s3_place.place("fourth"), config=config)

    assert directories["first"].exists()
    assert not directories["second"].exists()
    assert directories["third"].exists()
    assert kept(own_cache) == 300_000


def test_contents_that_no_directory_has_go_before_directories(s3_place, config, own_cache):
    config.cache_gib = 250_000 / GIB
    s3_place.write("one/file", b"1" * 100_000)
    first = fetch_directory(s3_place.place("one"), config=config)
    end_use(first)
    (own_cache / "objects" / "blobs" / ("0" * 64)).write_bytes(b"0" * 100_000)
    s3_place.write("two/file", b"2" * 100_000)
    fetch_directory(s3_place.place("two"), config=config)
    assert first.exists()
    assert not (own_cache / "objects" / "blobs" / ("0" * 64)).exists()


def test_a_disk_without_room_is_told_in_numbers_before_anything_is_fetched(counted, proxy, config, monkeypatch):
    fill(counted, a=b"1" * 1000)
    proxy.requests.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(StorageError, match=r"needs 0\.00 GiB in .* where 0\.00 GiB are free.*LLMKIT_CACHE"):
        fetch_directory(counted, config=config)
    assert fetches(proxy) == 0


# --- several jobs --------------------------------------------------------------------------------------------------


def fetch_elsewhere(place: Place) -> str:
    """A program that fetches a place in a process of its own, and prints where it is."""
    return (
        "import sys\nfrom llmkit.storage import open_place\nfrom llmkit.storage.content import fetch_directory\n"
        "from llmkit.config.schema import StorageConfig\n"
        "config = StorageConfig(part_size_mib=5, addressing_style='path')\n"
        f"print(fetch_directory(open_place({place.url!r}, config), config=config), flush=True)\n"
    )


def start(place: Place, proxy: FaultProxy) -> subprocess.Popen[str]:
    environment = os.environ | {"AWS_ENDPOINT_URL_S3": proxy.endpoint}
    program = [sys.executable, "-c", fetch_elsewhere(place)]
    return subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True)


def test_two_jobs_that_want_the_same_files_fetch_them_once(counted, proxy, make_file):
    fill(counted, a=b"1" * 1000, b=b"2" * 1000)
    proxy.requests.clear()
    proxy.faults = [Slow(method="GET", path="/a", bytes_per_second=2000)]
    jobs = [start(counted, proxy) for _ in range(2)]
    printed = [job.communicate(timeout=60)[0] for job in jobs]

    assert [job.returncode for job in jobs] == [0, 0]
    assert printed[0] == printed[1]
    assert fetches(proxy) == 2


def test_what_a_killed_job_had_completed_is_not_fetched_again(
    counted, proxy, s3_place, make_file, tmp_path, config, own_cache
):
    make_file(MIB, "a-done", seed=1)
    make_file(MIB, "b-begun", seed=2)
    upload_files(s3_place, tmp_path / "made", ["a-done", "b-begun"])
    proxy.faults = [Slow(method="GET", path="b-begun", bytes_per_second=10_000)]
    job = start(counted, proxy)
    index = own_cache / "objects" / "index"
    wait_until(lambda: index.is_dir() and any(index.glob("*.json")))
    job.send_signal(signal.SIGKILL)
    job.communicate()
    proxy.requests.clear()
    directory = fetch_directory(counted, config=config)

    assert everything_in(directory) == everything_in(tmp_path / "made")
    assert fetches(proxy) == 1
    # What the killed one had begun is gone as well.
    assert [path.name for path in (own_cache / "objects" / "sets").iterdir()] == [directory.name]


def wait_until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
