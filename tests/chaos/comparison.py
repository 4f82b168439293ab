"""Whether two runs are the same, bit for bit, in everything but time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmkit import rundir
from llmkit.training.checkpoints import manifest
from llmkit.training.checkpoints.contents import ACCUMULATORS
from llmkit.training.metrics import read_records

# How long something took, and how much memory that process needed for it.
TIMINGS = {"seconds", "device_seconds", "cost", "tokens_per_second", "eval_seconds", "peak_memory_bytes"}
# In a finished run directory nothing else starts with a dot.
HIDDEN = {rundir.LOCK}


def differences(reference: Path, run: Path) -> list[str]:
    """What distinguishes a finished run from the reference, one short line each; empty if nothing does."""
    return [
        *_records(reference, run),
        *_result(reference, run),
        *_final(reference / rundir.FINAL, run / rundir.FINAL),
        *_checkpoints(reference, run),
        *(f"{path.name} was left behind" for path in run.glob(".*") if path.name not in HIDDEN),
        *(f"checkpoints/{path.name} was left behind" for path in (run / rundir.CHECKPOINTS).glob(".*")),
    ]


def unreadable(checkpoint: Path) -> str | None:
    """Why a committed checkpoint cannot be loaded; None if it can."""
    try:
        manifest.verify(checkpoint)
        for file in checkpoint.iterdir():
            _content(file)
    except Exception as error:
        return f"{checkpoint.name} is committed and cannot be loaded: {error}"
    return None


def _records(reference: Path, run: Path) -> Iterator[str]:
    for name in (rundir.METRICS, rundir.SAMPLES):
        ours, theirs = (list(map(_timeless, read_records(folder / name))) for folder in (reference, run))
        if ours != theirs:
            first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
            there = theirs[first] if first < len(theirs) else "nothing"
            yield f"{name}, line {first + 1} of {len(ours)} ({len(theirs)} there): {there}"


def _result(reference: Path, run: Path) -> Iterator[str]:
    ours, theirs = (rundir.read_result(folder) or {} for folder in (reference, run))
    for key in sorted((ours.keys() | theirs.keys()) - TIMINGS):
        if json.dumps(ours.get(key)) != json.dumps(theirs.get(key)):
            yield f"{rundir.RESULT}, {key}: {theirs.get(key)} instead of {ours.get(key)}"


def _final(reference: Path, run: Path) -> Iterator[str]:
    for name in sorted(_names(reference) | _names(run)):
        if not (run / name).is_file() or not (reference / name).is_file():
            yield f"final/{name} is in one of the two only"
        elif (reference / name).read_bytes() != (run / name).read_bytes():
            # PEFT writes sets as they come, in another order in each process (peft 0.21).
            if name.endswith(".json") and _sorted_json(reference / name) == _sorted_json(run / name):
                continue
            yield f"final/{name} differs"


def _checkpoints(reference: Path, run: Path) -> Iterator[str]:
    ours, theirs = ([path.name for path in manifest.committed(folder)] for folder in (reference, run))
    if ours != theirs:
        yield f"checkpoints kept: {theirs} instead of {ours}"
    if not ours or not theirs or ours[-1] != theirs[-1]:
        return
    for file in sorted((reference / rundir.CHECKPOINTS / ours[-1]).iterdir()):
        state = file.suffix in (".pt", ".pth", ".safetensors") or file.name == ACCUMULATORS
        if state and not _same(_content(file), _content(run / rundir.CHECKPOINTS / ours[-1] / file.name)):
            yield f"{ours[-1]}/{file.name} differs"


def _names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")} if folder.is_dir() else set()


def _timeless(record: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in record.items() if key not in TIMINGS})


def _sorted_json(file: Path) -> Any:
    def ordered(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: ordered(item) for key, item in value.items()}
        return sorted(map(ordered, value), key=json.dumps) if isinstance(value, list) else value

    return ordered(json.loads(file.read_text(encoding="utf-8")))


def _content(file: Path) -> Any:
    """What a file of a checkpoint holds, read as training reads it."""
    import torch
    from safetensors.torch import load_file
    from transformers.trainer_pt_utils import safe_globals

    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix in (".pt", ".pth"):
        with safe_globals():
            return torch.load(file, weights_only=True)
    text = file.read_text(encoding="utf-8")
    return json.loads(text) if file.suffix == ".json" else text


def _same(ours: Any, theirs: Any) -> bool:
    """Equal to the last bit, -0.0 and NaN told apart as well."""
    import torch

    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(_same(value, theirs[key]) for key, value in ours.items())
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(ours, torch.Tensor):
        alike = ours.dtype == theirs.dtype and ours.shape == theirs.shape
        return alike and _same(*(tensor.reshape(-1).view(torch.uint8).numpy() for tensor in (ours, theirs)))
    if isinstance(ours, np.ndarray):
        return ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()
    return repr(ours) == repr(theirs)
