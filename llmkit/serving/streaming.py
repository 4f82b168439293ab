"""Tokens to text while they are generated, without a character that is not whole yet."""

from collections.abc import Callable
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer


class PieceStreamer(BaseStreamer):
    """Hands text to `write` as soon as it is final, for `generate(streamer=...)` of one prompt.

    Transformers' own TextStreamer waits for the next space, which many languages do not write (5.19).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]):
        assert tokenizer.is_fast, "load_tokenizer refuses others"
        self._backend: Any = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._write = write
        self._prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, which is not written, then one token at a time."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        for token in value.flatten().tolist():
            if piece := self._stream.step(self._backend, token):
                self._write(piece)

    def end(self) -> None:
        """Nothing is held back but bytes that make no character."""
