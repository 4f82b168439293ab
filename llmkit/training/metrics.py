"""`metrics.jsonl`: the truth about a run, one object per log event. Trackers and the terminal get copies."""

import json
import time
from pathlib import Path
from typing import Any, TextIO

from llmkit import rundir

# Upstream's names -> ours; what is not here keeps its name.
RENAMED = {"num_input_tokens_seen": "tokens", "eval_runtime": "eval_seconds"}
DROPPED = {"eval_samples_per_second", "eval_steps_per_second", "eval_num_tokens", "num_tokens", "epoch", "total_flos"}
DROPPED |= {"eval_model_preparation_time"}  # once, before training
DROPPED |= {"train_runtime", "train_tokens_per_second"}  # over the whole session; ours are since the last record


class MetricsFile:
    """Appends records to those there were when the checkpoint was made that the run goes on from, or begins anew.

    Args:
        origin: the checkpoint that the run goes on from, if it does.
        written: whether there is a file; else the records are only kept in `records`, as on a rank that does not write.
    """

    def __init__(self, run_dir: Path, *, origin: Path | None = None, written: bool = True):
        self.records = read_metrics(origin) if origin else []
        self._file = _open(run_dir / rundir.METRICS, goes_on=origin is not None) if written else None
        self._last = (time.monotonic(), last_tokens(self.records))

    def append(self, logs: dict[str, Any], *, step: int, epoch: float | None) -> dict[str, Any] | None:
        """Write one record from Trainer's logs, with tokens per second since the last, and return it.

        None for Trainer's summary at its end, which has nothing new.
        """
        if "train_loss" in logs:
            return None
        record: dict[str, Any] = {"step": step, "epoch": epoch and round(epoch, 4)}
        record |= {RENAMED.get(key, key): value for key, value in logs.items() if key not in DROPPED}
        if "loss" not in record:
            record.pop("tokens", None)
        if "tokens" in record:
            then, tokens = self._last
            record["tokens_per_second"] = round((record["tokens"] - tokens) / (time.monotonic() - then), 1)
            self._last = (time.monotonic(), record["tokens"])
        self.records.append(record)
        if self._file:
            self._file.write(json.dumps(record) + "\n")
        return record

    def eval_loss_at(self, step: int) -> float | None:
        """The loss of the last evaluation, if it was at this step."""
        last = next((record for record in reversed(self.records) if "eval_loss" in record), None)
        return last["eval_loss"] if last is not None and last["step"] == step else None

    def start_clock(self) -> None:
        """Tokens per second count from now on."""
        self._last = (time.monotonic(), self._last[1])

    def leave_out(self, seconds: float) -> None:
        """These seconds (of evaluation or saving) do not count for tokens per second."""
        self._last = (self._last[0] + seconds, self._last[1])

    def close(self) -> None:
        """No more records come."""
        if self._file:
            self._file.close()


def _open(path: Path, *, goes_on: bool) -> TextIO:
    return path.open("a" if goes_on else "w", encoding="utf-8", buffering=1)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run; a line cut off by a kill is left out."""
    return read_records(run_dir / rundir.METRICS)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file of ours, in order; none if there is no file."""
    if not path.exists():
        return []
    records = []
    # A line that is being written may end within a character; and U+2028 in an answer ends no line.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def last_tokens(records: list[dict[str, Any]]) -> int:
    """Tokens trained on so far."""
    return next((record["tokens"] for record in reversed(records) if "tokens" in record), 0)


def eval_loss_interval(records: list[dict[str, Any]], *, step: int) -> list[float] | None:
    """The 95% interval around the loss of the last evaluation at this step; None where it is not known."""
    evaluation: dict[str, Any] = next((r for r in reversed(records) if r["step"] == step and "eval_loss" in r), {})
    return [evaluation["eval_loss_low"], evaluation["eval_loss_high"]] if "eval_loss_low" in evaluation else None


def mean_loss(records: list[dict[str, Any]]) -> float | None:
    """The mean training loss over all steps: a record's loss is the mean since the one before."""
    total, step = 0.0, 0
    for record in records:
        if "loss" in record:
            total, step = total + record["loss"] * (record["step"] - step), record["step"]
    return total / step if step else None


def draw_losses(records: list[dict[str, Any]], run_dir: Path) -> Path | None:
    """`loss.png`: train and evaluation loss over steps; None if there is nothing to draw."""
    curves = {
        "train": [(r["step"], r["loss"]) for r in records if "loss" in r],
        "evaluation": [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r],
    }
    if not any(curves.values()):
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), "o-" if name == "evaluation" else "-", label=name, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    path = run_dir / rundir.LOSS_PLOT
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
