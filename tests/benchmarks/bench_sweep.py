"""How long a sweep of ten ranks takes: .venv/bin/python tests/benchmarks/bench_sweep.py [--rounds N] [--model 25m]

The same ten LoRA runs (ranks 4 to 64, lora_alpha 16, all linear layers, 100 steps, rate 1e-3, float32 on the CPU, no
evaluation, no checkpoints), from the command to the last one's end:

- packed: `launcher=packed`, all in one process on one base, as many at a time as pays;
- warm: one after the other, forked from one process (`launcher=local`);
- cold: one after the other, an interpreter each (`launcher.warm=false`);
- trl: ten `trl sft` commands, one after the other.

In a table of its own, since it does less: the time to the winner, packed with `early_stop=halving`, which evaluates at
its rungs, beside packed with an evaluation at the end; and the share of the samples that it trains on.

`--rows` examples make a step (default 2, some 30 tokens: a device far from busy; 16 keep it busy). `--model` is tiny
(0.8 million parameters, the default) or 25m. Targets: 4 times faster than trl; packed at least 1.15 times as fast as
warm below 64 tokens a step, and never below 0.95; the winner with at most 30% of the samples. Beside each table stands
how many cores one run keeps busy. Rounds are interleaved, in alternating order; medians with their range.
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

from measurement import Timing, machine, write_results
from peer import LLMKIT, closed_world, model_of_25m, words_of_trl
from rich.console import Console
from rich.progress import track
from rich.table import Table

from llmkit.data.reading.sources import shipped_demo
from llmkit.model.tiny import tiny_model

RANKS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 64)
STEPS = 100
LAST = [f"training.eval_steps={STEPS}"]
HALVING = ["early_stop=halving", *LAST]

Way = tuple[str, Callable[[Path], None]]  # its name; runs all of the sweep below a directory


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--rounds", type=int, default=3, help="how often everything is measured (default 3)")
    options.add_argument("--rows", type=int, default=2, help="examples in a step (default 2)")
    options.add_argument("--ranks", type=int, default=len(RANKS), help="how many of the ranks (default all ten)")
    options.add_argument("--model", choices=("tiny", "25m"), default="tiny", help="what is trained (default tiny)")
    options.add_argument("--without-trl", action="store_true", help="leave out the peer, which takes most of the time")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    chosen = options.parse_args()

    with tempfile.TemporaryDirectory(prefix="bench_sweep_") as folder:
        scratch = Path(folder)
        os.environ.update(closed_world(scratch))
        model = tiny_model() if chosen.model == "tiny" else model_of_25m(scratch / "25m")
        bench = Sweeps(scratch, model, rows=chosen.rows, ranks=RANKS[: chosen.ranks])
        described = machine()
        finished = measure(bench.ways(with_trl=not chosen.without_trl), chosen.rounds, scratch / "finished")
        winners = measure(bench.ways_to_the_winner(), chosen.rounds, scratch / "winners")
        samples = [bench.samples[timing.name] for timing in winners]
        cores = bench.cores_of_one_run()
    what = f"{len(bench.ranks)} runs of {STEPS} steps, {chosen.model}, {chosen.rows} examples a step"
    show(what, finished, winners, samples, cores)
    Console().print(", ".join(f"{name} {value}" for name, value in described.items()))
    if chosen.json:
        settings = {"model": chosen.model, "rows": chosen.rows, "ranks": bench.ranks, "steps": STEPS}
        more = {"machine": described, "samples": samples, "cores_of_one_run": cores}
        write_results(chosen.json, [*finished, *winners], **settings, **more)


def measure(ways: list[Way], rounds: int, scratch: Path) -> list[Timing]:
    """Seconds of each way, once a round."""
    timings = [Timing(name) for name, _ in ways]
    pairs = list(zip(timings, ways, strict=True))
    for number in track(range(rounds), description=scratch.name, transient=True):
        for timing, (name, run) in pairs if number % 2 else reversed(pairs):
            began = time.perf_counter()
            run(scratch / str(number) / name.replace(" ", "-"))
            timing.seconds.append(time.perf_counter() - began)
    return timings


class Sweeps:
    """The sweep in each way."""

    def __init__(self, scratch: Path, model: Path, *, rows: int, ranks: tuple[int, ...]):
        self.model, self.rows, self.ranks = model, rows, ranks
        self.data = scratch / "rows" / "train.jsonl"
        self.data.parent.mkdir()
        self.data.write_bytes(shipped_demo("train").read_bytes())
        self.samples: dict[str, int] = {}  # trained on by all runs of a way to the winner

    def ways(self, *, with_trl: bool) -> list[Way]:
        """Those that end when all runs are finished."""
        ours: list[Way] = [
            ("packed", lambda place: self.llmkit(place, "launcher=packed")),
            ("warm single runs", lambda place: self.llmkit(place)),
            ("cold single runs", lambda place: self.llmkit(place, "launcher.warm=false")),
        ]
        return [*ours, ("trl sft", self.trl)] if with_trl else ours

    def ways_to_the_winner(self) -> list[Way]:
        """Those that end when the best run is known."""
        return [
            ("evaluated at the end", lambda place: self.evaluated(place, *LAST)),
            ("halving", lambda place: self.evaluated(place, *HALVING)),
        ]

    def llmkit(self, place: Path, *more: str) -> None:
        """All runs with llmkit."""
        words = [
            *(f"model.path={self.model}", f"data.path={self.data}", "data.validation=null", "method=lora"),
            *(f"training.global_batch_size={self.rows}", f"training.max_steps={STEPS}", "lora.lora_alpha=16"),
            *("training.learning_rate=1e-3", "training.logging_steps=50", "checkpoint=off", "evaluation=off"),
            *("precision=fp32", "hardware=cpu", f"hydra.sweep.dir={place}"),
        ]
        run([*LLMKIT, "-m", f"lora.r={','.join(map(str, self.ranks))}", *words, *more])

    def evaluated(self, place: Path, *more: str) -> None:
        """All runs packed, compared by their loss on held-out rows."""
        self.llmkit(place, "launcher=packed", f"data.validation={shipped_demo('validation')}", *more)
        results = [json.loads(path.read_text(encoding="utf-8")) for path in place.glob("*/result.json")]
        self.samples[place.name.replace("-", " ")] = sum(result["steps"] * self.rows for result in results)

    def trl(self, place: Path) -> None:
        """All runs as commands of TRL."""
        for rank in self.ranks:
            settings = {"lora_r": rank, "max_steps": STEPS, "learning_rate": 1e-3, "logging_steps": 50}
            settings["per_device_train_batch_size"] = self.rows
            run(words_of_trl(self.data.parent, self.model, place / str(rank), **settings))

    def cores_of_one_run(self) -> float:
        """Cores that one run keeps busy while it trains: of what a run of five times the steps takes more."""
        taken = []
        for steps in (STEPS, 5 * STEPS):
            before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            ranks, self.ranks = self.ranks, (8,)
            self.llmkit(self.data.parent / f"steps-{steps}", f"training.max_steps={steps}")
            self.ranks = ranks
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            taken.append((used, time.perf_counter() - began))
        (less_used, less), (used, took) = taken
        return (used - less_used) / (took - less)


def run(command: list[str]) -> None:
    """Raises SystemExit with what a command has said, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def show(what: str, finished: list[Timing], winners: list[Timing], samples: list[int], cores: float) -> None:
    """A table of all, each beside warm single runs and TRL; and one of the ways to the winner."""
    by_name = {timing.name: timing for timing in finished}
    peers = [by_name[name] for name in ("warm single runs", "trl sft") if name in by_name]
    table = Table(title=f"{what}; one run keeps {cores:.1f} cores busy", title_justify="left")
    for heading in ("", "median", "fastest", "slowest", *(f"times as fast as {peer.name}" for peer in peers)):
        table.add_column(heading, justify="right" if heading else "left")
    for timing in finished:
        table.add_row(*timing.row(), *(f"{peer.median / timing.median:.2f}" for peer in peers))
    best = Table(title="packed, until the best run is known", title_justify="left")
    for heading in ("", "median", "fastest", "slowest", "samples", "of all"):
        best.add_column(heading, justify="right" if heading else "left")
    for timing, seen in zip(winners, samples, strict=True):
        best.add_row(*timing.row(), str(seen), f"{seen / max(samples):.0%}")
    console = Console()
    console.print(table)
    console.print(best)


if __name__ == "__main__":
    sys.exit(main())
