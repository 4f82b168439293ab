"""Which files a data path names, and of which type each is: the same for the check before a run and for its reader."""

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

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


def file_type(path: PurePath) -> str | None:
    """`jsonl`, `json`, `csv` or `parquet` by the file's extension, a .gz after it aside; None for any other file."""
    return TYPES.get(Path(_without_gz(path.name)).suffix.lower())


def is_gzipped(path: PurePath) -> bool:
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
        try:
            there = sorted(place.iterdir())
        except OSError as error:
            raise DataError(f"{said}: cannot be read ({error.strerror}).") from error
        files = [file.name for file in there if file.is_file()]
        return [place / name for name in files_of_split(files, split, said, there=[file.name for file in there])]
    refuse_split(split, said)
    if place.exists():
        found = [place]
    elif glob.has_magic(path):
        found = [Path(name) for name in sorted(glob.glob(path, recursive=True))]
        found = [file for file in found if file.is_file() and may_hold_rows(file.name)]
        if not found:
            raise DataError(f"{said}: no file matches (seen from {Path.cwd()}).")
    else:
        raise DataError(f"{said}: does not exist (seen from {Path.cwd()}).{near_file(path)}")
    refuse_strangers(found, said)
    return found


def refuse_split(split: str, said: str) -> None:
    """Raise DataError for another split than `train` of what has no splits."""
    if split != "train":
        raise DataError(f"{said}: '{split}' cannot be read: only directories and data sets of the hub have splits.")


def refuse_strangers(files: Iterable[PurePath], said: str) -> None:
    """Raise DataError if one of the files is of no type that llmkit reads."""
    if strangers := [file for file in files if file_type(file) is None]:
        raise DataError(f"{said}: {strangers[0].name} is of no type that llmkit reads; {LEGAL_FILES}.")


def near_file(path: str) -> str:
    """` Did you mean 'x'?` for the nearest name in the directory that `path` points into, or an empty string."""
    folder = Path(path).parent
    return did_you_mean(Path(path).name, [file.name for file in folder.iterdir()]) if folder.is_dir() else ""


def files_of_split(names: Iterable[str], split: str, said: str, *, there: Sequence[str]) -> list[str]:
    """Those of the files `names` of a directory that hold the rows of `split`; see `find_files`.

    Args:
        there: all names in the directory, for messages.
    """
    files = sorted(name for name in names if may_hold_rows(name) and file_type(Path(name)))
    named = [name for name in files if _split_of(name) == split]
    holds = f"it holds: {_names(there)}"
    if named:
        _check_shards(named, said)
    elif split != "train":
        raise DataError(f"{said}: the directory has no file of the split '{split}', such as {split}.jsonl ({holds}).")
    elif others := [name for name in files if _split_of(name).lower() in SPLIT_NAMES]:
        raise DataError(
            f"{said}: the directory has no train.jsonl, or train of another type, but {others[0]}: name a file, or a "
            f"split with data.split ({holds})."
        )
    elif not files:
        raise DataError(f"{said}: the directory has no file that llmkit reads ({holds}); {LEGAL_FILES}.")
    files = named or files
    if len(types := {file_type(Path(name)) for name in files}) > 1:
        raise DataError(
            f"{said}: files of several types ({', '.join(sorted(map(str, types)))}) may hold the same rows; name one "
            f"of them, or a glob ({holds})."
        )
    return files


def splits_of(names: Iterable[str]) -> list[str]:
    """The splits that files of a directory are named after, `train` first; `train` alone, if there are none."""
    found = {_split_of(name) for name in names if may_hold_rows(name) and file_type(Path(name))}
    named = sorted(split for split in found if split.lower() in SPLIT_NAMES)
    return sorted(named, key=lambda split: split != "train") or ["train"]


def may_hold_rows(name: str) -> bool:
    """Whether a file of this name is neither hidden nor one that describes a data set."""
    return not name.startswith(".") and _without_gz(name).lower() not in NEVER_ROWS


def _split_of(name: str) -> str:
    """The file's name without extension and number: `train` for train.jsonl.gz and train-00000-of-00002.parquet."""
    stem = Path(_without_gz(name)).stem
    shard = SHARD.fullmatch(stem)
    return shard["split"] if shard else stem


def _check_shards(files: list[str], said: str) -> None:
    """Refuse a split of which a part is missing, and one that is there whole and in parts."""
    shards = [SHARD.fullmatch(Path(_without_gz(name)).stem) for name in files]
    whole = [name for name, shard in zip(files, shards, strict=True) if shard is None]
    if whole and len(files) > 1:
        raise DataError(f"{said}: {_names(files)} may hold the same rows; name one of them, or a glob.")
    counts = {int(shard["count"]) for shard in shards if shard and shard["count"]}
    if counts and counts != {len(files)}:
        raise DataError(f"{said}: {len(files)} of {max(counts)} parts are there ({_names(files)}).")


def _without_gz(name: str) -> str:
    return name[:-3] if name.lower().endswith(".gz") else name


def _names(files: Iterable[str]) -> str:
    names = sorted(files)
    more = f", and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return (", ".join(names[:NAMES_SHOWN]) or "nothing") + more
