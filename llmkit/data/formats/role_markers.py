"""Conversations written as one text with inline markers: <USER>...</USER><ASSISTANT>...</ASSISTANT>."""

import re

from llmkit.data.examples import Conversation, Message
from llmkit.data.formats.columns import Misfit, Values, text
from llmkit.data.formats.turns import add_columns
from llmkit.errors import did_you_mean

# Names of a marker, in any case -> role.
MARKERS = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
}
SHOWN = 40  # characters of the text after the place that a message names

_ANY = re.compile(r"<(/?)([A-Za-z_]+)>")
_KNOWN = re.compile(rf"<(/?)({'|'.join(MARKERS)})>", re.IGNORECASE)


def from_role_markers(values: Values) -> Conversation:
    """{"input": "<USER>...</USER><ASSISTANT>...</ASSISTANT>"}; what stands between two markers is kept as it is."""
    return add_columns(values, (_read_marked(text(values, "input")), None))


def begins_with_marker(values: Values) -> bool:
    """Whether the column `input` looks like a text with markers, known ones or not."""
    value = values.get("input")
    return isinstance(value, str) and _ANY.match(value.lstrip()) is not None


def _read_marked(marked: str) -> list[Message]:
    messages: list[Message] = []
    position, end = _skip_space(marked, 0), len(marked.rstrip())
    while position < end:
        opening = _ANY.match(marked, position)
        if opening is None or opening[1]:
            raise Misfit(f"'input': only a marker such as <USER> may begin a turn{_at(marked, position)}.")
        name = opening[2].lower()
        if name not in MARKERS:
            known = ", ".join(MARKERS).upper()
            near = did_you_mean(name, MARKERS).upper().replace("DID YOU MEAN", "Did you mean")
            raise Misfit(f"'input': marker <{opening[2]}> is not one of {known}{_at(marked, position)}.{near}")
        closing = _KNOWN.search(marked, opening.end())
        if closing is None or not closing[1] or closing[2].lower() != name:
            before = f" before {closing[0]}{_at(marked, closing.start())}" if closing else ""
            raise Misfit(f"'input': {opening[0]}{_at(marked, position)} is not closed{before}.")
        messages.append({"role": MARKERS[name], "content": marked[opening.end() : closing.start()]})
        position = _skip_space(marked, closing.end())
    if not messages:
        raise Misfit("'input' holds no turn.")
    return messages


def _skip_space(marked: str, position: int) -> int:
    while position < len(marked) and marked[position].isspace():
        position += 1
    return position


def _at(marked: str, position: int) -> str:
    """Where in the text, for a message; characters count from 1."""
    return f" (character {position + 1:,}: {marked[position : position + SHOWN]!r})"
