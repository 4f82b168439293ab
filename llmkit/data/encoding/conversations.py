"""Conversations -> token ids and labels: what is learnt, and how what is too long is made to fit."""

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding

from llmkit.data.encoding.batches import IGNORED, Encoded, Notes, content_hash, write_example
from llmkit.data.encoding.chat_text import ChatText, token_at
from llmkit.data.encoding.masks import Span
from llmkit.data.encoding.overlong import cut_prompt, keep_from_front, leading_system_turns, split_points
from llmkit.data.examples import Conversation, Message
from llmkit.data.rows import Row
from llmkit.errors import DataError


class _Item(NamedTuple):
    """A conversation on its way, the indices of the answers to learn, and a hash of the row it came from."""

    row: Row
    conversation: Conversation
    wanted: list[int]
    digest: int
    example: str


class ConversationEncoder:
    """Encodes conversations as `data.train_on` and `data.on_overlong` say."""

    def __init__(self, chat: ChatText, *, train_on: str, on_overlong: str, max_length: int):
        self.chat, self.train_on, self.on_overlong, self.max_length = chat, train_on, on_overlong, max_length

    def encode(self, rows: list[Row], conversations: list[Conversation], notes: Notes) -> list[Encoded]:
        """One example for each conversation, or more (split). Raises DataError with the row's place."""
        items = [self._item(row, conversation) for row, conversation in zip(rows, conversations, strict=True)]
        encoded = []
        for item, text, tokens in self._in_tokens(items, notes):
            ids = np.asarray(tokens.ids, dtype=np.int32)
            labels = self._labels(item, text, tokens, ids, notes)
            notes.reasoning_lost += _loses_reasoning(item, text)
            if item.conversation.text is not None and self.on_overlong == "split" and len(ids) > self.max_length:
                notes.split += 1
                for start, end in pairwise(_text_cuts(len(ids), self.max_length)):
                    part = ids[start:end]
                    example = _text_part(item.conversation, text, tokens, start, end)
                    encoded.append(Encoded(item.row, (part, part), len(part) - 1, item.digest, item.digest, example))
            else:
                # Nothing predicts the first token.
                learnt = int((labels[1:] != IGNORED).sum()) if self._says_something(item) else 0
                encoded.append(Encoded(item.row, (ids, labels), learnt, item.digest, item.digest, item.example))
        return encoded

    def _item(self, row: Row, conversation: Conversation) -> _Item:
        example = write_example(conversation)
        return _Item(row, conversation, self._wanted(conversation), content_hash(example), example)

    def _wanted(self, conversation: Conversation) -> list[int]:
        """The indices of the answers to learn: what `train_on` says, less what the row itself leaves out."""
        roles = [message["role"] for message in conversation.messages]
        answers = [i for i, role in enumerate(roles) if role == "assistant"]
        if self.train_on == "last":
            answers = answers[-1:]
        elif self.train_on == "completion":
            prompt = conversation.prompt_turns
            if prompt is None:
                prompt = len(roles) - roles[::-1].index("user") if "user" in roles else 0
            answers = [i for i in answers if i >= prompt]
        return [i for i in answers if conversation.learnt is None or conversation.learnt[i]]

    def _in_tokens(self, items: list[_Item], notes: Notes) -> list[tuple[_Item, str, Encoding]]:
        """The items with their text and tokens, those that are too long replaced by what fits."""
        texts = self.chat.texts([(item.row, item.conversation) for item in items])
        together = list(zip(items, texts, self.chat.encode(texts), strict=True))
        if self.on_overlong not in ("truncate_prompt", "split"):
            return together
        fitted = []
        for item, text, tokens in together:
            parts = self._fit(item, notes) if len(tokens) > self.max_length else None
            if parts is None:
                fitted.append((item, text, tokens))
            else:
                texts = self.chat.texts([(part.row, part.conversation) for part in parts])
                fitted += zip(parts, texts, self.chat.encode(texts), strict=True)
        return fitted

    def _labels(self, item: _Item, text: str, tokens: Encoding, ids: np.ndarray, notes: Notes) -> np.ndarray:
        if item.conversation.text is not None:
            if len(ids):
                notes.end_tokens[int(ids[-1])] += 1
            return ids
        labels = np.full(len(ids), IGNORED, dtype=np.int32)
        if self.train_on == "all":
            labels[:] = ids
            for start, end in self._spans(item, text, self._left_out(item)):
                labels[token_at(tokens, start, text) : token_at(tokens, end, text)] = IGNORED
        for start, end in self._answers(item, text):
            first, behind = token_at(tokens, start, text), token_at(tokens, end, text)
            labels[first:behind] = ids[first:behind]
            if behind > first:
                notes.end_tokens[int(ids[behind - 1])] += 1
        return labels

    def _answers(self, item: _Item, text: str) -> list[Span]:
        try:
            return self._spans(item, text, item.wanted)
        except DataError:
            if self.train_on == "all":
                return []  # where they lie decides nothing then
            raise

    def _spans(self, item: _Item, text: str, wanted: list[int]) -> list[Span]:
        if not wanted:
            return []
        try:
            return self.chat.finder.spans(
                item.conversation.messages, text, wanted=wanted, tools=item.conversation.tools
            )
        except DataError as error:
            raise DataError(f"{item.row.place()}: {error}") from error

    @staticmethod
    def _left_out(item: _Item) -> list[int]:
        """The answers that the row itself leaves out."""
        conversation, learnt = item.conversation, item.conversation.learnt
        if learnt is None:
            return []
        left_out = [i for i, message in enumerate(conversation.messages) if not learnt[i]]
        if others := {conversation.messages[i]["role"] for i in left_out} - {"assistant"}:
            raise DataError(
                f"{item.row.place()}: leaves a turn of the {others.pop()} out of training, and data.train_on=all "
                "learns all but answers that are left out; data.train_on=assistant learns no other turn."
            )
        return left_out

    def _says_something(self, item: _Item) -> bool:
        """Whether there is something with words to learn: an end of turn alone is nothing."""
        messages = item.conversation.messages
        if item.conversation.text is not None:
            return bool(item.conversation.text.strip())
        turns = messages if self.train_on == "all" else [messages[i] for i in item.wanted]
        return any((turn.get("content") or "").strip() or turn.get("tool_calls") for turn in turns)

    def _fit(self, item: _Item, notes: Notes) -> list[_Item] | None:
        """The conversation in a form that fits, or None if there is none."""
        messages = item.conversation.messages
        if not item.wanted:
            return None

        def fits(shorter: list[Message]) -> bool:
            (text,) = self.chat.texts([(item.row, replace(item.conversation, messages=shorter))])
            return len(self.chat.encode([text])[0]) <= self.max_length

        if self.on_overlong == "split":
            points = split_points(messages, fits)
            if points is None:
                return None
            notes.split += 1
            parts = [_part(item, start, end) for start, end in points]
            return [part for part in parts if part.wanted or self.train_on == "all"]
        last = item.wanted[-1]
        start = keep_from_front(messages, last, fits)
        if start is not None:
            shorter_item = _part(item, start, len(messages))
            notes.truncated += 1
            notes.answers_lost += len(item.wanted) - len(shorter_item.wanted)
            return [shorter_item]
        asked = next((i for i in range(last - 1, -1, -1) if messages[i]["role"] == "user"), None)
        if asked is None:
            return None
        part = _part(item, asked, len(messages))
        shorter = cut_prompt(part.conversation.messages, leading_system_turns(messages), fits)
        if shorter is None:
            return None
        notes.truncated += 1
        notes.answers_lost += len(item.wanted) - len(part.wanted)
        cut = replace(part.conversation, messages=shorter)
        return [part._replace(conversation=cut, example=write_example(cut))]


