"""One config field: its default, its one sentence of documentation and its legal range, declared in one place."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any


def setting(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[Any] | None = None,
    text: bool = False,
) -> Any:
    """A dataclass field with `doc` (one sentence, with the unit) and the values that are legal.

    The command line takes the value of a text field as typed, `=` and commas included; `text` marks one whose type does
    not tell.
    """
    metadata = {"doc": doc, "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices, "text": text}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def legal_values(field: dataclasses.Field) -> str:
    """What `field` may hold, in words: `one of a, b`, `at least 0 and less than 1`; empty if anything goes."""
    meta = field.metadata
    if meta.get("choices"):
        return "one of " + ", ".join(str(choice) for choice in meta["choices"])
    words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
    return " and ".join(f"{words[key]} {meta[key]:,}" for key in words if meta.get(key) is not None)


def is_legal(field: dataclasses.Field, value: Any) -> bool:
    """Whether `value`, or each value of a list, lies in the range declared for `field`; None (unset) always does."""
    meta = field.metadata
    if value is None:
        return True
    if meta.get("choices"):
        return all(one in meta["choices"] for one in (value if isinstance(value, list) else [value]))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    return (
        math.isfinite(value)
        and (meta.get("gt") is None or value > meta["gt"])
        and (meta.get("ge") is None or value >= meta["ge"])
        and (meta.get("lt") is None or value < meta["lt"])
        and (meta.get("le") is None or value <= meta["le"])
    )
