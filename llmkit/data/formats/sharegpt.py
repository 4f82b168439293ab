"""Turns of {"from", "value"}, as messages of the internal form."""

from typing import Any

from llmkit.data.examples import Message
from llmkit.data.formats.columns import Misfit, not_text, shown
from llmkit.data.formats.tool_calls import read_calls
from llmkit.data.formats.turns import Turns, collect, is_learnt, unknown_role

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",  # its value is the call, or a list of them, as JSON text
    "observation": "tool",
    "tool": "tool",
}


def read_sharegpt_turns(turns: Any, where: str) -> Turns:
    """The turns of a list of {"from", "value"}. Raises Misfit that names the turn."""
    return collect(turns, where, _read_turn)


def _read_turn(turn: Any, where: str) -> tuple[list[Message], bool]:
    if not isinstance(turn, dict) or turn.get("from") is None:
        advice = ""
        if isinstance(turn, dict) and turn.get("role") is not None:
            advice = " Turns of 'role' and 'content' are the format messages: data.columns={messages: conversations}."
        raise Misfit(f"{where}: a turn needs 'from' and 'value', found {shown(turn)}.{advice}")
    speaker, value = turn["from"], turn.get("value")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise unknown_role(speaker, tuple(ROLES), where)
    learnt = len(turn) == 2 or is_learnt(turn, where)
    if speaker == "function_call":
        return [{"role": "assistant", "content": "", "tool_calls": read_calls(value, where)}], learnt
    if not isinstance(value, str):
        raise Misfit(not_text(f"{where}: 'value'", value))
    return [{"role": ROLES[speaker], "content": value}], learnt
