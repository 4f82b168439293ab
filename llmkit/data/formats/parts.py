"""Content as a list of parts: text, reasoning, tool calls and their results, as messages of the internal form."""

import json
from typing import Any

from llmkit.data.examples import Message
from llmkit.data.formats.columns import Misfit, not_text, shown
from llmkit.data.formats.tool_calls import read_calls, without_nulls
from llmkit.errors import did_you_mean

# Names of a part's type -> what it is.
KINDS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "reasoning": "reasoning",
    "thinking": "reasoning",
    "tool_call": "call",
    "tool_calls": "call",
    "tool_use": "call",
    "tool_result": "result",
    "tool_response": "result",
    "tool_output": "result",
}
MEDIA = ("image", "audio", "video", "file")
# A template writes an assistant's turn in this order.
ORDER = {"reasoning": 0, "text": 1, "call": 2}


def read_parts(parts: list[Any], role: str, where: str) -> list[Message]:
    """The messages that one turn of `role` is: a result of a tool stands between the assistant's words. Raises Misfit.

    Texts that follow each other are joined as they are.
    """
    messages: list[Message] = []
    previous = "result"
    for index, part in enumerate(parts):
        place = f"{where}, part {index}"
        kind = _kind(part, place)
        if kind == "result":
            messages.append(_result(part, place))
        else:
            if previous == "result":
                messages.append({"role": role, "content": None})
            elif ORDER[kind] < ORDER[previous]:
                raise Misfit(
                    f"{place}: {part['type']} follows {parts[index - 1]['type']}, but a turn is written as reasoning, "
                    "text, tool calls; begin a new turn there."
                )
            _add(messages[-1], kind, part, place)
        previous = kind
    return messages or [{"role": role, "content": ""}]


def _kind(part: Any, where: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise Misfit(f"{where} must be a mapping with a 'type', found {shown(part)}.")
    if part["type"] in KINDS:
        return KINDS[part["type"]]
    if any(medium in part["type"] for medium in MEDIA):
        raise Misfit(f"{where} is of the type '{part['type']}'; llmkit trains on text only.")
    known = did_you_mean(part["type"], KINDS)
    raise Misfit(f"{where}: type '{part['type']}' is not one of {', '.join(KINDS)}.{known}")


def _add(message: Message, kind: str, part: dict[str, Any], where: str) -> None:
    if kind == "text":
        message["content"] = (message["content"] or "") + _text(part, where)
    elif message["role"] != "assistant":
        raise Misfit(f"{where}: a {part['type']} in a turn of the {message['role']}; only the assistant has them.")
    elif kind == "reasoning":
        message["reasoning_content"] = message.get("reasoning_content", "") + _text(part, where)
    else:
        payload = _payload(part, "text", "value", part["type"])
        calls = read_calls(part if payload is None else payload, where)
        if part.get("id") is not None:
            calls[0].setdefault("id", part["id"])
        message["tool_calls"] = message.get("tool_calls", []) + calls


def _result(part: dict[str, Any], where: str) -> Message:
    value = without_nulls(_payload(part, "text", "value", part["type"], "content", "output"))
    if value is None:
        raise Misfit(f"{where}: a {part['type']} without text, found {shown(part)}.")
    if isinstance(value, list) and all(isinstance(item, dict) and item.get("type") == "text" for item in value):
        value = "".join(_text(item, where) for item in value)
    message = {"role": "tool", "content": value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}
    for name, keys in {"tool_call_id": ("tool_call_id", "tool_use_id", "id"), "name": ("name",)}.items():
        if (own := _payload(part, *keys)) is not None:
            message[name] = own
    return message


def _text(part: dict[str, Any], where: str) -> str:
    value = _payload(part, "text", "value", part["type"])
    if not isinstance(value, str):
        raise Misfit(not_text(f"{where}: 'text' or 'value'", value))
    return value


def _payload(part: dict[str, Any], *keys: str) -> Any:
    """The first of the keys that holds something; else an empty text if one holds that, or None."""
    values = [part[key] for key in keys if part.get(key) is not None]
    return next((value for value in values if value != ""), "" if values else None)
