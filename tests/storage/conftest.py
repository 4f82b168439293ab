"""What the tests of storage share: an empty place of each kind, and a config that does not wait long."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from llmkit.config.schema import StorageConfig
from llmkit.storage import Place, open_place


@pytest.fixture
def config() -> StorageConfig:
    """Small parts and short waits, so that small files are sent in several parts and failures are seen soon."""
    return StorageConfig(part_size_mib=5, max_concurrency=4, timeout_s=20, max_attempts=3)


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, config: StorageConfig) -> Place:
    """An empty place: a directory, and one in a bucket."""
    if request.param == "local":
        return open_place(tmp_path / "place", config)
    return open_place(request.getfixturevalue("s3_url"), config)


@pytest.fixture
def s3_place(s3_url: str, config: StorageConfig) -> Place:
    return open_place(s3_url, config)


@pytest.fixture
def make_file(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a file of so many random bytes, the same ones for the same seed."""

    def make(size: int, name: str = "file.bin", *, seed: int = 0) -> Path:
        path = tmp_path / "made" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(seed).randbytes(size))
        return path

    return make


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
