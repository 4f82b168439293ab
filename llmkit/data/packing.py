"""Packing: several rows in one of at most `max_length` tokens, which do not see each other (arXiv 2404.10830)."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import datasets

from llmkit.storage import build_once, cache_dir

PACKED = "packed.arrow"


def pack(dataset: datasets.Dataset, *, max_length: int, fingerprint: str) -> datasets.Dataset:
    """TRL's best-fit-decreasing packing of `input_ids` and `labels`, with `seq_lengths`, from which positions restart.

    Args:
        dataset: rows of at most `max_length` tokens, which are never cut.
        fingerprint: of the dataset's content; the packed rows are kept in the cache under it.
    """
    from trl import pack_dataset

    def build(directory: Path) -> None:
        with _no_progress_bar():
            pack_dataset(dataset, max_length, "bfd", {"cache_file_name": str(directory / PACKED)})

    target = build_once(cache_dir() / "data" / f"packed-{max_length}-{metadata.version('trl')}-{fingerprint}", build)
    return datasets.Dataset.from_file(str(target / PACKED))


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