def _part(item: _Item, start: int, end: int) -> _Item:
    """The system's turns and those from `start` to `end`; the answers to learn go along."""
    whole = item.conversation
    system = min(leading_system_turns(whole.messages), start)
    messages = whole.messages[:system] + whole.messages[start:end]
    learnt = whole.learnt and whole.learnt[:system] + whole.learnt[start:end]
    part = replace(whole, messages=messages, learnt=learnt, prompt_turns=None)
    wanted = [i - start + system for i in item.wanted if start <= i < end]
    return item._replace(conversation=part, wanted=wanted, example=write_example(part))


def _loses_reasoning(item: _Item, text: str) -> bool:
    """Whether the last answer has reasoning that the template does not write. Earlier ones often lose it by design."""
    if not item.wanted:
        return False
    words = (item.conversation.messages[item.wanted[-1]].get("reasoning_content") or "").split()
    return bool(words) and words[-1] not in text


def _text_cuts(length: int, longest: int) -> list[int]:
    """Where parts of a text of `length` tokens begin and end. The last has two tokens at least: one teaches nothing."""
    cuts = [*range(0, length, longest), length]
    if cuts[-1] - cuts[-2] == 1:
        cuts[-2] -= 1
    return cuts


def _text_part(whole: Conversation, text: str, tokens: Encoding, first: int, behind: int) -> str:
    """The characters of some tokens of a plain text, as an example of their own."""
    begin, _ = tokens.token_to_chars(first) or (0, 0)
    _, end = tokens.token_to_chars(behind - 1) or (0, len(text))
    return write_example(replace(whole, text=text[begin:end]))
