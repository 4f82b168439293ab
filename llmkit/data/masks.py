"""Which characters of a rendered conversation are answers: only these are learnt.

The template alone knows what it writes around a turn, so it is asked: a conversation up to an answer, and up to its
end, rendered apart, mark where that answer lies in the whole. Templates that write an earlier turn differently once
another follows (Qwen3 drops the thinking of all but the last) need a closer look; what is then found is verbatim.
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
    """The (start, end) characters in `text`, the rendered conversation, of the assistant's turns and their end markers.

    Raises DataError if an answer cannot be found again, or if the template leaves its text out.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    found = [
        _rendered_span(tokenizer, messages, i, text) or _verbatim_span(tokenizer, messages, i, text) for i in answers
    ]
    spans = [span for span in found if span]
    if len(spans) < len(answers):
        spans = _marked_spans(tokenizer, messages, text)
    if len(spans) < len(answers):
        raise DataError(
            "the chat template renders an earlier turn differently once another follows, so its answers cannot "
            "be told from the prompt; use conversations of one answer, or another data.chat_template."
        )
    learnt = "".join(text[start:end] for start, end in spans)
    for words in (messages[index]["content"].split() for index in answers):
        if words and words[-1] not in learnt:
            raise DataError(f"the chat template leaves out the answer's text; of the answers it writes {learnt!r}.")
    return spans


def _rendered_span(tokenizer: PreTrainedTokenizerBase, messages: list[Message], index: int, text: str) -> Span | None:
    """The answer as what the template adds to its prompt."""
    head = render(tokenizer, messages[:index], prompt=True)
    through = text if index == len(messages) - 1 else render(tokenizer, messages[: index + 1])
    # What a template writes after the end marker (a line break) is not the model's to learn.
    through = through.rstrip()
    return (len(head), len(through)) if text.startswith(head) and text.startswith(through) else None


def _verbatim_span(tokenizer: PreTrainedTokenizerBase, messages: list[Message], index: int, text: str) -> Span | None:
    """The answer's own words and its end marker, where they stand right after the turn's header."""
    before = render(tokenizer, messages[:index])
    head = render(tokenizer, messages[:index], prompt=True)
    stand_in = "\N{OBJECT REPLACEMENT CHARACTER}"
    closed = render(tokenizer, [*messages[:index], {"role": "assistant", "content": stand_in}])
    closing = closed.rpartition(stand_in)[2].rstrip()
    if not closing or not text.startswith(before):
        return None
    content = messages[index]["content"]
    spoken = content.rpartition("</think>")[2]
    for words in (content, spoken.lstrip(), spoken.strip()):
        start = text.find(words + closing, len(before))
        # The header may be less than the whole prompt, where that opens a thinking block.
        if start >= 0 and head.startswith(text[:start]):
            return start, start + len(words + closing)
    return None


def _marked_spans(tokenizer: PreTrainedTokenizerBase, messages: list[Message], text: str) -> list[Span]:
    """What the template marks with `{% generation %}`, or TRL's version of it does, if that writes the same text."""
    from transformers.utils.chat_template_utils import render_jinja_template
    from trl.chat_template_utils import get_training_chat_template

    try:
        template = get_training_chat_template(tokenizer) or tokenizer.get_chat_template()
    except ValueError:  # TRL has no version of it
        return []
    tokens: Any = tokenizer.special_tokens_map
    results: Any = render_jinja_template(
        conversations=[messages], chat_template=template, return_assistant_tokens_mask=True, **tokens
    )
    (rendered,), (marks,) = results
    if rendered != text:
        return []
    heads = [render(tokenizer, messages[:i], prompt=True) for i, m in enumerate(messages) if m["role"] == "assistant"]
    prompts = [len(head) for head in heads if text.startswith(head)]
    spans = []
    for start, end in marks:
        end = len(text[:end].rstrip())
        # Some marks begin with the turn's header, which is the prompt's.
        spans.append((max([start, *(prompt for prompt in prompts if prompt < end)]), end))
    return spans
