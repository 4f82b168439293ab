"""Special tokens in the text of a row: a user who typed <|im_end|> ends the turn there, as the tokenizer reads it."""

import json
import re
from collections.abc import Iterable
from functools import lru_cache

from transformers import PreTrainedTokenizerBase


def control_tokens(tokenizer: PreTrainedTokenizerBase, own_tokens: Iterable[str]) -> re.Pattern[str] | None:
    """What finds a special token in an example as `batches.write_example` writes it; None where there are none.

    Args:
        own_tokens: those of `data.special_tokens` and beside the rows, which are left out: they are meant to be there.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return _pattern(frozenset(special.difference(own_tokens)))


@lru_cache(maxsize=8)
def _pattern(tokens: frozenset[str]) -> re.Pattern[str] | None:
    written = [json.dumps(token, ensure_ascii=False)[1:-1] for token in sorted(tokens, reverse=True)]
    return re.compile("|".join(map(re.escape, written))) if written else None
