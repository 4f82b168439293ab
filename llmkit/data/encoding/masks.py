"""Which characters of a rendered conversation are answers: only these are learnt.

The template alone knows what it writes around a turn, so it is asked. Most templates write every answer between one
header and one end marker, and then one rendering of the whole tells. For the others a conversation up to an answer,
and up to its end, rendered apart, mark where that answer lies in the whole. Templates that write an earlier turn
differently once another follows (Qwen3 drops the thinking of all but the last) are asked what changes in the whole when
another answer stands in for one.
"""

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from llmkit.data.examples import Message, Tools
from llmkit.data.templates import split_defaults
from llmkit.errors import DataError

Span = tuple[int, int]

# For an answer, to see what a template writes around it: characters that no text has in a row.
STAND_IN = "\uf8ff\N{OBJECT REPLACEMENT CHARACTER}\uf8ff"


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, tools: Tools | None = None, prompt: bool = False
) -> str:
    """The conversation as text; `prompt` ends it where the model is to answer."""
    return render_all(tokenizer, [messages], tools=tools, prompt=prompt)[0]


def render_all(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[Message]],
    *,
    tools: Tools | None = None,
    prompt: bool = False,
) -> list[str]:
    """Many conversations that share their tools, as text: one call costs a third of many."""
    if not conversations:
        return []
    if "message.thinking" in str(tokenizer.chat_template):  # gpt-oss has a name of its own for it
        conversations = [[_renamed_reasoning(message) for message in messages] for messages in conversations]
    arguments: dict[str, Any] = {"tools": tools, "tokenize": False, "add_generation_prompt": prompt}
    texts: Any = tokenizer.apply_chat_template(list(conversations), **arguments)
    return texts


def _renamed_reasoning(message: Message) -> Message:
    return message | {"thinking": message["reasoning_content"]} if "reasoning_content" in message else message


