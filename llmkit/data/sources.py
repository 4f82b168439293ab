"""Where rows come from: a JSON Lines file, a directory of them, the hub, or the shipped demo."""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from llmkit.config.schema import DataConfig
from llmkit.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One raw row and where it stands, for messages."""

    values: dict[str, Any]
    source: str
    number: int  # line of the file (from 1), or index in the hub's split

    def place(self) -> str:
        """`FILE, row N`."""
        return f"{self.source}, row {self.number}"


def read_training_rows(data: DataConfig) -> list[Row]:
    """The rows to train on, `data.limit` applied. Raises DataError for a file that is missing, empty or broken."""
    rows = list(islice(_training_rows(data), data.limit))
    if not rows:
        raise DataError(f"{data.path or data.hub_id}: holds no rows.")
    return rows


def read_validation_rows(path: str) -> list[Row]:
    """The rows of a held-out file. Raises DataError as above."""
    file = shipped_demo("validation") if path == "demo" else Path(path)
    rows = list(read_jsonl(file))
    if not rows:
        raise DataError(f"data.validation={path}: holds no rows.")
    return rows


def _training_rows(data: DataConfig) -> Iterator[Row]:
    if data.path == "demo":
        return read_jsonl(shipped_demo("train"))
    if data.path is None:
        return _hub_rows(data)
    path = Path(data.path)
    if path.is_dir():
        file = path / "train.jsonl"
        if not file.is_file():
            found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
            raise DataError(f"data.path={path}: the directory has no train.jsonl (it holds: {found}).")
        return read_jsonl(file)
    return read_jsonl(path)


def shipped_demo(split: str) -> Path:
    """The demo's file for `train` or `validation`."""
    return Path(str(resources.files("llmkit.data") / "demo" / f"{split}.jsonl"))


def read_jsonl(path: Path) -> Iterator[Row]:
    """The objects of a JSON Lines file, without blank lines. Raises DataError with file and line for anything else."""
    try:
        with path.open("rb") as lines:  # bytes: a text file is decoded in blocks, and the line at fault stays unknown
            for number, line in enumerate(lines, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield Row(_parse(line, f"{path}, line {number}", first=number == 1), str(path), number)
    except FileNotFoundError as error:
        raise DataError(f"{path}: does not exist.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


def _parse(line: bytes, place: str, *, first: bool) -> dict[str, Any]:
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text ({error.reason} at byte {error.start + 1}).") from error
    hint = " A JSON array is not JSON Lines: write one object a line." if first and text.startswith("[") else ""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error.msg} at column {error.colno}): {text[:200]}{hint}") from error
    if not isinstance(values, dict):
        raise DataError(f"{place}: a JSON object is expected, found: {text[:200]}{hint}")
    if "\\u" in text:
        try:
            json.dumps(values, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{place}: holds half a surrogate pair (\\ud800 to \\udfff), which is not text.") from error
    return values


def _hub_rows(data: DataConfig) -> Iterator[Row]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        split = datasets.load_dataset(data.hub_id, data.hub_config, split="train")
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ConfigError(
            f"data.hub_id={data.hub_id} cannot be loaded: {str(error).strip().splitlines()[0]} With a network: check "
            "HF_ENDPOINT and HF_HUB_OFFLINE, and HF_TOKEN if it is gated or private. Without: copy it here and use "
            "data.path=DIR."
        ) from error
    for number, values in enumerate(split):
        yield Row(values, str(data.hub_id), number)
