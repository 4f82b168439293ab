"""New tokens: read from the config and added to the tokenizer. Their rows in the model: new_rows.py. Free of torch."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase

from llmkit.errors import ConfigError


def read_special_tokens(value: Any) -> list[str]:
    """The tokens of `data.special_tokens`: a list, or a JSON file {"tokens": [...]} or [...].

    Raises ConfigError for anything else.
    """
    tokens: Any = value or []
    place = "data.special_tokens"
    if isinstance(value, str):
        place += f"={value}"
        if not Path(value).is_file():
            raise ConfigError(f"{place}: no such file; write a list, [<A>,<B>], or a JSON file {{tokens: [...]}}.")
        try:
            tokens = json.loads(Path(value).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{place}: not JSON: {error}.") from error
        if isinstance(tokens, dict):
            tokens = tokens.get("tokens")
    if not isinstance(tokens, list):
        raise ConfigError(f'{place}: expected a list of tokens, or {{"tokens": [...]}}, found {str(tokens)[:80]!r}.')
    for token in tokens:
        if not isinstance(token, str) or not token.strip():
            raise ConfigError(f"{place}: a token is a text that is not blank, found {token!r}.")
    return list(tokens)


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> None:
    """Add those that the vocabulary lacks, as special tokens: each is always one token, wherever it stands."""
    missing = [token for token in dict.fromkeys(tokens) if token not in tokenizer.get_vocab()]
    added = [AddedToken(token, special=True, normalized=False) for token in missing]
    tokenizer.add_tokens(added, special_tokens=True)


def new_tokens(tokenizer: PreTrainedTokenizerBase, before: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens, with their ids, that `tokenizer` has and the model's own tokenizer `before` does not."""
    known = before.get_vocab()
    return {token: number for token, number in tokenizer.get_vocab().items() if token not in known}