class AnswerFinder:
    """Finds the answers of conversations in their rendered text; knows one tokenizer's template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def spans(
        self, messages: list[Message], text: str, *, wanted: Sequence[int] | None = None, tools: Tools | None = None
    ) -> list[Span]:
        """The (start, end) characters in `text`, the rendered conversation, of answers and their end markers.

        Args:
            wanted: the indices of the assistant's turns to find; unset: all.

        Raises:
            DataError: an answer cannot be found again, or the template leaves its text out.
        """
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = answers if wanted is None else wanted
        if (spans := self._between_markers(messages, answers, text)) is not None:
            return [span for index, span in zip(answers, spans, strict=True) if index in wanted]
        found = [
            self._rendered(messages, index, text, tools) or self._in_place(messages, index, text, tools)
            for index in wanted
        ]
        spans = [span for span in found if span]
        if len(spans) < len(wanted):
            marked = self._marked(messages, text, tools)
            if len(wanted) == len(answers):
                spans = marked  # there may be more of them: some templates end the conversation in one of its own
            elif len(marked) == len(answers):
                spans = [span for index, span in zip(answers, marked, strict=True) if index in wanted]
        if len(spans) < len(wanted):
            raise DataError(
                "the chat template renders an earlier turn differently once another follows, so its answers cannot "
                "be told from the prompt; use data.train_on=last, conversations of one answer, or another "
                "data.chat_template."
            )
        _refuse_lost_words([messages[index] for index in wanted], "".join(text[start:end] for start, end in spans))
        return spans

    @cached_property
    def _markers(self) -> tuple[str, str] | None:
        """What the template writes before and after an answer, where it does so in the plainest way."""
        question = {"role": "user", "content": "?"}
        try:
            asked = render(self.tokenizer, [question])
            prompt = render(self.tokenizer, [question], prompt=True)
            whole = render(self.tokenizer, [question, {"role": "assistant", "content": STAND_IN}])
        except Exception:  # a template raises what it likes; the conversation at hand will show it
            return None
        header = prompt.removeprefix(asked)
        closing = whole.removeprefix(prompt + STAND_IN).rstrip()
        plain = prompt.startswith(asked) and whole.startswith(prompt + STAND_IN)
        return (header, closing) if plain and header.strip() and closing else None

    def _between_markers(self, messages: list[Message], answers: list[int], text: str) -> list[Span] | None:
        """All answers from one rendering: each follows its header at once, ends in its marker, and no other does."""
        if self._markers is None or not answers or answers[0] == 0:
            return None
        header, closing = self._markers
        if text.count(header) != len(answers):
            return None
        spans, position = [], 0
        for index in answers:
            message = messages[index]
            content = message.get("content")
            if not isinstance(content, str) or message.get("tool_calls") or message.get("reasoning_content"):
                return None
            start = text.find(header, position) + len(header)
            end = start + len(content)
            if not text.startswith(content, start) or not text.startswith(closing, end):
                end = start + len(content.strip())
                if not text.startswith(content.strip(), start) or not text.startswith(closing, end):
                    return None
            position = end + len(closing)
            spans.append((start, position))
        return spans

    def _rendered(self, messages: list[Message], index: int, text: str, tools: Tools | None) -> Span | None:
        """The answer as what the template adds to its prompt."""
        if (head := self._prompt(messages[:index], tools)) is None:
            return None
        through = text if index == len(messages) - 1 else render(self.tokenizer, messages[: index + 1], tools=tools)
        # What a template writes after the end marker (a line break) is not the model's to learn.
        through = through.rstrip()
        return (len(head), len(through)) if text.startswith(head) and text.startswith(through) else None

    def _in_place(self, messages: list[Message], index: int, text: str, tools: Tools | None) -> Span | None:
        """The answer as what changes in the whole when another stands in for it, and its end marker."""
        stand_in = {"role": "assistant", "content": STAND_IN}
        try:
            whole = render(self.tokenizer, [*messages[:index], stand_in, *messages[index + 1 :]], tools=tools)
            closed = render(self.tokenizer, [*messages[:index], stand_in], tools=tools)
        except (TemplateError, TypeError, KeyError):  # a tool's result without its call, say
            return None
        if whole.count(STAND_IN) != 1:
            return None
        before, _, after = whole.partition(STAND_IN)
        head = self._prompt(messages[:index], tools)
        if head is not None and not head.startswith(before):
            return None  # the template opens the turn with words that are not in the prompt: the model has to say them
        closing = closed.rpartition(STAND_IN)[2].rstrip()
        end = len(text) - len(after)
        found = text.startswith(before) and text.endswith(after) and end >= len(before) and after.startswith(closing)
        return (len(before), end + len(closing)) if found and closing else None

    def _prompt(self, messages: list[Message], tools: Tools | None) -> str | None:
        try:
            return render(self.tokenizer, messages, tools=tools, prompt=True)
        except (TemplateError, TypeError, IndexError):
            if messages:
                raise
            return None  # many templates cannot render a conversation of nothing

    def _marked(self, messages: list[Message], text: str, tools: Tools | None) -> list[Span]:
        """What the template marks with `{% generation %}`, or TRL's version of it does, if that writes the same."""
        from transformers.utils.chat_template_utils import render_jinja_template
        from trl.chat_template_utils import get_training_chat_template

        template, values = split_defaults(self.tokenizer.get_chat_template())
        plain = copy.copy(self.tokenizer)
        plain.chat_template = template  # TRL knows templates by their text
        try:
            template = get_training_chat_template(plain) or template
        except ValueError:  # TRL has no version of it
            return []
        tokens: Any = self.tokenizer.special_tokens_map | values
        results: Any = render_jinja_template(
            conversations=[messages],
            tools=tools,  # type: ignore[arg-type]
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokens,
        )
        (rendered,), (marks,) = results
        if rendered != text:
            return []
        heads = [
            self._prompt(messages[:i], tools) or ""
            for i, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        prompts = [len(head) for head in heads if text.startswith(head)]
        spans = []
        for start, end in marks:
            end = len(text[:end].rstrip())
            # Some marks begin with the turn's header, which is the prompt's.
            spans.append((max([start, *(prompt for prompt in prompts if prompt < end)]), end))
        return spans


def _refuse_lost_words(answers: list[Message], learnt: str) -> None:
    for message in answers:
        words = (message.get("content") or "").split()
        calls = [call["function"]["name"] for call in message.get("tool_calls") or []]
        for word in [*words[-1:], *calls]:
            if word not in learnt:
                raise DataError(
                    f"the chat template leaves out the answer's {word!r}; of the answers it writes {learnt!r}."
                )
