"""Blocks of raw rows -> record batches of tokens. Runs in worker processes, a block at a time."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from llmkit.data.encoding.batches import CONVERSATIONS, PREFERENCES, Encoded, EncodedBlock, Notes, record_batch
from llmkit.data.encoding.chat_text import ChatText
from llmkit.data.encoding.control_tokens import control_tokens
from llmkit.data.encoding.conversations import ConversationEncoder
from llmkit.data.encoding.preferences import PreferenceEncoder
from llmkit.data.examples import Conversation, Preference
from llmkit.data.formats.table import convert
from llmkit.data.reading.readers import Block


@dataclass(kw_only=True)
class Encoder:
    """Turns blocks into tokens, masked and, where `on_overlong` says so, made to fit.

    Args:
        own_tokens: the special tokens that the rows are meant to hold.
        layout: a format's name, not `auto`.
        max_length: longest example in tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    own_tokens: list[str]
    layout: str
    columns: dict[str, str]
    preference: bool
    train_on: str
    on_overlong: str
    max_length: int

    @property
    def schema(self) -> pa.Schema:
        """The columns of every batch."""
        return PREFERENCES if self.preference else CONVERSATIONS

    def __call__(self, block: Block) -> EncodedBlock:
        """Raises DataError with file and row."""
        rows, notes = block.rows(), Notes()
        examples = convert(rows, self.layout, self.columns, preference=self.preference)
        if self.preference:
            pairs = [example for example in examples if isinstance(example, Preference)]
            encoded = self._preferences.encode(rows, pairs, notes)
        else:
            conversations = [example for example in examples if isinstance(example, Conversation)]
            encoded = self._conversations.encode(rows, conversations, notes)
        self._count_tokens(encoded, notes)
        # Plain text has no template around it: what stands there is meant.
        pattern = control_tokens(self.tokenizer, self.own_tokens) if self.layout != "text" else None
        control = [pattern is not None and pattern.search(one.example) is not None for one in encoded]
        return EncodedBlock(block.source, len(rows), record_batch(encoded, self.schema, control=control), notes)

    def _count_tokens(self, encoded: list[Encoded], notes: Notes) -> None:
        """The unknown tokens, and the run's own."""
        parts = slice(None) if self.preference else slice(1)  # labels repeat the ids
        ids = np.concatenate([np.empty(0, np.int32), *(ids for one in encoded for ids in one.ids[parts])])
        own = self.tokenizer
        # Where the unknown token is another's too (GPT-2), it says nothing.
        if own.unk_token_id not in (None, own.eos_token_id, own.bos_token_id, own.pad_token_id):
            notes.unknown = int((ids == own.unk_token_id).sum())
        if self.own_tokens:
            numbers = own.convert_tokens_to_ids(self.own_tokens)
            notes.own_tokens = Counter(ids[np.isin(ids, numbers)].tolist())

    @cached_property
    def _conversations(self) -> ConversationEncoder:
        chat = ChatText(self.tokenizer)
        return ConversationEncoder(
            chat, train_on=self.train_on, on_overlong=self.on_overlong, max_length=self.max_length
        )

    @cached_property
    def _preferences(self) -> PreferenceEncoder:
        return PreferenceEncoder(ChatText(self.tokenizer), on_overlong=self.on_overlong, max_length=self.max_length)
