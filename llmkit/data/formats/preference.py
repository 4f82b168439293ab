"""The formats of preference data: a row's columns -> Preference."""

from llmkit.data.examples import Message, Preference
from llmkit.data.formats.columns import Misfit, Values, optional_text, required, shown
from llmkit.data.formats.sharegpt import read_sharegpt_turns
from llmkit.data.formats.tool_calls import read_tools
from llmkit.data.formats.turns import Turns, read_turns, text_or_turns, with_system


def from_preference_messages(values: Values) -> Preference:
    """{"prompt_messages", "chosen_messages", "rejected_messages"}; without the first, the other two begin alike."""
    prompt = None
    if values.get("prompt_messages") not in (None, ""):
        prompt = _turns(read_turns(values["prompt_messages"], "'prompt_messages'"))
    chosen, rejected = (
        _turns(read_turns(required(values, name), f"'{name}'")) for name in ("chosen_messages", "rejected_messages")
    )
    return _preference(values, prompt, chosen, rejected)


def from_preference(values: Values) -> Preference:
    """{"prompt", "chosen", "rejected"}, each a text or turns; without a prompt, two conversations that begin alike."""
    chosen, rejected = (_turns(text_or_turns(values, name, "assistant")) for name in ("chosen", "rejected"))
    prompt = None
    if values.get("prompt") is not None:
        prompt = _turns(text_or_turns(values, "prompt", "user"))
        if isinstance(values["prompt"], str):
            prompt = _turns_around(prompt, chosen, rejected)
    elif isinstance(values["chosen"], str) or isinstance(values["rejected"], str):
        raise Misfit(
            "'chosen' and 'rejected' are texts, and there is no column 'prompt'. Name its column "
            "(data.columns={prompt: THEIRS}), or give whole conversations as lists of turns."
        )
    return _preference(values, prompt, chosen, rejected)


def from_preference_sharegpt(values: Values) -> Preference:
    """{"conversations", "chosen", "rejected"}: the prompt's turns, and each answer as a turn, or several."""
    prompt = _turns(read_sharegpt_turns(required(values, "conversations"), "'conversations'"))
    answers = []
    for name in ("chosen", "rejected"):
        value = required(values, name)
        answers.append(_turns(read_sharegpt_turns(value if isinstance(value, list) else [value], f"'{name}'")))
    return _preference(values, prompt, *answers)


def _preference(
    values: Values, prompt: list[Message] | None, chosen: list[Message], rejected: list[Message]
) -> Preference:
    """The triple, once nothing of the prompt is left in the answers. Raises Misfit for one that teaches nothing."""
    if chosen == rejected:
        raise Misfit("chosen and rejected are equal: there is nothing to prefer.")
    if prompt is None:
        prompt = chosen[: _common(chosen, rejected)]
        if not prompt:
            raise Misfit("chosen and rejected have no first turn in common: there is no prompt.")
        if len(prompt) in (len(chosen), len(rejected)):
            raise Misfit("one of chosen and rejected is the beginning of the other: it has no answer of its own.")
    repeated = len(prompt) if chosen[: len(prompt)] == prompt == rejected[: len(prompt)] else 0
    chosen, rejected = chosen[repeated:], rejected[repeated:]
    if not any(message["content"].strip() for message in prompt):
        raise Misfit("the prompt is empty.")
    _check_answer("chosen", chosen)
    _check_answer("rejected", rejected)
    prompt, _ = with_system((prompt, None), optional_text(values, "system"))
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected, tools=read_tools(values.get("tools")))


def _check_answer(name: str, turns: list[Message]) -> None:
    if not turns:
        raise Misfit(f"{name} has no turn after the prompt.")
    if turns[0]["role"] != "assistant":
        raise Misfit(
            f"{name} must begin with the assistant, or repeat the whole prompt before it; after the prompt it begins "
            f"with the {turns[0]['role']}: {shown(turns[0]['content'])}."
        )
    if not any(turn["content"].strip() or turn.get("tool_calls") for turn in turns if turn["role"] == "assistant"):
        raise Misfit(f"{name} is empty.")


def _turns_around(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The prompt's turns, where text stands for the question of two whole conversations; else the text's own turn."""
    shared = chosen[: _common(chosen, rejected)]
    return shared if prompt[0] in shared else prompt


def _common(chosen: list[Message], rejected: list[Message]) -> int:
    """How many leading turns are the same in both."""
    pairs = zip(chosen, rejected, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(chosen), len(rejected)))


def _turns(turns: Turns) -> list[Message]:
    messages, learnt = turns
    if learnt is not None and not all(learnt):
        raise Misfit("a turn has the weight 0, but a preference is over whole answers; leave the weights out.")
    return messages
