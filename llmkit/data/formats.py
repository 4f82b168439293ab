"""Every layout of a row becomes one internal form: a list of messages, {"role", "content"}, the last an answer."""

from collections.abc import Callable
from typing import Any

from llmkit.data.sources import Row
from llmkit.errors import DataError

Message = dict[str, str]
ROLES = ("system", "user", "assistant")
UNSUPPORTED = ("tool_calls", "reasoning_content")  # keys of a turn that a template would write out


def to_messages(rows: list[Row], layout: str) -> list[list[Message]]:
    """Convert all rows; `layout` is a format's name or `auto`, which looks at the first row's columns.

    Raises DataError with file, row, what is expected and what was found.
    """
    name = detect_format(rows[0]) if layout == "auto" else layout
    convert = FORMATS[name][1]
    conversations = [convert(row) for row in rows]
    for row, messages in zip(rows, conversations, strict=True):
        if messages[0]["role"] == "assistant":
            raise DataError(f"{row.place()}: a conversation begins with a user or system turn, not with an answer.")
    return conversations


def detect_format(row: Row) -> str:
    """The format whose columns `row` has."""
    for name, (columns, _) in FORMATS.items():
        if set(columns) <= row.values.keys():
            return name
    known = "; ".join(f"{name}: {', '.join(columns)}" for name, (columns, _) in FORMATS.items())
    raise DataError(f"{row.place()}: no known format. Found the columns {_columns(row)}; expected one of: {known}.")


def _from_messages(row: Row) -> list[Message]:
    messages = _column(row, "messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{row.place()}: 'messages' must be a list of turns, found {_short(messages)}.")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f"{row.place()}: a turn needs 'role' and 'content', found {_short(message)}.")
        if message["role"] not in ROLES:
            raise DataError(f"{row.place()}: role '{message['role']}' is not one of {', '.join(ROLES)}.")
        if not isinstance(message["content"], str):
            raise DataError(f"{row.place()}: 'content' must be text, found {_short(message['content'])}.")
        for key in UNSUPPORTED:
            if message.get(key):
                raise DataError(
                    f"{row.place()}: a turn has '{key}', which llmkit does not train on yet; it would be lost."
                )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _from_question_answer(row: Row) -> list[Message]:
    question, answer = _column(row, "question"), _column(row, "answer")
    for column, value in (("question", question), ("answer", answer)):
        if not isinstance(value, str):
            raise DataError(f"{row.place()}: '{column}' must be text, found {_short(value)}.")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# Format -> its columns, its converter. Detection tries them in this order.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Row], list[Message]]]] = {
    "messages": (("messages",), _from_messages),
    "question_answer": (("question", "answer"), _from_question_answer),
}


def _column(row: Row, name: str) -> Any:
    if name not in row.values:
        raise DataError(f"{row.place()}: expected the column '{name}', found {_columns(row)}.")
    return row.values[name]


def _columns(row: Row) -> str:
    return ", ".join(f"'{name}'" for name in row.values) or "none"


def _short(value: Any) -> str:
    return repr(value)[:200]
