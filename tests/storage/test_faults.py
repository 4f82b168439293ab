"""What networks and servers do wrong, one test each: repaired where possible, else an error that says what to check."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from fault_proxy import (
    Answer,
    Cut,
    CutRequest,
    Delay,
    FaultProxy,
    Flip,
    FlipRequest,
    LoseAnswer,
    Replace,
    Slow,
    denied,
    unavailable,
)
from storage_files import MIB, everything_in

from llmkit.storage import Place, StorageError, open_place

SIZE = 11 * MIB  # three parts


@pytest.fixture
def proxy(s3_server, s3_url) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def faulty(proxy, s3_url, config) -> Place:
    """The same place as `s3_place`, reached through the proxy."""
    through = {"endpoint_url": proxy.endpoint, "addressing_style": "path", "timeout_s": 1.0}
    return open_place(s3_url, dataclasses.replace(config, **through))


@pytest.fixture
def sent(s3_place, make_file):
    """A file that lies in the place as `file`."""
    source = make_file(SIZE)
    s3_place.upload(source, "file")
    return source


# --- fetching ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Cut(method="GET", after_bytes=MIB, times=2),
        Cut(method="GET", after_bytes=0, times=2),
        Flip(method="GET", at=3 * MIB),
        unavailable(times=2, method="GET"),
        Delay(method="GET", seconds=60),
    ],
    ids=["cut", "cut at once", "flipped", "503", "black hole"],
)
def test_a_file_is_fetched_whole_in_spite_of(fault, faulty, proxy, sent, tmp_path):
    from llmkit.durable import sha256_of

    proxy.faults = [fault]
    sha256 = faulty.download("file", tmp_path / "back", sha256=sha256_of(sent))

    assert fault.times == 0
    assert sha256 == sha256_of(tmp_path / "back") == sha256_of(sent)
    assert list(everything_in(tmp_path / "back")) == []


def test_a_connection_that_breaks_is_taken_up_where_it_broke(faulty, proxy, sent, tmp_path):
    proxy.faults = [Cut(method="GET", after_bytes=4 * MIB)]
    faulty.threads = 1  # else the last part, which is shorter than that, may be the first to be asked for
    faulty.download("file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == sent.read_bytes()
    assert proxy.count("GET") == 4  # three parts, one of them in two goes


def test_a_file_that_is_damaged_each_time_does_not_appear(faulty, proxy, sent, tmp_path):
    from llmkit.durable import sha256_of

    proxy.faults = [Flip(method="GET", at=5, times=None)]
    with pytest.raises(StorageError, match="fetched twice: its SHA-256"):
        faulty.download("file", tmp_path / "back" / "file", sha256=sha256_of(sent))
    assert everything_in(tmp_path / "back") == {}


def test_a_file_replaced_while_it_is_fetched_is_fetched_from_the_start(
    faulty, proxy, s3_place, sent, make_file, tmp_path
):
    other = make_file(SIZE, "other", seed=1)
    asked = proxy.fault_for

    def replace_then_ask(method: str, path: str):
        if method == "GET" and proxy.count("GET") == 2:
            s3_place.upload(other, "file")
        return asked(method, path)

    proxy.fault_for = replace_then_ask
    faulty.threads = 1
    faulty.download("file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (Cut(method="GET", after_bytes=0, times=None), "the connection was cut"),
        (unavailable(times=None), "overloaded"),
        (denied(), "access denied"),
        (Delay(seconds=60, times=None), "timed out"),
    ],
    ids=["cut", "503", "403", "black hole"],
)
def test_what_does_not_end_is_an_error_and_leaves_nothing(fault, told, faulty, proxy, sent, tmp_path):
    proxy.faults = [fault]
    with pytest.raises(StorageError, match=told):
        faulty.download("file", tmp_path / "back" / "file", size=SIZE)
    assert everything_in(tmp_path / "back") == {}


def test_a_small_file_cut_off_is_read_again(faulty, proxy, s3_place):
    s3_place.write("note", b"0123456789")
    proxy.faults = [Cut(method="GET", after_bytes=4)]
    assert faulty.read("note") == b"0123456789"


# --- sending -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, SIZE])
@pytest.mark.parametrize(
    "fault",
    [
        FlipRequest(method="PUT", path="file", at=100),
        CutRequest(method="PUT", path="file", after_bytes=500),
        unavailable(times=2, method="PUT"),
        Delay(method="PUT", path="file", seconds=60),
        LoseAnswer(method="PUT", path="file"),
    ],
    ids=["flipped", "cut", "503", "black hole", "lost answer"],
)
def test_a_file_arrives_whole_in_spite_of(fault, size, faulty, proxy, s3_place, make_file):
    source = make_file(size)
    proxy.faults = [fault]
    faulty.upload(source, "file")

    assert fault.times == 0
    assert s3_place.bucket.client.get_object(**s3_place._object("file").where)["Body"].read() == source.read_bytes()
    assert s3_place.abort_stale_uploads(older_than=-5) == 0


def test_a_lost_answer_to_the_completion_of_an_upload_is_found_out(faulty, proxy, s3_place, make_file):
    source = make_file(SIZE)
    proxy.faults = [LoseAnswer(method="POST", path="uploadId")]
    faulty.upload(source, "file")
    assert s3_place.files()["file"].size == SIZE


@pytest.mark.parametrize("size", [1000, SIZE])
def test_a_file_that_is_damaged_each_time_is_reported(size, faulty, proxy, make_file):
    proxy.faults = [FlipRequest(method="PUT", path="file", at=100, times=None)]
    with pytest.raises(StorageError, match=r"does not hold what was sent, twice|Digest|Checksum"):
        faulty.upload(make_file(size), "file")


def test_a_small_write_that_is_damaged_is_repaired(faulty, proxy, s3_place):
    proxy.faults = [FlipRequest(method="PUT", path="note", at=3)]
    faulty.write("note", b"0123456789")
    assert s3_place.read("note") == b"0123456789"


@pytest.mark.parametrize("size", [1000, SIZE])
def test_a_server_that_knows_no_checksums_is_read_back(size, faulty, proxy, s3_place, make_file):
    unknown = Answer(method="POST", path="uploads", status=501, code="NotImplemented", after=0, times=1)
    proxy.faults = [unknown, FlipRequest(method="PUT", path="file", at=100)]
    source = make_file(size)
    faulty.upload(source, "file")
    assert faulty.bucket.checks("").name == "NOTHING"
    assert s3_place.read("file") == source.read_bytes()
    assert proxy.count("GET") >= 2  # the damaged one and the good one


@pytest.mark.parametrize("size", [1000, SIZE])
def test_a_server_that_refuses_damaged_bodies_is_believed_and_sent_them_again(size, faulty, proxy, s3_place, make_file):
    refuse = Answer(method="PUT", path=".llmkit-probe", status=400, code="BadDigest")
    damaged = Answer(method="PUT", path="file", status=400, code="BadDigest")
    proxy.faults = [refuse, damaged]
    source = make_file(size)
    faulty.upload(source, "file")
    assert faulty.bucket.checks("").name == "REFUSES"
    assert s3_place.read("file") == source.read_bytes()
    assert proxy.count("GET") == 0


def test_uploads_that_fail_are_aborted(faulty, proxy, s3_place, make_file):
    faulty.write("warm-up", b"")
    proxy.faults = [unavailable(times=None, method="PUT")]
    with pytest.raises(StorageError, match="overloaded"):
        faulty.upload(make_file(SIZE), "file")
    assert s3_place.abort_stale_uploads(older_than=-5) == 0


def test_an_upload_that_may_still_be_going_on_is_not_aborted(faulty, proxy, s3_place):
    s3_place.bucket.client.create_multipart_upload(**s3_place._object("file").where)
    # Moto dates every upload to 2010.
    proxy.faults = [Replace(method="GET", path="uploads", old=b"2010-11-10T20:48:33", new=b"2999-01-01T00:00:00")]
    assert faulty.abort_stale_uploads(older_than=3600) == 0
    assert s3_place.abort_stale_uploads(older_than=-5) == 1


def test_ctrl_c_ends_an_upload_at_once_and_aborts_it(proxy, s3_place, s3_url, make_file, tmp_path):
    source = make_file(SIZE)
    proxy.faults = [Delay(method="PUT", path="partNumber=2", seconds=300, times=None)]
    program = (
        "import signal\nfrom pathlib import Path\nfrom llmkit.storage import open_place\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs inherit none
        "from llmkit.config.schema import StorageConfig\n"
        f"place = open_place({s3_url!r}, StorageConfig(part_size_mib=5, addressing_style='path'))\n"
        f"place.upload(Path({str(source)!r}), 'file')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"AWS_ENDPOINT_URL_S3": proxy.endpoint},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: proxy.count("PUT", "/file") >= 3)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)

    assert time.monotonic() - began < 10
    assert "KeyboardInterrupt" in complaint
    assert s3_place.files() == {}
    assert s3_place.abort_stale_uploads(older_than=-5) == 0


# --- "not there" and everything else -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (denied(), "access denied"),
        (unavailable(times=None), "overloaded"),
        (Delay(seconds=60, times=None), "timed out"),
        (Cut(after_bytes=10, times=None), "cut|answer"),
        (Answer(status=200, body=b"<html><body>Log in first</body></html>", times=None), "no listing"),
        (Answer(status=200, body=b"Log in first", times=None), "answered"),
        (Answer(status=404, body=b"<html><body>Not found</body></html>", times=None), "404"),
        (Answer(status=404, code="NoSuchBucket", times=None), "no such bucket"),
        (Answer(status=500, code="InternalError", times=None), "500"),
        (Replace(old=b"<IsTruncated>false", new=b"<IsTruncated>true", times=None), "cut off"),
    ],
    ids=["403", "503", "black hole", "cut", "html", "text", "404 html", "no bucket", "500", "truncated"],
)
def test_a_listing_that_fails_is_never_taken_for_an_empty_one(fault, told, faulty, proxy, s3_place):
    s3_place.write("note", b"1")
    proxy.faults = [fault]
    with pytest.raises(StorageError, match=told) as failed:
        faulty.files()
    assert faulty.url in str(failed.value)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (denied(), "access denied"),
        (unavailable(times=None), "overloaded"),
        (Delay(seconds=60, times=None), "timed out"),
        (Answer(status=404, code="NoSuchBucket", times=None), "no such bucket"),
        (Answer(status=404, body=b"<html><body>Not found</body></html>", times=None), "404"),
        (Answer(status=400, code="InvalidArgument", times=None), "400 InvalidArgument"),
    ],
    ids=["403", "503", "black hole", "no bucket", "404 html", "400"],
)
def test_a_read_that_fails_is_never_taken_for_an_absent_file(fault, told, faulty, proxy):
    proxy.faults = [fault]
    with pytest.raises(StorageError, match=told):
        faulty.read("note")


def test_a_server_that_says_404_without_a_code_is_believed_once_its_listing_agrees(faulty, proxy, s3_place):
    proxy.faults = [Answer(method="GET", path="/note", status=404, body=b"", times=None)]
    assert faulty.read("note") is None
    s3_place.write("note", b"1")
    with pytest.raises(StorageError, match="404"):
        faulty.read("note")


@pytest.mark.parametrize(
    ("endpoint", "told"),
    [
        ("http://127.0.0.1:1", "cannot connect to 127.0.0.1"),
        ("http://no-such-host.invalid", "cannot resolve the host no-such-host.invalid"),
        ("http://user:hunter2@127.0.0.1:1", "127.0.0.1"),
        ("not a url", "storage.endpoint_url"),
    ],
)
def test_a_server_that_is_not_reached_is_named_without_secrets(endpoint, told, s3_url, config):
    config.endpoint_url, config.max_attempts = endpoint, 1
    with pytest.raises(StorageError, match=told) as failed:
        open_place(s3_url, config).read("note")
    assert "hunter2" not in str(failed.value)


def test_missing_credentials_say_how_to_give_them(s3_url, config, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID"):
        open_place(s3_url, config).files()


def test_a_profile_that_does_not_exist_is_named(s3_url, config):
    config.profile = "nobody"
    with pytest.raises(StorageError, match=r"nobody.*storage\.profile"):
        open_place(s3_url, config)


def test_a_missing_bucket_is_an_error_and_not_an_empty_place(s3_url, config):
    place = open_place("s3://llmkit-no-such-bucket/runs", config)
    for ask in (place.files, lambda: place.read("note"), lambda: place.write("note", b"")):
        with pytest.raises(StorageError, match="no such bucket"):
            ask()


def test_slow_is_not_broken(faulty, proxy, sent, tmp_path):
    proxy.faults = [Slow(method="GET", bytes_per_second=3 * MIB)]
    faulty.download("file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == sent.read_bytes()


def wait_until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
