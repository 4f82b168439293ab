"""Conversations as text and as tokens, with the characters and tokens that answers take up."""

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from llmkit.data.encoding.masks import AnswerFinder, render, render_all
from llmkit.data.examples import Conversation
from llmkit.data.rows import Row
from llmkit.errors import DataError


class ChatText:
    """Renders and tokenizes with one tokenizer and its template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.finder = AnswerFinder(tokenizer)

    def texts(self, conversations: Sequence[tuple[Row, Conversation]]) -> list[str]:
        """Every conversation as the template writes it; plain text between the tokenizer's own ends.

        Raises DataError that names the row which the template refuses.
        """
        texts: list[str] = []
        # Calls share their tools; most data has none, and so one call.
        for tools, group in groupby(conversations, key=lambda pair: pair[1].tools):
            members = list(group)
            if members[0][1].text is not None:
                texts += [f"{self._text_start}{one.text}{self.tokenizer.eos_token or ''}" for _, one in members]
                continue
            try:
                texts += render_all(self.tokenizer, [one.messages for _, one in members], tools=tools)
            except Exception:  # a template raises what it likes; find the row at fault
                texts += [self._text(row, one) for row, one in members]
        return texts

    def _text(self, row: Row, conversation: Conversation) -> str:
        try:
            return render(self.tokenizer, conversation.messages, tools=conversation.tools)
        except Exception as error:  # jinja2.TemplateError, KeyError, TypeError, ...
            raise DataError(f"{row.place()}: the chat template refuses it: {error}\n  {row.excerpt()}") from error

    @cached_property
    def _text_start(self) -> str:
        """The token that this tokenizer begins every text with, if it does."""
        ids = self.tokenizer("")["input_ids"]
        return str(self.tokenizer.bos_token) if ids and ids[0] == self.tokenizer.bos_token_id else ""

    def encode(self, texts: list[str]) -> list[Encoding]:
        """The texts in tokens; the template has written the special ones, so the tokenizer adds none."""
        # Transformers' own call makes lists of all offsets, which takes as long as the rest.
        return self._backend.encode_batch(texts, add_special_tokens=False)

    @cached_property
    def _backend(self) -> Any:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return backend


def token_at(encoding: Encoding, position: int, text: str) -> int:
    """The first token that begins at the character `position` of `text` or behind it; else the number of tokens.

    Some byte-level tokenizers (Llama 3) leave leading spaces out of a token's offsets, and a token of spaces is left
    with nothing: it really begins where the token before it ends.
    """
    count = len(encoding)
    token = None
    for place in range(position, len(text)):
        if (token := encoding.char_to_token(place)) is not None:
            break
    token = count if token is None else token
    while token > 0 and _begin(encoding, token - 1) >= position:
        token -= 1
    while token < count and _begin(encoding, token) < position:
        token += 1
    return token


def _begin(encoding: Encoding, token: int) -> int:
    begin, _ = encoding.token_to_chars(token) or (0, 0)
    _, end_before = (token and encoding.token_to_chars(token - 1)) or (0, 0)
    return min(begin, end_before)
