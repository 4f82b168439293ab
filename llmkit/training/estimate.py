"""A figure over rows, and the interval that says how far it may be off because these rows were drawn and not others."""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # reports need no numpy
    import numpy as np

Z = NormalDist().inv_cdf(0.975)  # 95%, both sides


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A figure over `n` rows and the interval that covers the true one in 95 of 100 draws; None of a single row."""

    value: float
    low: float | None
    high: float | None
    n: int


def in_words(name: str, figure: dict[str, Any]) -> str:
    """`loss 1.2034 (95%: 1.1830 to 1.2238, 1,319 rows)`."""

    def shown(value: float) -> str:
        return f"{value:.4f}" if name == "loss" else f"{value:.1%}"

    between = f"95%: {shown(figure['low'])} to {shown(figure['high'])}, " if figure["low"] is not None else ""
    rows = "1 row" if figure["n"] == 1 else f"{figure['n']:,} rows"
    return f"{name.replace('_', ' ')} {shown(figure['value'])} ({between}{rows})"


def share(hits: int, asked: int, *, rows: int | None = None) -> Estimate:
    """hits / asked with Wilson's score interval (JASA 22, 1927, p. 209), which holds near 0 and 1 and for few rows too.

    Args:
        rows: where some rows are asked more than one question, how many rows there are. The interval is that of so many
            draws, as if the answers to one row were all alike: it may be too wide, never too narrow.
    """
    value, n = hits / asked, rows or asked
    middle = (value + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(value * (1 - value) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    # At the ends the bounds are 0 and 1 but for rounding.
    low, high = (0.0 if hits == 0 else middle - half), (1.0 if hits == asked else middle + half)
    return Estimate(value=value, low=low, high=high, n=n)


def ratio(sums: "np.ndarray", counts: "np.ndarray") -> Estimate:
    """Σ sums / Σ counts, one of each per row, with the interval of a ratio estimate.

    The variance is n / (n - 1) · Σ (sum - ratio · count)² / (Σ counts)² (Cochran, Sampling Techniques, 1977, ch. 6).
    """
    n, total = len(sums), counts.sum()
    value = float(sums.sum() / total)
    if n < 2:
        return Estimate(value=value, low=None, high=None, n=n)
    half = Z * math.sqrt(n / (n - 1) * float(((sums - value * counts) ** 2).sum())) / float(total)
    return Estimate(value=value, low=value - half, high=value + half, n=n)
