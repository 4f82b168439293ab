"""Files of rows in a bucket: which ones an address means, by the rules for files of this machine; their copies here."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from llmkit.config.data_files import (
    TOKENS_FILE,
    files_of_split,
    may_hold_rows,
    refuse_split,
    refuse_strangers,
)
from llmkit.errors import DataError, did_you_mean
from llmkit.remote import files_at, joined, local_copy, split_address

MAGIC = re.compile(r"[*?[]")


def fetch_files(address: str, *, split: str, said: str) -> dict[str, Path]:
    """The files that hold the rows of `address`, in the order they are read: the address of each, and its copy here.

    `address` is a file, a directory or a glob, as in `llmkit.config.data_files.find_files`. The list of special tokens
    beside the rows comes with them.

    Args:
        said: how messages begin: the key and its value (`data.path=s3://...`).

    Raises:
        DataError: nothing is there, nothing llmkit can read, or it is not clear which files are meant.
        StorageError: the store does not say, or does not give them.
    """
    folder, names = _find(address, split, said)
    tokens = {str(PurePosixPath(name).with_name(TOKENS_FILE)) for name in names} & files_at(folder).keys()
    copy = local_copy(folder, {*names, *tokens})
    return {joined(folder, name): copy / name for name in names}


def splits_at(address: str) -> list[str]:
    """The names of the files right below `address`, which say what splits it has."""
    return [name for name in files_at(address) if "/" not in name]


def _find(address: str, split: str, said: str) -> tuple[str, list[str]]:
    """A directory, and the names in it of the files that are meant."""
    if MAGIC.search(address):
        refuse_split(split, said)
        return _find_matching(address, said)
    if there := files_at(address):
        files = [name for name in there if "/" not in name]
        shown = sorted({name.partition("/")[0] for name in there})
        return address, files_of_split(files, split, said, there=shown)
    refuse_split(split, said)
    folder, name = split_address(address)
    beside = files_at(folder)
    if name not in beside:
        near = did_you_mean(name, {other.partition("/")[0] for other in beside})
        raise DataError(f"{said}: there is no such file or directory in the bucket.{near}")
    refuse_strangers([PurePosixPath(name)], said)
    return folder, [name]


def _find_matching(address: str, said: str) -> tuple[str, list[str]]:
    fixed = MAGIC.split(address)[0].rpartition("/")[0]
    names = sorted(_matching(files_at(fixed), address.removeprefix(fixed).lstrip("/")))
    found = [name for name in names if may_hold_rows(PurePosixPath(name).name)]
    if not found:
        raise DataError(f"{said}: no file in the bucket matches.")
    refuse_strangers(map(PurePosixPath, found), said)
    return fixed, found


def _matching(names: Iterable[str], pattern: str) -> list[str]:
    """The names that a shell's pattern means; `**` stands for any directories, none included."""
    from fsspec.utils import glob_translate

    compiled = re.compile(glob_translate(pattern))
    return [name for name in names if compiled.match(name)]
