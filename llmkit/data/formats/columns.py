"""The values of a row's columns, checked for their kind: what each format reads through."""

from collections.abc import Mapping
from typing import Any

from llmkit.errors import did_you_mean

Values = Mapping[str, Any]  # a row's columns under our names
SHOWN = 100  # characters of a wrong value that a message shows


class Misfit(Exception):
    """What keeps a row out of its format, in words; `formats.convert` adds which row and which format."""


def text(values: Values, name: str) -> str:
    """The text in column `name`. Raises Misfit if it is missing, null or something else."""
    value = values.get(name)
    if isinstance(value, str):
        return value
    raise Misfit(not_text(f"'{name}'", required(values, name)))


def optional_text(values: Values, name: str) -> str:
    """The text in column `name`; empty where the column is missing or null. Raises Misfit for anything else."""
    return "" if values.get(name) is None else text(values, name)


def required(values: Values, name: str) -> Any:
    """Whatever column `name` holds. Raises Misfit if it is missing."""
    if name not in values:
        raise Misfit(f"the column '{name}' is missing.{did_you_mean(name, values)}")
    return values[name]


def not_text(where: str, value: Any) -> str:
    """The complaint that `where` must be text. A number has more than one spelling (2, 2.0): its writer chooses."""
    hint = f' Write it as text: "{value}".' if isinstance(value, int | float) and not isinstance(value, bool) else ""
    return f"{where} must be text, found {shown(value)}.{hint}"


def shown(value: Any) -> str:
    """`value` as a message shows it: as JSON has it for what is no container, and not too long."""
    if value is None:
        return "null"
    spelled = repr(value)
    return spelled if len(spelled) <= SHOWN else spelled[:SHOWN] + "…"
