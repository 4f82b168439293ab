"""Which characters of a rendered conversation are answers: only these are learnt.

The template alone knows what it writes around a turn, so it is asked: a conversation up to an answer, and up to its
end, rendered apart, mark where that answer lies in the whole.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from llmkit.data.formats import Message
from llmkit.errors import DataError

Span = tuple[int, int]


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, prompt: bool = False) -> str:
    """The conversation as text; `prompt` ends it where the model is to answer."""
    text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return text


def answer_spans(tokenizer: PreTrainedTokenizerBase, messages: list[Message], text: str) -> list[Span]:
    """The (start, end) characters in `text`, the rendered conversation, of every assistant turn and its end marker.

    Raises DataError if the template rewrites earlier turns so that an answer cannot be found again.
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        head = render(tokenizer, messages[:index], prompt=True)
        through = text if index == len(messages) - 1 else render(tokenizer, messages[: index + 1])
        # What a template writes after the end marker (a line break) is not the model's to learn.
        end = len(through.rstrip())
        if not text.startswith(head) or not text.startswith(through[:end]):
            raise DataError(
                "the chat template renders an earlier turn differently once another follows, so its answers cannot "
                "be told from the prompt; use conversations of one answer, or another data.chat_template."
            )
        spans.append((len(head), end))
    return spans
