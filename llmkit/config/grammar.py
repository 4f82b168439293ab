"""Hydra's override grammar: splitting `key=value`, and writing Python values in it."""

import re
from typing import Any


def split_override(override: str) -> tuple[str, str]:
    """`key=value` -> (key, value); the prefixes `+`, `++` and `~` are taken off the key."""
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def to_grammar(value: Any) -> str:
    """A Python value in Hydra's override grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ",".join(to_grammar(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{to_grammar(item)}" for key, item in value.items()) + "}"
    text = str(value)
    # In Hydra's quoted strings a backslash escapes only a quote, or backslashes in front of one.
    text = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", text)
    text = re.sub(r"(\\+)$", lambda match: match[1] * 2, text)
    return f"'{text}'"
