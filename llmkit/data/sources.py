"""Where rows come from: a JSON Lines file, a directory of them, the hub, or the shipped demo."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
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
    rows = _limited(_training_rows(data), data.limit)
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


def _limited(rows: Iterator[Row], limit: int | None) -> list[Row]:
    return [row for _, row in zip(range(limit), rows, strict=False)] if limit else list(rows)


def shipped_demo(split: str) -> Path:
    """The demo's file for `train` or `validation`."""
    return Path(str(resources.files("llmkit.data") / "demo" / f"{split}.jsonl"))


def read_jsonl(path: Path) -> Iterator[Row]:
    """The objects of a JSON Lines file. Raises DataError with file and line for anything else."""
    if not path.is_file():
        raise DataError(f"{path}: does not exist.")
    with path.open(encoding="utf-8") as lines:
        number = 0
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield Row(_parse(line, path, number), str(path), number)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {number + 1}: not UTF-8 text ({error.reason}).") from error


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        hint = " A JSON array is not JSON Lines: write one object a line." if number == 1 and line.strip() == "[" else ""
        raise DataError(
            f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}): {line.strip()[:200]}{hint}"
        ) from error
    if not isinstance(values, dict):
        raise DataError(f"{path}, line {number}: a JSON object is expected, found: {line.strip()[:200]}")
    return values


def _hub_rows(data: DataConfig) -> Iterator[Row]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        split = datasets.load_dataset(data.hub_id, data.hub_config, split="train")
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ConfigError(
            f"data.hub_id={data.hub_id}: not in the local cache and not to be had from the hub "
            f"({str(error).strip().splitlines()[0]}). With a copy on disk: data.path=DIR."
        ) from error
    for number, values in enumerate(split):
        yield Row(values, str(data.hub_id), number)
