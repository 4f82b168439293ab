"""Lists of turns, {"role", "content"}, as messages of the internal form; with what the row says about learning them."""

from collections.abc import Callable, Mapping
from typing import Any

from llmkit.data.examples import Conversation, Message
from llmkit.data.formats.columns import Misfit, Values, not_text, optional_text, required, shown
from llmkit.data.formats.parts import read_parts
from llmkit.data.formats.tool_calls import parsed, read_calls, read_tools
from llmkit.errors import did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool")
# What others call the roles: told to a writer, but taken only by the formats that define them.
SYNONYMS = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "chatgpt": "assistant",
    "ipython": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
REASONING = ("reasoning_content", "reasoning", "thinking")
WEIGHTS = ("loss_weight", "weight", "train")
MEDIA = ("images", "image", "audios", "audio", "videos", "video")

Turns = tuple[list[Message], list[bool] | None]  # messages, and which are learnt (None: all)


def read_turns(turns: Any, where: str) -> Turns:
    """The turns of a list of {"role", "content"}, or of JSON text of one. Raises Misfit that names the turn."""
    if isinstance(turns, list) and turns and all(map(_is_plain, turns)):
        return turns, None  # nothing to change, as in most chats
    return collect(turns, where, _read_turn)


def collect(turns: Any, where: str, read: Callable[[Any, str], tuple[list[Message], bool]]) -> Turns:
    """The messages that `read` makes of each turn, and whether they are learnt. Raises Misfit."""
    if isinstance(turns, str) and turns.startswith("["):  # a cell of a CSV file
        turns = parsed(turns, where)
    if not isinstance(turns, list) or not turns:
        raise Misfit(f"{where} must be a list of turns, found {shown(turns)}.")
    messages: list[Message] = []
    learnt: list[bool] = []
    for index, turn in enumerate(turns):
        of_turn, flag = read(turn, f"{where}, turn {index}")
        messages += of_turn
        learnt += [flag] * len(of_turn)
    return messages, None if all(learnt) else learnt


def with_system(turns: Turns, system: str) -> Turns:
    """The turns after a system prompt from a column of its own. Raises Misfit if they have one already."""
    messages, learnt = turns
    if not system:
        return turns
    if messages[0]["role"] == "system":
        raise Misfit("the column 'system' and the first turn are both a system prompt; keep one.")
    return [{"role": "system", "content": system}, *messages], None if learnt is None else [True, *learnt]


def text_or_turns(values: Values, name: str, role: str) -> Turns:
    """Column `name`: a list of turns, a single one, or a text, which is a turn of `role`. Raises Misfit."""
    value = required(values, name)
    if isinstance(value, str):
        return [{"role": role, "content": value}], None
    if not isinstance(value, list | dict):
        raise Misfit(f"'{name}' must be text or a list of turns, found {shown(value)}.")
    return read_turns(value if isinstance(value, list) else [value], f"'{name}'")


def add_columns(values: Values, turns: Turns, *, prompt_turns: int | None = None) -> Conversation:
    """The conversation, with what the columns `system` and `tools` add to its turns. Raises Misfit."""
    system, tools = values.get("system"), values.get("tools")
    if system:
        turns = with_system(turns, optional_text(values, "system"))
        prompt_turns = None if prompt_turns is None else prompt_turns + 1
    return Conversation(
        messages=turns[0], tools=read_tools(tools) if tools else None, learnt=turns[1], prompt_turns=prompt_turns
    )


def is_learnt(turn: Mapping[str, Any], where: str) -> bool:
    """Whether the row lets this turn be learnt, as it does unless it says otherwise. Raises Misfit."""
    said: dict[str, bool] = {}
    for key in WEIGHTS:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            legal = "true or false" if key == "train" else "0 (not learnt) or 1 (learnt)"
            raise Misfit(f"{where}: '{key}' is {legal}; llmkit knows no other weights. Found {shown(value)}.")
        said[key] = bool(value)
    if len(set(said.values())) > 1:
        raise Misfit(f"{where}: {' and '.join(repr(key) for key in said)} contradict each other.")
    return all(said.values())


