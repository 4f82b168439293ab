"""What a run says: one fact a line, progress with the time left, answers. Plain lines where there is no terminal."""

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llmkit.training.generation import Answer


class _Terminal(RichConsole):
    """A console whose reader may leave (`| head`, a closed pager): the run goes on in silence."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class RunConsole:
    """Prints a run's facts, metrics and samples; the bar appears only on a terminal."""

    def __init__(self) -> None:
        self._rich = _Terminal(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: Any = None
        self._total = 0
        self._began = (0.0, 0)  # time and step at which this process began to train

    def fact(self, name: str, value: str) -> None:
        """`name   value`, aligned with the other facts."""
        self._rich.print(f"{name:<10} {value}", markup=False)

    def warn(self, text: str) -> None:
        """A warning, on stderr."""
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def begin(self, *, step: int, total: int) -> None:
        """Training starts at `step` of `total`."""
        self._total, self._began = total, (time.monotonic(), step)
        if self._rich.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
            self._progress = Progress(
                *columns,
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self._rich,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task("training", total=total, completed=step)

    def step(self, step: int) -> None:
        """One more step is done."""
        if self._progress:
            self._progress.update(self._task, completed=step)

    def metrics(self, record: dict[str, Any]) -> None:
        """A record of metrics.jsonl: beside the bar on a terminal, a line elsewhere; an evaluation is always a line."""
        if "eval_loss" in record:
            parts = [f"eval loss {record['eval_loss']:.4f}"]
            if "eval_rewards/accuracies" in record and record["step"]:  # before the first step all rewards are 0
                parts.append(f"reward accuracy {record['eval_rewards/accuracies']:.1%}")
                parts.append(f"margin {record['eval_rewards/margins']:.2f}")
            elif "eval_mean_token_accuracy" in record and "eval_rewards/accuracies" not in record:
                parts.append(f"token accuracy {record['eval_mean_token_accuracy']:.1%}")
        elif "loss" in record:
            parts = [f"loss {record['loss']:.4f}", f"lr {record.get('learning_rate', 0):.2e}"]
            parts += [f"reward margin {record['rewards/margins']:.2f}"] if "rewards/margins" in record else []
            parts += [f"grad norm {record['grad_norm']:.2f}"] if "grad_norm" in record else []
            parts += [f"{record['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in record else []
            parts += [f"ETA {self._time_left(record['step'])}"]
        else:
            return
        if self._progress and "loss" in record:
            self._progress.update(self._task, description="  ".join(parts[:-1]))
        else:
            self._rich.print(
                f"step {record['step']}{f'/{self._total}' if self._total else ''}  " + "  ".join(parts), markup=False
            )

    def _time_left(self, step: int) -> str:
        then, first = self._began
        if step <= first:
            return "-"
        seconds = (time.monotonic() - then) / (step - first) * (self._total - step)
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}"

    def samples(self, answers: Sequence[Answer]) -> None:
        """A few prompts with the answers of now."""
        for answer in answers:
            self._rich.print(f"  {_short(answer.prompt)} -> {_short(answer.answer)}", markup=False)

    def end(self) -> None:
        """Training is over; the bar goes away."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def table(self, title: str, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A small table."""
        from rich.table import Table

        table = Table(title=title, title_justify="left", show_edge=False)
        for name in heading:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*row)
        self._rich.print(table, soft_wrap=False)


def _short(text: str, limit: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
