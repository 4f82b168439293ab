"""The formats of conversations and of plain text: a row's columns -> Conversation."""

from llmkit.data.examples import Conversation, Message
from llmkit.data.formats.columns import Misfit, Values, optional_text, required, shown, text
from llmkit.data.formats.sharegpt import read_sharegpt_turns
from llmkit.data.formats.tool_calls import parsed
from llmkit.data.formats.turns import add_columns, read_turns, text_or_turns


def from_messages(values: Values) -> Conversation:
    """{"messages": [{"role", "content"}, ...]}."""
    return add_columns(values, read_turns(required(values, "messages"), "'messages'"))


def from_sharegpt(values: Values) -> Conversation:
    """{"conversations": [{"from", "value"}, ...]}."""
    return add_columns(values, read_sharegpt_turns(required(values, "conversations"), "'conversations'"))


def from_prompt_completion(values: Values) -> Conversation:
    """{"prompt", "completion"}, each a text or a list of turns."""
    prompt, prompt_learnt = text_or_turns(values, "prompt", "user")
    completion, completion_learnt = text_or_turns(values, "completion", "assistant")
    learnt = None
    if prompt_learnt or completion_learnt:
        learnt = (prompt_learnt or [True] * len(prompt)) + (completion_learnt or [True] * len(completion))
    return add_columns(values, (prompt + completion, learnt), prompt_turns=len(prompt))


def from_alpaca(values: Values) -> Conversation:
    """{"instruction", "input", "output", "history"}; the input follows the instruction on a new line."""
    messages: list[Message] = []
    history = values.get("history") or []
    if isinstance(history, str):  # a cell of a CSV file
        history = parsed(history, "'history'")
    if not isinstance(history, list):
        raise Misfit(f"'history' must be a list of pairs [user, assistant], found {shown(history)}.")
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(words, str) for words in pair):
            raise Misfit(f"'history' must hold pairs [user, assistant] of texts, found {shown(pair)}.")
        messages += _exchange(*pair)
    instruction, given = text(values, "instruction"), optional_text(values, "input")
    question = f"{instruction}\n{given}" if instruction and given else instruction or given
    messages += _exchange(question, text(values, "output"))
    return add_columns(values, (messages, None), prompt_turns=len(messages) - 1)


def from_question_answer(values: Values) -> Conversation:
    """{"question", "answer"}."""
    messages = _exchange(text(values, "question"), text(values, "answer"))
    return add_columns(values, (messages, None), prompt_turns=1)


def from_text(values: Values) -> Conversation:
    """{"text"}: learnt whole."""
    return Conversation(messages=[], text=text(values, "text"))


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
