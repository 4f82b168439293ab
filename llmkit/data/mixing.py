"""How often each source's rows come in a pass over the training data."""

import numpy as np

from llmkit.config.schema import SourceConfig
from llmkit.data.encoding.cache import EncodedSource


def mixed_indices(chosen: np.ndarray, sources: list[EncodedSource], configs: list[SourceConfig]) -> np.ndarray:
    """The training rows of all sources, repeated and thinned out as `repeat` and `weight` say.

    With weights, source i gives a share of weight_i / (sum of weights) of the rows: as many as the source that is
    scarcest for its weight allows, so that no row comes more often than its `repeat`. Which rows stay is decided by
    their content.

    Args:
        chosen: indices into all sources put together, ascending.
    """
    starts = np.cumsum([0, *(len(source) for source in sources)])
    parts = [
        _repeated(chosen[(chosen >= first) & (chosen < behind)], config)
        for first, behind, config in zip(starts, starts[1:], configs, strict=False)
    ]
    weights = [weight for config in configs if (weight := _weight(config)) is not None]
    if len(weights) == len(parts) > 1:
        total = min(len(part) / weight for part, weight in zip(parts, weights, strict=True))
        parts = [
            _lowest_hashes(part, source.column("digest")[part - first], round(total * weight))
            for part, source, first, weight in zip(parts, sources, starts, weights, strict=False)
        ]
    return np.concatenate(parts)


def _repeated(part: np.ndarray, config: SourceConfig) -> np.ndarray:
    return np.tile(part, config.repeat)


def _weight(config: SourceConfig) -> float | None:
    return config.weight


def _lowest_hashes(part: np.ndarray, digests: np.ndarray, count: int) -> np.ndarray:
    return part[np.sort(np.argsort(digests, kind="stable")[:count])]
