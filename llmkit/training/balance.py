"""Which rank trains on which rows of a step: all ranks get about as many tokens, and padding is kept small.

All ranks wait for the slowest one, at the end of a step under DDP, at every micro-batch under ZeRO-3 and FSDP. A
micro-batch costs its rows times its widest row, padding included, so rows of like length go together: few of the long
ones, many of the short ones. No micro-batch is larger than `micro_batch` of the step's longest rows, which is what the
trial before training has shown to fit. `per_device_train_batch_size` is therefore the mean of a step's micro-batches.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np

# A rank may have this many times the mean tokens of a step. Closer than that costs more padding than it saves waiting.
UNEVEN = 1.03
# How many of the ranks with the fewest tokens the one with the most may trade with, and how often per rank.
PARTNERS, TRADES_PER_RANK = 4, 8

Rows = np.ndarray  # int64, (rows,): positions in a step


def deal(lengths: np.ndarray, *, micro_batch: int, ranks: int) -> list[list[Rows]]:
    """The rows of one step as micro-batches: the j-th list has the j-th one of each rank.

    Every rank has the same number of micro-batches, `micro_batch` rows each on average. Only where a step has too few
    rows to go round is one empty.

    Args:
        lengths: tokens of each row of the step, (rows,), at least one.
    """
    slots = math.ceil(len(lengths) / (micro_batch * ranks))
    order = np.argsort(-lengths, kind="stable")
    widths = lengths[order].astype(np.int64)
    place = _assign(widths, _cut(widths, slots * ranks), ranks)
    if ranks > 1:
        _Trading(widths, place, slots=slots, ranks=ranks, most=micro_batch * int(widths[0])).even_out()
    ends = np.cumsum(np.bincount(place, minlength=slots * ranks))[:-1]
    batches = np.split(order[np.argsort(place, kind="stable")], ends)
    return [batches[slot * ranks : (slot + 1) * ranks] for slot in range(slots)]


def _cut(widths: np.ndarray, count: int) -> np.ndarray:
    """Cut rows, widest first, into `count` runs (fewer only of fewer rows) so that the costliest costs the least.

    Returns where each begins.
    """
    rows = widths.tolist()
    low, high = rows[0], rows[0] * math.ceil(len(rows) / count)
    while low < high:
        middle = (low + high) // 2
        if len(_fill(rows, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    starts = _fill(rows, low)
    while len(starts) < min(count, len(rows)):
        costs = [(end - start) * rows[start] if end - start > 1 else 0 for start, end in pairwise([*starts, len(rows)])]
        costliest = costs.index(max(costs))
        start, end = [*starts, len(rows)][costliest : costliest + 2]
        starts.insert(costliest + 1, (start + end + 1) // 2)
    return np.array(starts)


def _fill(rows: list[int], limit: int) -> list[int]:
    """Where runs begin that each cost at most `limit` (or are one row), filled one after the other."""
    starts, start = [], 0
    while start < len(rows):
        starts.append(start)
        start += max(limit // rows[start], 1)
    return starts


def _assign(widths: np.ndarray, starts: np.ndarray, ranks: int) -> np.ndarray:
    """The place, slot x ranks + rank, of each row: slots of equally costly runs, the longer to ranks that have less."""
    sizes = np.diff(starts, append=len(widths))
    tokens = np.add.reduceat(widths, starts)
    by_cost = np.argsort(-sizes * widths[starts], kind="stable")
    places, totals = np.empty(len(starts), dtype=np.int64), np.zeros(ranks, dtype=np.int64)
    for first in range(0, len(starts), ranks):
        runs = by_cost[first : first + ranks]
        runs = runs[np.argsort(-tokens[runs], kind="stable")]
        chosen = np.argsort(totals, kind="stable")[: len(runs)]
        places[runs] = first + chosen
        totals[chosen] += tokens[runs]
    return np.repeat(places, sizes)


class _Trade(NamedTuple):
    """A row for another, or for none, and what that costs."""

    score: float  # in tokens; infinite: not allowed
    given: int  # the row
    to: int  # its new place
    returned: int | None  # the row that takes its old place


class _Trading:
    """Trades of rows between ranks; each moves rows in `place`, the slot x ranks + rank of each row.

    Args:
        most: tokens that no micro-batch may cost more than.
    """

    def __init__(self, widths: np.ndarray, place: np.ndarray, *, slots: int, ranks: int, most: int):
        self.widths, self.place, self.slots, self.ranks, self.most = widths, place, slots, ranks, most
        self.bound = UNEVEN * int(widths.sum()) / ranks

    def even_out(self) -> None:
        """Trade until no rank has more than UNEVEN times the mean tokens, or nothing helps."""
        for _ in range(TRADES_PER_RANK * self.ranks):
            self._measure()
            giver, *takers = np.argsort(-self.totals, kind="stable")
            if self.totals[giver] <= self.bound:
                return
            trades = [self._best_trade(giver, taker) for taker in takers[: -PARTNERS - 1 : -1]]
            best = min(trades, key=lambda trade: trade.score)
            if best.score == np.inf:
                return
            if best.returned is not None:
                self.place[best.returned] = self.place[best.given]
            self.place[best.given] = best.to

    def _measure(self) -> None:
        """The tokens of each rank; the rows and widest row of each place; what is waited for in each slot."""
        places = self.slots * self.ranks
        self.totals = np.bincount(self.place % self.ranks, weights=self.widths, minlength=self.ranks)
        self.sizes, self.tops = np.bincount(self.place, minlength=places), np.zeros(places, dtype=np.int64)
        np.maximum.at(self.tops, self.place, self.widths)
        self.costliest = (self.sizes * self.tops).reshape(self.slots, self.ranks).max(axis=1)

    def _best_trade(self, giver: int, taker: int) -> _Trade:
        """The one that adds least to what is waited for, and to what the fuller of both has above the bound."""
        rows, returned = (np.flatnonzero(self.place % self.ranks == rank) for rank in (giver, taker))
        source, width, left = (values[:, None] for values in (self.place[rows], self.widths[rows], self._others(rows)))
        # Behind the taker's rows stands, for each of its micro-batches, one of no width: nothing is returned.
        places = np.arange(taker, self.slots * self.ranks, self.ranks)
        to = np.append(self.place[returned], places)
        back = np.append(self.widths[returned], np.zeros(self.slots, dtype=np.int64))
        stay = np.append(self._others(returned), self.tops[places])
        grows = np.arange(len(to)) >= len(returned)

        moved = width - back
        fuller = np.maximum(self.totals[giver] - moved, self.totals[taker] + moved)
        from_cost = (self.sizes[source] - grows) * np.maximum(left, back)
        to_cost = (self.sizes[to] + grows) * np.maximum(stay, width)
        waited = np.maximum(from_cost - self.costliest[source // self.ranks], 0)
        waited += np.maximum(to_cost - self.costliest[to // self.ranks], 0)
        legal = (moved > 0) & (fuller < self.totals[giver]) & (self.sizes[source] > grows)
        legal &= np.maximum(from_cost, to_cost) <= self.most
        scores = np.where(legal, waited + np.maximum(fuller - self.bound, 0), np.inf)
        row, other = np.unravel_index(scores.argmin(), scores.shape)
        swapped = None if grows[other] else int(returned[other])
        return _Trade(float(scores[row, other]), int(rows[row]), int(to[other]), swapped)

    def _others(self, rows: np.ndarray) -> np.ndarray:
        """For each row of one rank the width of the widest other one in its micro-batch; 0 if it is alone."""
        together = self.place[rows][:, None] == self.place[rows]
        np.fill_diagonal(together, False)
        return (together * self.widths[rows]).max(axis=1, initial=0)
