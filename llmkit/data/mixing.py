"""How often each source's rows come in a pass over the training data."""

import numpy as np

from llmkit.config.schema import SourceConfig
from llmkit.data.encoding.cache import EncodedSource
from llmkit.errors import DataError


def mixed_indices(chosen: np.ndarray, sources: list[EncodedSource], configs: list[SourceConfig]) -> np.ndarray:
    """The training rows of all sources, repeated and thinned out as `repeat` and `weight` say.

    With weights, source i gives a share of weight_i / (sum of weights) of the rows: as many as the source that is
    scarcest for its weight allows, so that no row comes more often than its `repeat`. Which rows stay is decided by
    their content.

    Args:
        chosen: indices into all sources put together, ascending.

    Raises:
        DataError: a source with a weight has no row left.
    """
    starts = np.cumsum([0, *(len(source) for source in sources)])
    parts = [
        _repeated(chosen[(chosen >= first) & (chosen < behind)], config)
        for first, behind, config in zip(starts, starts[1:], configs, strict=False)
    ]
    weights = [weight for config in configs if (weight := _weight(config)) is not None]
    if len(weights) == len(parts) > 1:
        if empty := [source.name for source, part in zip(sources, parts, strict=True) if not len(part)]:
            raise DataError(f"{empty[0]}: has a weight, but none of its rows is left to train on; leave it out.")
        total = min(len(part) / weight for part, weight in zip(parts, weights, strict=True))
        parts = [
            _thinned(part, source.column("digest")[part - first], max(round(total * weight), 1), copies=config.repeat)
            for part, source, first, weight, config in zip(parts, sources, starts, weights, configs, strict=False)
        ]
    return np.concatenate(parts)


def _repeated(part: np.ndarray, config: SourceConfig) -> np.ndarray:
    return np.tile(part, config.repeat)


def _weight(config: SourceConfig) -> float | None:
    return config.weight


def _thinned(part: np.ndarray, digests: np.ndarray, count: int, *, copies: int) -> np.ndarray:
    """`count` of the rows: those with the lowest hashes, and no row a second time before all have come once."""
    copy = np.arange(len(part)) // max(len(part) // copies, 1)
    return part[np.sort(np.lexsort((digests, copy))[:count])]
