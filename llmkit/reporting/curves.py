"""Curves over the steps of a run, made small enough for a page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MOST_POINTS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A value at some steps; None where it was not a finite number."""

    steps: list[int]
    values: list[float | None]
    logged: int  # points there were before thinning

    @property
    def is_thinned(self) -> bool:
        """Whether points were left out."""
        return len(self.steps) < self.logged


def curve(records: Sequence[dict[str, Any]], key: str) -> Curve:
    """What the records of a run's metrics.jsonl hold under `key`, at most MOST_POINTS of it."""
    points = [(record["step"], finite(record[key])) for record in records if key in record and "step" in record]
    kept = thinned(points)
    return Curve(steps=[step for step, _ in kept], values=[value for _, value in kept], logged=len(points))


def thinned(points: list[tuple[int, float | None]], most: int = MOST_POINTS) -> list[tuple[int, float | None]]:
    """The first and the last point, and of each of equally long stretches between them the lowest and the highest.

    So that no spike is lost. A gap (None) counts as the lowest.
    """
    if len(points) <= most:
        return points
    inner, stretches = points[1:-1], (most - 2) // 2
    kept = [points[0]]
    for number in range(stretches):
        stretch = inner[number * len(inner) // stretches : (number + 1) * len(inner) // stretches]
        ends = {_extreme(stretch, min), _extreme(stretch, max)}
        kept += [stretch[index] for index in sorted(ends)]
    return [*kept, points[-1]]


def _extreme(stretch: list[tuple[int, float | None]], pick: Any) -> int:
    return pick(range(len(stretch)), key=lambda index: -math.inf if (value := stretch[index][1]) is None else value)


def finite(value: Any) -> float | None:
    """A number of a record, or None for one that is missing or not finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
