"""How long llmkit takes to start: .venv/bin/python tests/benchmarks/bench_start.py [--rounds N] [--json FILE]

1. `llmkit train --cfg job` and `llmkit train --help`, from command to prompt (target: 0.6 s).
2. From command to the first training step: `llmkit train` against `trl sft` (target: at most 0.7 of its time).
3. From the start of a sweep's second and later jobs to their first training step: forked from a process that has
   imported the libraries, against a fresh process each, `launcher.warm=false` (target: 1.5 s).

The comparison. Both train the same model (the directory of `model=tiny`) with the same method (LoRA, r=8, alpha 16, all
linear layers), on the same rows (llmkit/data/demo/train.jsonl; loss on the answers only), in batches of 16, in float32
on the CPU, seed 42, no trackers, no checkpoints, no gradient checkpointing. That they do the same is checked: the loss
of the first step must agree. The clock starts with the command and stops when that loss is known outside: a line in
llmkit's metrics.jsonl, a line on trl's output. Both then end by themselves, off the clock.

What is on the clock is what each tool does by itself. llmkit: a driver that composes and checks the config, then a
worker process; the worker also reads and tokenizes 36 held-out rows, which trl is spared. trl: its command line, then
`accelerate launch`'s script process. Rounds are interleaved, each tool going first in every other one; a round that is
not counted warms the file cache, the tiny model and trl's cache of the tokenized data. Sweeps train
the same, one job at a time.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from measurement import Timing, machine, write_results
from peer import LLMKIT, closed_world, words_of_trl
from rich.console import Console
from rich.progress import track
from rich.table import Table

from llmkit.data.reading.sources import shipped_demo
from llmkit.model.tiny import tiny_model

COMMAND_TARGET = 0.6  # seconds
FIRST_STEP_TARGET = 0.7  # of trl's time
JOB_TARGET = 1.5  # seconds
RANKS = (2, 4, 8, 16)  # of a sweep's jobs
POLL_SECONDS = 0.005

FirstStep = tuple[float, float]  # seconds since the command, loss


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--rounds", type=int, default=5, help="how often everything is measured (default 5)")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    chosen = options.parse_args()

    with tempfile.TemporaryDirectory(prefix="bench_start_") as scratch:
        os.environ.update(closed_world(Path(scratch)))
        described = machine()
        commands = time_commands(chosen.rounds)
        steps = time_first_steps(chosen.rounds, Path(scratch))
        jobs = time_jobs(chosen.rounds, Path(scratch))
    ratio = steps[0].median / steps[1].median
    show(commands, steps, jobs, ratio, described)
    if chosen.json:
        write_results(chosen.json, [*commands, *steps, *jobs], machine=described, first_step_ratio=ratio)


def time_commands(rounds: int) -> list[Timing]:
    """The commands that train nothing."""
    timings = [Timing("llmkit train --cfg job"), Timing("llmkit train --help")]
    for counted in track([False] + [True] * rounds, description="commands", transient=True):
        for timing in timings:
            began = time.perf_counter()
            words = timing.name.removeprefix("llmkit train ").split()
            subprocess.run([*LLMKIT, *words], stdout=subprocess.DEVNULL, check=True)
            if counted:
                timing.seconds.append(time.perf_counter() - began)
    return timings


def time_first_steps(rounds: int, scratch: Path) -> list[Timing]:
    """llmkit's and trl's first training step. Raises SystemExit if they do not train the same."""
    model = tiny_model()
    rows = scratch / "rows"
    rows.mkdir()
    shutil.copy(shipped_demo("train"), rows / "train.jsonl")
    timings = [Timing("llmkit train"), Timing("trl sft")]
    tools: list[tuple[Timing, Callable[[Path], FirstStep]]] = [
        (timings[0], lambda output: first_step_of_llmkit(rows / "train.jsonl", model, output)),
        (timings[1], lambda output: first_step_of_trl(rows, model, output)),
    ]
    for number in track(range(rounds + 1), description="first steps", transient=True):
        losses = []
        for timing, first_step in tools if number % 2 else reversed(tools):
            seconds, loss = first_step(scratch / f"{timing.name.split()[0]}{number}")
            losses.append(loss)
            if number > 0:
                timing.seconds.append(seconds)
        if abs(losses[0] - losses[1]) > 0.001:
            raise SystemExit(f"the first losses differ ({losses}): the two do not train the same")
    return timings


def first_step_of_llmkit(rows: Path, model: Path, output: Path) -> FirstStep:
    """Run `llmkit train` for one step; its loss is read from metrics.jsonl."""
    command = [*LLMKIT, f"run_dir={output}", "lora.r=8", *settings_of_llmkit(rows, model)]
    metrics, printed = output / "metrics.jsonl", output.with_suffix(".log")
    with printed.open("w", encoding="utf-8") as log:
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process:
            while process.poll() is None and not (metrics.exists() and "\n" in metrics.read_text(encoding="utf-8")):
                time.sleep(POLL_SECONDS)
            seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"llmkit train failed:\n{printed.read_text(encoding='utf-8')}")
    first = json.loads(metrics.read_text(encoding="utf-8").splitlines()[0])
    return seconds, first["loss"]


def settings_of_llmkit(rows: Path, model: Path) -> list[str]:
    """What is trained, but for the rank."""
    return [
        f"model.path={model}",
        f"data.path={rows}",
        f"data.validation={shipped_demo('validation')}",
        "method=lora",
        "lora.lora_alpha=16",
        "training.per_device_train_batch_size=16",
        "training.max_steps=1",
        "training.logging_steps=1",
        "evaluation=off",
        "precision=fp32",
        "hardware=cpu",
    ]


def time_jobs(rounds: int, scratch: Path) -> list[Timing]:
    """The second and later jobs of sweeps, whose first one pays for the process that they are forked from."""
    settings = settings_of_llmkit(scratch / "rows" / "train.jsonl", tiny_model())
    timings = [Timing("a sweep's job, forked"), Timing("a sweep's job, a fresh process")]
    for number in track(range(rounds + 1), description="sweeps", transient=True):
        for timing in timings if number % 2 else reversed(timings):
            warm = timing is timings[0]
            seconds = first_steps_of_sweep(settings, scratch / f"sweep{number}{warm}", warm=warm)
            if number > 0:
                timing.seconds += seconds[1:]
    return timings


def first_steps_of_sweep(settings: list[str], output: Path, *, warm: bool) -> list[float]:
    """Run a sweep; seconds from when each job's log is opened, just before it is started, to its first loss."""
    words = [f"hydra.sweep.dir={output}", f"launcher.warm={str(warm).lower()}"]
    command = [*LLMKIT, "-m", f"lora.r={','.join(map(str, RANKS))}", *words, *settings]
    started: dict[int, float] = {}
    first: dict[int, float] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        while process.poll() is None:
            for rank in (rank for rank in RANKS if rank not in first):
                run_dir = output / f"r={rank}"
                if rank not in started and (run_dir / "console.log").exists():
                    started[rank] = time.perf_counter()
                metrics = run_dir / "metrics.jsonl"
                if metrics.exists() and "\n" in metrics.read_text(encoding="utf-8"):
                    first[rank] = time.perf_counter()
            time.sleep(POLL_SECONDS)
        printed = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"llmkit train -m failed:\n{printed}")
    return [first[rank] - started[rank] for rank in RANKS]