def unknown_role(role: Any, known: tuple[str, ...], where: str) -> Misfit:
    """The complaint about a role that is not one of `known`."""
    near = did_you_mean(role, known) if isinstance(role, str) else ""
    if isinstance(role, str) and SYNONYMS.get(role.lower()) in known:
        near = f" Did you mean '{SYNONYMS[role.lower()]}'?"
    return Misfit(f"{where}: role {shown(role)} is not one of {', '.join(known)}.{near}")


def _is_plain(turn: Any) -> bool:
    """Whether the turn is a message already."""
    return (
        turn.__class__ is dict
        and len(turn) == 2
        and turn.get("content").__class__ is str
        and turn.get("role") in ("user", "assistant", "system", "developer")
    )


def _read_turn(turn: Any, where: str) -> tuple[list[Message], bool]:
    if isinstance(turn, dict):
        turn = {key: value for key, value in turn.items() if value is not None}
    if _is_plain(turn):
        return [turn], True
    if not isinstance(turn, dict) or "role" not in turn:
        advice = ""
        if isinstance(turn, dict) and "from" in turn:
            advice = " Turns of 'from' and 'value' are the format sharegpt: data.columns={conversations: messages}."
        raise Misfit(f"{where}: a turn needs 'role' and 'content', found {shown(turn)}.{advice}")
    role = "tool" if turn["role"] == "function" else turn["role"]  # OpenAI's older name
    if role not in ROLES:
        raise unknown_role(role, ROLES, where)
    for key in MEDIA:
        if turn.get(key):
            raise Misfit(f"{where}: has '{key}'; llmkit trains on text only.")
    if turn.get("tool_call"):
        raise Misfit(f"{where}: has 'tool_call'. Did you mean 'tool_calls', a list?")
    if isinstance(turn.get("content"), list):
        messages = read_parts(turn["content"], role, where)
    else:
        messages = [{"role": role, "content": turn.get("content")}]
    _add_reasoning(messages, turn, where)
    _add_calls(messages, turn, where)
    for message in messages:
        if message["role"] == role:
            for key in ("name", "tool_call_id") if role == "tool" else ("name",):
                if key in turn:
                    message.setdefault(key, turn[key])
        _check_texts(message, turn, where)
    return messages, is_learnt(turn, where)


def _add_reasoning(messages: list[Message], turn: dict[str, Any], where: str) -> None:
    said = {key: turn[key] for key in REASONING if turn.get(key)}
    if not said:
        return
    key, reasoning = next(iter(said.items()))
    if len(set(map(repr, said.values()))) > 1:
        raise Misfit(f"{where}: {' and '.join(repr(key) for key in said)} differ; keep one.")
    if not isinstance(reasoning, str):
        raise Misfit(not_text(f"{where}: '{key}'", reasoning))
    if messages[0]["role"] != "assistant":
        raise Misfit(f"{where}: has '{key}', but only the assistant reasons.")
    if "reasoning_content" in messages[0]:
        raise Misfit(f"{where}: has '{key}' and a part of reasoning; keep one.")
    messages[0]["reasoning_content"] = reasoning


def _add_calls(messages: list[Message], turn: dict[str, Any], where: str) -> None:
    key = "tool_calls" if turn.get("tool_calls") else "function_call"  # OpenAI's older name
    if not turn.get(key):
        return
    if messages[-1]["role"] != "assistant":
        raise Misfit(f"{where}: has '{key}', but only the assistant calls tools.")
    if any("tool_calls" in message for message in messages) or len(messages) > 1:
        raise Misfit(f"{where}: has '{key}' and parts of calls or results; keep one.")
    messages[-1]["tool_calls"] = read_calls(turn[key], f"{where}, '{key}'")


def _check_texts(message: Message, turn: dict[str, Any], where: str) -> None:
    if message["content"] is None:
        if not message.get("tool_calls") and not message.get("reasoning_content"):
            raise Misfit(f"{where}: a turn needs 'role' and 'content', found {shown(turn)}.")
        message["content"] = ""  # as servers hand it to the template
    for key in ("content", "name", "tool_call_id"):
        if not isinstance(message.get(key, ""), str):
            raise Misfit(not_text(f"{where}: '{key}'", message[key]))
