"""How long a sweep of ten ranks takes: .venv/bin/python tests/benchmarks/bench_sweep.py [--rounds N] [--rows N]

The same ten LoRA runs (ranks 4 to 64, lora_alpha 16, all linear layers, 100 steps, rate 1e-3, float32 on the CPU, no
evaluation, no checkpoints), from the command to the last one's end:

- packed: `launcher=packed`, all in one process on one base, as many at a time as pays;
- warm: one after the other, forked from one process (`launcher=local`);
- cold: one after the other, an interpreter each (`launcher.warm=false`);
- trl: ten `trl sft` commands, one after the other.

And, apart from these since it does less, the time to the winner: packed with `early_stop=halving`, which evaluates at
its rungs, beside packed with an evaluation at the end, and the share of the samples that it trains on.

`--rows` examples make a step (default 2: about 40 tokens with the demo's rows, a device far from busy; 16 fill it).
Targets: 4 times faster than trl; packed at least 1.15 of warm below 64 tokens a step, and never below 0.95; the winner
with at most 30% of the samples. Beside each figure stands how busy one run keeps the cores: without idle cores packing
has nothing to gain but one start. Rounds are interleaved, in alternating order; medians with their range.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench_start import LLMKIT, closed_world, words_of_trl
from measurement import Timing, machine, write_results
from rich.console import Console
from rich.progress import track
from rich.table import Table

from llmkit.data.reading.sources import shipped_demo
from llmkit.model.tiny import tiny_model

RANKS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 64)
STEPS = 100
RATE = 1e-3


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--rounds", type=int, default=3, help="how often everything is measured (default 3)")
    options.add_argument("--rows", type=int, default=2, help="examples in a step (default 2)")
    options.add_argument("--ranks", type=int, default=len(RANKS), help="how many of the ranks (default all ten)")
    options.add_argument("--without-trl", action="store_true", help="leave out the peer, which takes most of the time")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    chosen = options.parse_args()

    with tempfile.TemporaryDirectory(prefix="bench_sweep_") as scratch:
        os.environ.update(closed_world(Path(scratch)))
        bench = Sweeps(Path(scratch), rows=chosen.rows, ranks=RANKS[: chosen.ranks])
        ways: list[tuple[str, Callable[[str], None]]] = [
            ("packed", lambda name: bench.llmkit(name, "launcher=packed")),
            ("warm single runs", lambda name: bench.llmkit(name)),
            ("cold single runs", lambda name: bench.llmkit(name, "launcher.warm=false")),
            *([] if chosen.without_trl else [("trl sft", bench.trl)]),
            ("to the winner: packed, evaluated at the end", lambda name: bench.llmkit(name, "launcher=packed", *LAST)),
            ("to the winner: packed, halving", lambda name: bench.llmkit(name, "launcher=packed", *HALVING)),
        ]
        timings = [Timing(name) for name, _ in ways]
        pairs = list(zip(timings, ways, strict=True))
        for number in track(range(chosen.rounds), description="sweeps", transient=True):
            for timing, (name, run) in pairs if number % 2 else reversed(pairs):
                began = time.perf_counter()
                run(f"{name.replace(' ', '-').replace(':', '')}-{number}")
                timing.seconds.append(time.perf_counter() - began)
        samples, busy = bench.samples, bench.busy()
        described = machine()
    show(timings, rows=chosen.rows, samples=samples, busy=busy)
    if chosen.json:
        write_results(chosen.json, timings, machine=described, rows=chosen.rows, samples=samples, busy=busy)


HALVING = ["early_stop=halving", f"training.eval_steps={STEPS}"]
LAST = [f"training.eval_steps={STEPS}"]


class Sweeps:
    """Runs the sweep in each way; every run leaves what it has done below `scratch`."""

    def __init__(self, scratch: Path, *, rows: int, ranks: tuple[int, ...]):
        self.scratch, self.rows, self.ranks = scratch, rows, ranks
        self.model = tiny_model()
        self.data = shipped_demo("train")
        self.samples: dict[str, int] = {}  # trained on by all runs of a way

    def llmkit(self, name: str, *more: str) -> None:
        """The sweep as llmkit runs it with these words."""
        evaluated = any(word.startswith("training.eval_steps") for word in more)
        words = [
            *(f"model.path={self.model}", f"data.path={self.data}", "method=lora", "lora.lora_alpha=16"),
            *(f"training.global_batch_size={self.rows}", f"training.max_steps={STEPS}"),
            *(f"training.learning_rate={RATE}", "training.logging_steps=50", "checkpoint=off"),
            *("evaluation=off", "precision=fp32", "hardware=cpu", f"name={name}"),
            f"data.validation={shipped_demo('validation') if evaluated else 'null'}",
        ]
        command = [*LLMKIT, "-m", f"lora.r={','.join(map(str, self.ranks))}", *words, *more]
        done = subprocess.run(command, cwd=self.scratch, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        results = [json.loads(path.read_text()) for path in self.scratch.glob(f"runs/{name}/*/result.json")]
        self.samples[name.rpartition("-")[0]] = sum(result["steps"] * self.rows for result in results)

    def trl(self, name: str) -> None:
        """The same runs as ten commands of TRL."""
        rows = self.scratch / "rows"
        if not rows.exists():
            rows.mkdir()
            (rows / "train.jsonl").write_bytes(self.data.read_bytes())
        for rank in self.ranks:
            command = words_of_trl(
                *(rows, self.model, self.scratch / name / str(rank)),
                lora_r=rank,
                per_device_train_batch_size=self.rows,
                max_steps=STEPS,
                learning_rate=RATE,
                logging_steps=50,
            )
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"trl sft failed:\n{done.stdout}{done.stderr}")

    def busy(self) -> float:
        """Cores that one run keeps busy while it trains: its processor time over its time, for 400 steps more."""
        seconds = []
        for steps in (STEPS, 5 * STEPS):
            before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            words = [f"training.max_steps={steps}", f"name=busy-{steps}", "launcher.warm=false"]
            ranks, self.ranks = self.ranks, (8,)
            self.llmkit(f"busy-{steps}", *words)
            self.ranks = ranks
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            seconds.append((used, time.perf_counter() - began))
        (less_used, less), (used, took) = seconds
        return (used - less_used) / (took - less)


def show(timings: list[Timing], *, rows: int, samples: dict[str, int], busy: float) -> None:
    """A table of all, each beside warm single runs."""
    warm = next(timing for timing in timings if timing.name.startswith("warm"))
    table = Table(title=f"ten runs of {STEPS} steps, {rows} examples a step; one run keeps {busy:.1f} cores busy")
    for heading in ("", "median", "fastest", "slowest", "times as fast as warm", "samples"):
        table.add_column(heading, justify="left" if not heading else "right")
    for timing in timings:
        seen = samples.get(timing.name.replace(" ", "-").replace(":", ""))
        table.add_row(*timing.row(), f"{warm.median / timing.median:.2f}", "" if seen is None else str(seen))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