def first_step_of_trl(rows: Path, model: Path, output: Path) -> FirstStep:
    """Run `trl sft` for one step; its loss is read from its output, which it prints at once."""
    lines, first = [], None
    began = time.perf_counter()
    command = words_of_trl(rows, model, output)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if first is None and "'loss': " in line:
                first = time.perf_counter() - began, float(line.partition("'loss': '")[2].partition("'")[0])
    if process.returncode or first is None:
        raise SystemExit(f"trl sft failed:\n{''.join(lines)}")
    return first


def show(
    commands: list[Timing], steps: list[Timing], jobs: list[Timing], ratio: float, described: dict[str, object]
) -> None:
    """The table, with the targets beside the figures."""
    table = Table("", "median", "fastest", "slowest", "target", title="from command to prompt, and to the first step")
    for timing in commands:
        table.add_row(*timing.row(), f"{COMMAND_TARGET} s")
    table.add_section()
    for timing in steps:
        table.add_row(*timing.row(), "")
    table.add_row("llmkit / trl, of the medians", f"{ratio:.2f}", "", "", f"{FIRST_STEP_TARGET}")
    table.add_section()
    table.add_row(*jobs[0].row(), f"{JOB_TARGET} s")
    table.add_row(*jobs[1].row(), "")
    console = Console()
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in described.items()))


if __name__ == "__main__":
    main()
