"""What packing gains on this GPU: python tests/gpu/measure_packed.py [--shapes NAME ...] [--rounds N]

Ten LoRA runs (ranks 4 to 64) with one row of 512 tokens a step, in bf16, on models of random weights in the shape of a
real one: `launcher=packed` beside `launcher=local`, which trains one after the other, warm. Each sweep is run with few
and with many steps, and what the many take more is counted: loading and starting are in neither. Printed for each shape
are the milliseconds of a step of all ten, how many times as fast packing is (targets: 4 with TinyLlama-1.1B, 1.3 with
7B), and the MFU (see measure_training.py) of a single run: near what a large matrix product reaches, there is nothing
to gain. Rounds are interleaved; medians.

`--shapes tiny --device cpu` tries the script itself on a machine without a GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure_training import CHECKOUT, HARDWARE, SHAPES, Case, flops_per_token, make_model, reachable_flops, write_rows
from rich.console import Console
from rich.table import Table

RANKS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 64)
FEW, MANY = 10, 60  # steps
ROW_TOKENS = {"cuda": 512, "cpu": 32}
LAUNCHERS = ("local", "packed")


def seconds_of(launcher: str, steps: int, place: Path, words: list[str]) -> float:
    """Of a whole sweep, from the command to the last run's end. Raises SystemExit with what it says if it fails."""
    sweep = [f"launcher={launcher}", f"training.max_steps={steps}", f"hydra.sweep.dir={place}"]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "llmkit", "train", "-m", f"lora.r={','.join(map(str, RANKS))}", *sweep, *words],
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"launcher={launcher} failed:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - began


def seconds_a_step(folder: Path, words: list[str], rounds: int) -> dict[str, float]:
    """Launcher -> the median of what a step of all runs takes."""
    found: dict[str, list[float]] = {launcher: [] for launcher in LAUNCHERS}
    for number in range(rounds):
        for launcher in LAUNCHERS if number % 2 else reversed(LAUNCHERS):
            few, many = (
                seconds_of(launcher, steps, folder / f"{number}-{launcher}-{steps}", words) for steps in (FEW, MANY)
            )
            found[launcher].append((many - few) / (MANY - FEW))
    return {launcher: statistics.median(seconds) for launcher, seconds in found.items()}


def main() -> None:
    """Measure and print the table."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tinyllama-1.1b", "mistral-7b"])
    options.add_argument("--rounds", type=int, default=3, help="how often everything is measured (default 3)")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--json", type=Path, help="write the figures there too")
    asked = options.parse_args()
    tokens, reachable = ROW_TOKENS[asked.device], reachable_flops(asked.device)
    table, figures = Table(title=f"a step of {len(RANKS)} runs, 1 x {tokens} tokens each", title_justify="left"), []
    for heading in ("shape", "one after the other", "packed", "times as fast", "MFU of a single run"):
        table.add_column(heading)
    for name in asked.shapes:
        with tempfile.TemporaryDirectory() as folder:
            model, shape = Path(folder) / "model", SHAPES[name]
            model.mkdir()
            parameters = make_model(shape, model)
            write_rows(Path(folder), tokens)
            words = [
                *(f"model.path={model}", f"data.path={folder}/chats.jsonl", "data.validation=null", "method=lora"),
                *(f"hardware={HARDWARE[asked.device]}", "precision=bf16", "evaluation=off", "checkpoint=off"),
                *("training.global_batch_size=1", "training.logging_steps=10"),
            ]
            local, packed = seconds_a_step(Path(folder), words, asked.rounds).values()
        flops = flops_per_token(Case("lora", [], forwards=0), shape, parameters, tokens) * tokens * len(RANKS)
        share = flops / local / reachable
        row = (f"{1e3 * local:.0f} ms", f"{1e3 * packed:.0f} ms", f"{local / packed:.2f}", f"{share:.0%}")
        table.add_row(name, *row)
        figures.append({"shape": name, "local": local, "packed": packed, "mfu_of_a_single_run": share})
    Console(width=120).print(table)
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
