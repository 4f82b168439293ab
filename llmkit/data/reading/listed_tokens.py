"""The special tokens that lie beside the rows: the `tokens.json` of each training source."""

from llmkit.config.schema import DataConfig
from llmkit.data.drafts import training_sources
from llmkit.data.reading.sources import open_source


def listed_tokens(data: DataConfig, *, preference: bool) -> list[str]:
    """The tokens of all training sources, for `load_run_tokenizer`; the held-out rows bring none.

    Raises ConfigError for a source that cannot be had, DataError for a list that is none.
    """
    sources = [open_source(source, key=key, preference=preference) for key, source in training_sources(data)]
    return list(dict.fromkeys(token for source in sources for token in source.special_tokens))
