"""Which files a data path names, and of which type each is: the same for the check before a run and for its reader."""

import glob
import re
from collections.abc import Iterable
from pathlib import Path

from llmkit.errors import DataError, did_you_mean

TYPES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
LEGAL_FILES = "rows are read from .jsonl (or .ndjson), .json, .csv and .parquet, each also with .gz after it"
TOKENS_FILE = "tokens.json"  # {"tokens": [...]}: the special tokens of the rows beside it
# Files that describe a data set, in directories of rows.
NEVER_ROWS = (TOKENS_FILE, "manifest.json", "dataset_info.json", "dataset_infos.json")
# Names that say which part of the data a file is.
SPLIT_NAMES = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d+)(-of-(?P<count>\d+))?")
NAMES_SHOWN = 8


def file_type(path: Path) -> str | None:
    """`jsonl`, `json`, `csv` or `parquet` by the file's extension, a .gz after it aside; None for any other file."""
    return TYPES.get(Path(_without_gz(path.name)).suffix.lower())


def is_gzipped(path: Path) -> bool:
    """Whether the file's name says so."""
    return path.suffix.lower() == ".gz"


def find_files(path: str, *, split: str, said: str) -> list[Path]:
    """The files that hold the rows of `path`, in the order they are read.

    A file is itself. Of a directory, they are the files named after `split` (train.jsonl, or in parts
    train-00000-of-00002.parquet), or for `train` all, if none is named after a split. Of a glob, they are all it
    matches, sorted.

    Args:
        said: how messages begin: the key and its value (`data.path=DIR`).

    Raises:
        DataError: nothing is there, nothing llmkit can read, or it is not clear which files are meant.
    """
    place = Path(path)
    if place.is_dir():
        return _files_of_directory(place, split, said)
    if split != "train":
        raise DataError(f"{said}: '{split}' cannot be read: only directories and data sets of the hub have splits.")
    if place.exists():
        found = [place]
    elif glob.has_magic(path):
        found = [Path(name) for name in sorted(glob.glob(path, recursive=True)) if _may_hold_rows(Path(name))]
        if not found:
            raise DataError(f"{said}: no file matches (seen from {Path.cwd()}).")
    else:
        raise DataError(f"{said}: does not exist (seen from {Path.cwd()}).{near_file(path)}")
    if strangers := [file for file in found if file_type(file) is None]:
        raise DataError(f"{said}: {strangers[0].name} is of no type that llmkit reads; {LEGAL_FILES}.")
    return found


def near_file(path: str) -> str:
    """` Did you mean 'x'?` for the nearest name in the directory that `path` points into, or an empty string."""
    folder = Path(path).parent
    return did_you_mean(Path(path).name, [file.name for file in folder.iterdir()]) if folder.is_dir() else ""


def _files_of_directory(folder: Path, split: str, said: str) -> list[Path]:
    try:
        there = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{said}: cannot be read ({error.strerror}).") from error
    files = [file for file in there if _may_hold_rows(file) and file_type(file)]
    named = [file for file in files if _split_of(file) == split]
    holds = f"it holds: {_names(there)}"
    if named:
        _check_shards(named, said)
    elif split != "train":
        raise DataError(f"{said}: the directory has no file of the split '{split}', such as {split}.jsonl ({holds}).")
    elif others := [file.name for file in files if _split_of(file).lower() in SPLIT_NAMES]:
        raise DataError(
            f"{said}: the directory has no train.jsonl, or train of another type, but {others[0]}: name a file, or a "
            f"split with data.split ({holds})."
        )
    elif not files:
        raise DataError(f"{said}: the directory has no file that llmkit reads ({holds}); {LEGAL_FILES}.")
    files = named or files
    if len(types := {file_type(file) for file in files}) > 1:
        raise DataError(
            f"{said}: files of several types ({', '.join(sorted(map(str, types)))}) may hold the same rows; name one "
            f"of them, or a glob ({holds})."
        )
    return files


def _may_hold_rows(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".") and _without_gz(file.name).lower() not in NEVER_ROWS


def _split_of(file: Path) -> str:
    """The file's name without extension and number: `train` for train.jsonl.gz and train-00000-of-00002.parquet."""
    stem = Path(_without_gz(file.name)).stem
    shard = SHARD.fullmatch(stem)
    return shard["split"] if shard else stem


def _check_shards(files: list[Path], said: str) -> None:
    """Refuse a split of which a part is missing, and one that is there whole and in parts."""
    shards = [SHARD.fullmatch(Path(_without_gz(file.name)).stem) for file in files]
    whole = [file.name for file, shard in zip(files, shards, strict=True) if shard is None]
    if whole and len(files) > 1:
        raise DataError(f"{said}: {_names(files)} may hold the same rows; name one of them, or a glob.")
    counts = {int(shard["count"]) for shard in shards if shard and shard["count"]}
    if counts and counts != {len(files)}:
        raise DataError(f"{said}: {len(files)} of {max(counts)} parts are there ({_names(files)}).")


def _without_gz(name: str) -> str:
    return name[:-3] if name.lower().endswith(".gz") else name


def _names(files: Iterable[Path]) -> str:
    names = sorted(file.name for file in files)
    more = f", and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return (", ".join(names[:NAMES_SHOWN]) or "nothing") + more
