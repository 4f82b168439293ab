"""Preferences -> ids of the prompt, the chosen and the rejected completion, as TRL's DPO trainer takes them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llmkit.data.encoding.batches import Encoded, Notes, content_hash, write_example
from llmkit.data.encoding.chat_text import ChatText, token_at
from llmkit.data.encoding.overlong import cut_prompt, keep_from_front, leading_system_turns
from llmkit.data.examples import Conversation, Message, Preference
from llmkit.data.rows import Row
from llmkit.errors import DataError

Ids = tuple[np.ndarray, np.ndarray, np.ndarray]  # prompt, chosen, rejected


class PreferenceEncoder:
    """Encodes pairs as `data.on_overlong` says."""

    def __init__(self, chat: ChatText, *, on_overlong: str, max_length: int):
        self.chat, self.on_overlong, self.max_length = chat, on_overlong, max_length

    def encode(self, rows: list[Row], pairs: list[Preference], notes: Notes) -> list[Encoded]:
        """One example for each pair. Raises DataError with the row's place."""
        encoded = []
        for row, pair, ids in zip(rows, pairs, self._ids(rows, pairs, notes), strict=True):
            digest = content_hash(write_example(pair))
            group = content_hash(write_example(Conversation(messages=pair.prompt, tools=pair.tools)))
            notes.other_voices += any(turn["role"] != "assistant" for turn in pair.chosen + pair.rejected)
            fitted = pair, ids
            if self.on_overlong == "truncate_prompt" and _length(ids) > self.max_length:
                fitted = self._fit(row, pair, notes) or fitted
            (_, chosen, rejected) = fitted[1]
            learnt = len(chosen) + len(rejected)
            encoded.append(Encoded(row, fitted[1], learnt, digest, group, write_example(fitted[0])))
        return encoded

    def _ids(self, rows: list[Row], pairs: list[Preference], notes: Notes) -> list[Ids]:
        chosen = self._side(rows, pairs, [pair.chosen for pair in pairs], notes)
        rejected = self._side(rows, pairs, [pair.rejected for pair in pairs], notes)
        return [_parted(*sides) for sides in zip(chosen, rejected, strict=True)]

    def _side(
        self, rows: list[Row], pairs: list[Preference], completions: Sequence[list[Message]], notes: Notes
    ) -> list[tuple[int, np.ndarray]]:
        """For every pair: where its completion begins, and the ids through the end of its last turn."""
        wholes = [
            Conversation(messages=pair.prompt + completion, tools=pair.tools)
            for pair, completion in zip(pairs, completions, strict=True)
        ]
        texts = self.chat.texts(list(zip(rows, wholes, strict=True)))
        side = []
        for row, pair, whole, text, tokens in zip(rows, pairs, wholes, texts, self.chat.encode(texts), strict=True):
            places = range(len(pair.prompt), len(whole.messages))
            answers = [i for i in places if whole.messages[i]["role"] == "assistant"]
            try:
                spans = self.chat.finder.spans(whole.messages, text, wanted=answers, tools=pair.tools)
            except DataError as error:
                raise DataError(f"{row.place()}: {error}") from error
            ids = np.asarray(tokens.ids, dtype=np.int32)[: token_at(tokens, spans[-1][1], text)]
            notes.end_tokens[int(ids[-1])] += 1
            side.append((token_at(tokens, spans[0][0], text), ids))
        return side

    def _fit(self, row: Row, pair: Preference, notes: Notes) -> tuple[Preference, Ids] | None:
        """The pair with a prompt short enough, or None if there is none."""

        def with_prompt(prompt: list[Message]) -> tuple[Preference, Ids]:
            shorter = replace(pair, prompt=prompt)
            return shorter, self._ids([row], [shorter], Notes())[0]

        def fits(prompt: list[Message]) -> bool:
            return _length(with_prompt(prompt)[1]) <= self.max_length

        prompt, system = pair.prompt, leading_system_turns(pair.prompt)
        start = keep_from_front(prompt, len(prompt), fits)
        asked = next((i for i in range(len(prompt) - 1, -1, -1) if prompt[i]["role"] == "user"), None)
        shorter: list[Message] | None = None
        if start is not None:
            shorter = prompt[:system] + prompt[start:]
        elif asked is not None:
            shorter = cut_prompt(prompt[:system] + prompt[asked:], system, fits)
        if shorter is None:
            return None
        notes.truncated += 1
        return with_prompt(shorter)


def _length(ids: Ids) -> int:
    prompt, chosen, rejected = ids
    return len(prompt) + max(len(chosen), len(rejected))


def _parted(chosen: tuple[int, np.ndarray], rejected: tuple[int, np.ndarray]) -> Ids:
    """The prompt is what both begin with: a token may have glued its end to the beginning of one completion."""
    prompt = min(chosen[0], rejected[0])
    same = chosen[1][:prompt] == rejected[1][:prompt]
    if not same.all():
        prompt = int(np.argmin(same))
    return chosen[1][:prompt], chosen[1][prompt:], rejected[1][prompt:]
