"""How fast llmkit trains beside TRL: .venv/bin/python tests/benchmarks/bench_train.py [--rounds N] [--rows N]

One pass over the first `--rows` (default 320) questions of GSM8K, as chats, with the tiny model and LoRA (r=8, alpha
16, all linear layers), 8 rows a step, rate 1e-3, on the CPU; `llmkit train` as it comes, `trl sft` with TRL's own
defaults (gradient checkpointing, bf16), and `trl sft` with the settings that llmkit has chosen. Measured are

- learnt tokens a second, from the first step to the last: the same rows in each, in another order (target: 1.5 times
  TRL's defaults);
- the most memory of any process;
- the mean loss of the last quarter of the steps, which must agree: the same is learnt.

Rounds are interleaved; medians with their range.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from measurement import machine, write_results
from peer import LLMKIT, closed_world, words_of_trl
from rich.console import Console
from rich.progress import track
from rich.table import Table

from llmkit.model.tiny import tiny_model

GSM8K = Path(__file__).parents[2] / "../shared/data/gsm8k/train.jsonl"
ROWS_A_STEP = 8
ALIKE = 0.05  # of the loss
TARGET = 1.5


@dataclass
class Way:
    """One way to train, and what was measured of it, once a round."""

    name: str
    command: Callable[[Path], list[str]]  # given a place for its output
    losses: Callable[[Path, str], list[float]]  # of the steps so far, given that place and what it has printed
    tokens_per_second: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)  # GiB
    loss: list[float] = field(default_factory=list)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--rounds", type=int, default=3, help="how often everything is measured (default 3)")
    options.add_argument("--rows", type=int, default=320, help="examples to train on (default 320)")
    options.add_argument("--data", type=Path, default=GSM8K, help="JSON Lines of questions and answers")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    chosen = options.parse_args()

    with tempfile.TemporaryDirectory(prefix="bench_train_") as folder:
        scratch = Path(folder)
        os.environ.update(closed_world(scratch))
        rows = write_rows(chosen.data, scratch / "rows" / "train.jsonl", chosen.rows)
        described, steps = machine(), chosen.rows // ROWS_A_STEP
        all_ways = ways(rows, steps)
        for number in track(range(chosen.rounds), description="training", transient=True):
            for way in all_ways if number % 2 else reversed(all_ways):
                train(way, scratch / f"{number}-{way.name.replace(' ', '-')}", steps=steps, learnt=learnt_tokens(rows))
    show(all_ways, described)
    if chosen.json:
        write_results(chosen.json, [], machine=described, ways={way.name: figures(way) for way in all_ways})


def write_rows(source: Path, rows: Path, count: int) -> Path:
    """The first questions as chats."""
    rows.parent.mkdir()
    with source.open(encoding="utf-8") as lines, rows.open("w", encoding="utf-8") as file:
        for line, _ in zip(lines, range(count), strict=False):
            row = json.loads(line)
            turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return rows


def learnt_tokens(rows: Path) -> int:
    """Those of the answers and their ends of turn: the tiny model has a token for each byte and each marker."""
    answers = [json.loads(line)["messages"][1]["content"] for line in rows.read_text(encoding="utf-8").splitlines()]
    return sum(len(answer.encode()) + 1 for answer in answers)


def ways(rows: Path, steps: int) -> list[Way]:
    """llmkit, TRL's defaults, TRL with llmkit's settings."""
    model = tiny_model()
    ours = [
        *(f"model.path={model}", f"data.path={rows}", "data.validation=null", "method=lora", "lora.r=8"),
        *("lora.lora_alpha=16", f"training.global_batch_size={ROWS_A_STEP}", f"training.max_steps={steps}"),
        *("training.learning_rate=1e-3", "training.logging_steps=1", "checkpoint=off", "evaluation=off"),
    ]
    theirs = {"max_steps": steps, "learning_rate": 1e-3, "per_device_train_batch_size": ROWS_A_STEP}
    defaults = dict.fromkeys(("gradient_checkpointing", "bf16", "dtype"))

    def trl(**more: object) -> Callable[[Path], list[str]]:
        return lambda place: words_of_trl(rows.parent, model, place, **theirs, **more)

    return [
        Way("llmkit train", lambda place: [*LLMKIT, f"run_dir={place}", *ours], losses_of_llmkit),
        Way("trl sft, its defaults", trl(**defaults), losses_of_trl),
        Way("trl sft, llmkit's settings", trl(), losses_of_trl),
    ]


def losses_of_llmkit(place: Path, _printed: str) -> list[float]:
    metrics = place / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    return [json.loads(line)["loss"] for line in lines if line.endswith("}") and '"loss"' in line]


def losses_of_trl(_place: Path, printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", printed)]


def train(way: Way, place: Path, *, steps: int, learnt: int) -> None:
    """Run it once. The clock runs from the first step's loss to the last one's."""
    log = place.with_suffix(".log")
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(way.command(place), stdout=output, stderr=subprocess.STDOUT)
    seen: dict[int, float] = {}
    status = None
    while status is None:
        time.sleep(0.01)
        pid, ended, usage = os.wait4(process.pid, os.WNOHANG)
        status = os.waitstatus_to_exitcode(ended) if pid else None
        losses = way.losses(place, log.read_text(encoding="utf-8"))
        seen.setdefault(len(losses), time.perf_counter())
    if status or len(losses) < steps:
        raise SystemExit(f"{way.name} failed:\n{log.read_text(encoding='utf-8')}")
    first = min(count for count in seen if count)
    way.tokens_per_second.append(learnt * (steps - first) / steps / (seen[steps] - seen[first]))
    way.memory.append(usage.ru_maxrss / 2**20)
    way.loss.append(statistics.mean(losses[-math.ceil(steps / 4) :]))


def figures(way: Way) -> dict[str, list[float]]:
    """All that was measured of a way."""
    return {"tokens_per_second": way.tokens_per_second, "memory_gib": way.memory, "loss": way.loss}


def show(all_ways: list[Way], described: dict[str, object]) -> None:
    """The table; raises SystemExit if the ways have not learnt the same."""
    fast = {way.name: statistics.median(way.tokens_per_second) for way in all_ways}
    table = Table(title=f"learnt tokens a second (target: {TARGET} times TRL's defaults)", title_justify="left")
    for heading in ("", "median", "slowest", "fastest", "times TRL's defaults", "memory, GiB", "loss"):
        table.add_column(heading, justify="right" if heading else "left")
    for way in all_ways:
        rates = [f"{value:,.0f}" for value in (fast[way.name], min(way.tokens_per_second), max(way.tokens_per_second))]
        ratio, memory = fast[way.name] / fast[all_ways[1].name], statistics.median(way.memory)
        table.add_row(way.name, *rates, f"{ratio:.2f}", f"{memory:.2f}", f"{statistics.median(way.loss):.3f}")
    console = Console()
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in described.items()))
    losses = [statistics.median(way.loss) for way in all_ways]
    if max(losses) > (1 + ALIKE) * min(losses):
        raise SystemExit(f"the losses differ ({losses}): the ways do not learn the same")


if __name__ == "__main__":
    sys.exit(main())
