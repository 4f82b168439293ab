"""How long training waits for a save: .venv/bin/python tests/benchmarks/bench_checkpoint.py [--rounds N] [--json FILE]

One SFT run (method=full, AdamW, float32, CPU) of a Llama with random weights, a few hundred MB of them, is saved every
few steps: once by llmkit, which copies the values and writes them in the background, once by Transformers' own
`_save_checkpoint`, which writes them before the next step; each way goes first in every other round. Both write
weights, optimizer, scheduler and random states; llmkit also makes them durable (fsync) and hashes them (SHA-256).

Measured are the stall, from the call that saves until training goes on, and the steps that follow, which the writing
in the background slows down where it has no core of its own. Off the clock, a save is completed and on the disk before
the next one begins. The first save of each way is shown apart: llmkit's buffers in host memory are new to it.
"""

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measurement import Timing, machine, write_results
from rich.console import Console
from rich.table import Table

CHECKOUT = Path(__file__).parents[2]
sys.path.insert(0, str(CHECKOUT / "tests" / "training"))
WAYS = ("llmkit", "Transformers")
LAYERS, HIDDEN, VOCABULARY = 8, 768, 8192
ROW = 16  # tokens


@dataclass
class Saves:
    """What the saves of one way cost, in the order they were made."""

    stalls: list[float] = field(default_factory=list)  # seconds
    steps_after: list[float] = field(default_factory=list)  # seconds of all steps until the next save


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    options.add_argument("--rounds", type=int, default=5, help="saves of each way after the first (default 5)")
    options.add_argument("--steps", type=int, default=6, help="training steps between two saves (default 6)")
    options.add_argument("--layers", type=int, default=LAYERS, help=f"of the model, 28 MB each (default {LAYERS})")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    chosen = options.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # so that other work on the machine disturbs less
    with tempfile.TemporaryDirectory(prefix="bench_checkpoint_") as scratch:
        os.environ |= {"LLMKIT_CACHE": f"{scratch}/llmkit", "HF_HOME": f"{scratch}/hub", "HF_HUB_OFFLINE": "1"}
        described = machine()
        saves, megabytes = measure(Path(scratch), chosen.rounds, chosen.steps, chosen.layers)
    show(saves, megabytes, chosen.steps)
    if chosen.json:
        timings = [Timing(f"{way}, {what}", list(values)) for way in WAYS for what, values in figures(saves[way])]
        write_results(chosen.json, timings, machine=described, steps=chosen.steps, **megabytes)


def measure(scratch: Path, rounds: int, steps: int, layers: int) -> tuple[dict[str, Saves], dict[str, float]]:
    """What the saves of each way cost, and the sizes in MB of the weights and of a checkpoint."""
    from recipe_trainers import make_trainer, random_rows
    from train_config import config_of

    order = [way for number in range(rounds + 1) for way in (WAYS if number % 2 == 0 else WAYS[::-1])]
    config = config_of(
        *("model=tiny", f"model.path={write_model(scratch / 'model', layers)}", "data=demo", "method=full"),
        *("hardware=cpu", "precision=fp32", "training.per_device_train_batch_size=1"),
        *("training.gradient_accumulation_steps=1", f"training.save_steps={steps}"),
        f"training.max_steps={steps * (len(order) + 1)}",
    )
    trainer = make_trainer(config, scratch / "run", random_rows([ROW] * 16))
    watch = Stopwatch(trainer, order)
    trainer.add_callback(watch.callback())
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    trainer.writer.wait()
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    return watch.saves, {"weights_mb": weights / 1e6, "checkpoint_mb": watch.checkpoint_bytes / 1e6}


def write_model(directory: Path, layers: int) -> Path:
    """A Llama with random weights, and the tokenizer of model=tiny."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from llmkit.model.tiny import tiny_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=HIDDEN // 64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_model()).save_pretrained(directory)
    return directory


class Stopwatch:
    """Has a trainer save in the given ways in turn, and measures what that costs its training."""

    def __init__(self, trainer: Any, order: list[str]):
        from llmkit.training.trainer import RunMixin

        self.trainer, self.order = trainer, iter(order)
        self.saves = {way: Saves() for way in WAYS}
        self.checkpoint_bytes = 0
        self._save = {
            "llmkit": trainer._save_checkpoint,
            "Transformers": super(RunMixin, trainer)._save_checkpoint,
        }
        trainer._save_checkpoint = self.save
        self._current: Saves | None = None  # whose steps are being measured
        self._step_began = 0.0

    def save(self, model: Any, trial: Any) -> None:
        """In place of the trainer's own."""
        self._settle()
        way = next(self.order, None)
        if way is None:  # the last save only ends the steps of the one before
            self._current = None
            return
        self._current = self.saves[way]
        began = time.perf_counter()
        self._save[way](model, trial)
        self._current.stalls.append(time.perf_counter() - began)
        self._current.steps_after.append(0.0)

    def _settle(self) -> None:
        """Off the clock: the save before is complete and on the disk, and what Transformers wrote is gone."""
        self.trainer.writer.wait()
        for written in Path(self.trainer.args.output_dir).glob("checkpoint-*"):
            self.checkpoint_bytes = sum(file.stat().st_size for file in written.iterdir())
            shutil.rmtree(written)
        os.sync()

    def callback(self) -> Any:
        """Adds up the seconds of the steps behind each save."""
        from transformers import TrainerCallback

        watch = self

        class Steps(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                watch._step_began = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if watch._current:
                    watch._current.steps_after[-1] += time.perf_counter() - watch._step_began

        return Steps()


def figures(saves: Saves) -> list[tuple[str, list[float]]]:
    """What is shown of the saves of one way: a name and the seconds."""
    return [
        ("stall, first save", saves.stalls[:1]),
        ("stall", saves.stalls[1:]),
        ("steps after", saves.steps_after[1:]),
        ("both", [stall + steps for stall, steps in zip(saves.stalls[1:], saves.steps_after[1:], strict=True)]),
    ]


def show(saves: dict[str, Saves], megabytes: dict[str, float], steps: int) -> None:
    """The table: medians, fastest and slowest."""
    sizes = f"{megabytes['weights_mb']:.0f} MB of weights, {megabytes['checkpoint_mb']:.0f} MB a checkpoint"
    table = Table("", "median", "fastest", "slowest", title=f"a save and the {steps} steps behind it: {sizes}")
    rows = [[Timing(f"{way}, {what}", values) for what, values in figures(saves[way])] for way in WAYS]
    for ours, theirs in zip(*rows, strict=True):
        table.add_row(*ours.row())
        table.add_row(*theirs.row())
        table.add_row("llmkit / Transformers", f"{ours.median / theirs.median:.2f}", end_section=True)
    Console().print(table)


if __name__ == "__main__":
    main()
