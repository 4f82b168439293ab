"""How long ranks wait for one another: .venv/bin/python tests/benchmarks/bench_balance.py [--data FILE] [--json FILE]

Over an epoch of GSM8K (`--data`, default the file beside the checkout), for several numbers of ranks and shapes of a
step, the rows of each step dealt as they come and as llmkit deals them:

- tokens: those of the fullest rank, in means of a step's ranks (target: at most 1.05 with 4 rows per rank and more);
- waiting: what a step takes, padding included, in times of what its tokens alone would take if all ranks had as many.
  Under DDP ranks wait at the end of the step, under ZeRO-3 and FSDP at each micro-batch;
- planning: milliseconds a step, on each rank (median of `--rounds` epochs).
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measurement import Timing, machine, write_results
from rich.console import Console
from rich.table import Table

from llmkit.config.schema import DataConfig, ModelConfig
from llmkit.data.prepare import prepare_data
from llmkit.model.loading import load_tokenizer
from llmkit.training.balance import Rows, deal
from llmkit.training.longest_batch import row_lengths
from llmkit.training.rank_batches import StepBatches

GSM8K = Path(__file__).parents[2] / "../shared/data/gsm8k/train.jsonl"
TARGET = 1.05
# Ranks, micro-batch, accumulation.
SHAPES = [(1, 4, 4), (1, 8, 4), (2, 4, 1), (2, 2, 2), (2, 8, 4), (8, 4, 1), (8, 8, 1), (8, 2, 2), (8, 1, 4), (64, 4, 4)]

Deal = Callable[..., list[list[Rows]]]


def deal_as_they_come(lengths: np.ndarray, *, micro_batch: int, ranks: int) -> list[list[Rows]]:
    """Micro-batches in the order of the rows, dealt to ranks in turn."""
    batches = [np.arange(start, start + micro_batch) for start in range(0, len(lengths), micro_batch)]
    return [batches[first : first + ranks] for first in range(0, len(batches), ranks)]


def measure(steps: list[np.ndarray], how: Deal, *, micro_batch: int, ranks: int) -> dict[str, float]:
    """The mean over steps of each figure but the time."""
    found = []
    for lengths in steps:
        slots = how(lengths, micro_batch=micro_batch, ranks=ranks)
        tokens = np.array([[lengths[batch].sum() for batch in slot] for slot in slots]).sum(axis=0)
        padded = np.array([[len(batch) * lengths[batch].max() for batch in slot] for slot in slots])
        costs = (tokens.max(), padded.sum(axis=0).max(), padded.max(axis=1).sum())
        found.append([cost / tokens.mean() for cost in costs])
    return dict(zip(("tokens", "waiting, DDP", "waiting, ZeRO-3"), np.mean(found, axis=0).tolist(), strict=True))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    options.add_argument("--data", type=Path, default=GSM8K, help="JSON Lines of conversations or questions")
    options.add_argument("--rounds", type=int, default=3, help="epochs whose planning is timed (default 3)")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    chosen = options.parse_args()
    described = machine()
    tokenizer = load_tokenizer(ModelConfig(name="tiny"), "keep-original")
    data = prepare_data(DataConfig(path=str(chosen.data), validation=None), tokenizer, max_length=16384)
    lengths = row_lengths(data.train.dataset)

    table = Table(
        title=f"{len(lengths):,} rows, random order -> dealt (tokens: target {TARGET} from 4 rows per rank on)"
    )
    for column in ("ranks x rows x micro-batches", "tokens", "waiting, DDP", "waiting, ZeRO-3", "planning"):
        table.add_column(column)
    timings, figures = [], {}
    for ranks, micro_batch, accumulation in SHAPES:
        name = f"{ranks} x {micro_batch} x {accumulation}"
        batches = StepBatches(lengths, micro_batch=micro_batch, accumulation=accumulation, seed=42, ranks=ranks)
        size = ranks * micro_batch * accumulation
        steps = [lengths[rows] for rows in batches.global_batches() if len(rows) == size]
        timing = Timing(name)
        for _ in range(chosen.rounds):
            began = time.perf_counter()
            for step in steps:
                deal(step, micro_batch=micro_batch, ranks=ranks)
            timing.seconds.append((time.perf_counter() - began) / len(steps))
        before, after = (measure(steps, how, micro_batch=micro_batch, ranks=ranks) for how in (deal_as_they_come, deal))
        timings.append(timing)
        figures[name] = {"random": before, "dealt": after}
        shown = (f"{before[key]:.3f} -> {after[key]:.3f}" for key in before)
        table.add_row(name, *shown, f"{1000 * timing.median:.2f} ms")
    console = Console()
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in described.items()))
    if chosen.json:
        write_results(chosen.json, timings, machine=described, steps=figures)


if __name__ == "__main__":
    main()
