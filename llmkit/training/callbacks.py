"""What happens beside the optimisation, at Trainer's events: metrics, samples, the best weights, a request to stop."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from llmkit import rundir
from llmkit.data.examples import Conversation
from llmkit.errors import NonFiniteError
from llmkit.training.checkpoints.contents import load_accumulators
from llmkit.training.checkpoints.manifest import read_manifest
from llmkit.training.console import RunConsole
from llmkit.training.generation import AnswerGenerator
from llmkit.training.metrics import MetricsFile
from llmkit.training.ranks import any_rank, is_main, on_main, spread
from llmkit.training.stopping import StopRequest
from llmkit.training.tracking import NoTracker


class Reporting(TrainerCallback):
    """Every log event goes to metrics.jsonl, the terminal and the tracker."""

    def __init__(self, metrics: MetricsFile, console: RunConsole, tracker: NoTracker):
        self.metrics, self.console, self.tracker = metrics, console, tracker
        self._step_ended: float | None = None
        self._interrupted = False  # by an evaluation or a checkpoint since the last step

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.console.begin(step=state.global_step, total=state.max_steps)
        self.metrics.start_clock()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._interrupted and self._step_ended is not None:
            self.metrics.leave_out(time.monotonic() - self._step_ended)
        self._interrupted = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_ended = time.monotonic()
        self.console.step(state.global_step)
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last steps count too

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._interrupted = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._interrupted = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        record = self.metrics.append(logs or {}, step=state.global_step, epoch=state.epoch)
        if record is None:
            return
        self.console.metrics(record)
        self.tracker.log(record)
        if not math.isfinite(record.get("eval_loss", 0.0)):
            raise NonFiniteError(f"step {state.global_step}: the evaluation loss is {record['eval_loss']}.")


class AtBegin(TrainerCallback):
    """Does something, in order, once the trainer has made all ready, before the first step."""

    def __init__(self, *do: Callable[[], None]):
        self.do = list(do)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for one in self.do:
            one()


class Samples(TrainerCallback):
    """A few fixed prompts are answered at each evaluation; the answers are kept in samples.jsonl."""

    def __init__(
        self,
        generator: AnswerGenerator,
        prompts: list[Conversation],
        run_dir: Path,
        console: RunConsole,
        tracker: NoTracker,
        *,
        goes_on: bool,
    ):
        self.generator, self.prompts, self.console, self.tracker = generator, prompts, console, tracker
        self.path = run_dir / rundir.SAMPLES
        if not goes_on and is_main():
            self.path.unlink(missing_ok=True)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.prompts:
            return
        answers = self.generator.answer(self.prompts)
        self.console.samples(answers)
        self.tracker.samples(state.global_step, answers)
        if not is_main():
            return
        with self.path.open("a", encoding="utf-8") as file:
            for answer in answers:
                record = {"step": state.global_step, "prompt": answer.prompt, "answer": answer.answer}
                file.write(json.dumps(record | {"expected": answer.expected}, ensure_ascii=False) + "\n")


class BestWeights(TrainerCallback):
    """Keeps the trained parameters of the best evaluation on disk, and puts them back at the end."""

    def __init__(self, model: nn.Module, run_dir: Path, *, goes_on: bool):
        self.model, self.path = model, run_dir / rundir.BEST_WEIGHTS
        self.best, self.step = math.inf, 0
        if about := on_main(lambda: _about(self.path) if goes_on and self.path.exists() else None):
            self.best, self.step = float(about["eval_loss"]), int(about["step"])
        else:
            self.discard()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        if not state.global_step or state.global_step % args.eval_steps:  # early_stop evaluates at its rungs too
            return
        loss = (metrics or {}).get("eval_loss", math.inf)
        if loss < self.best:
            self.best, self.step = loss, state.global_step
            if not is_main():
                return
            trained = {n: p.detach().cpu().contiguous() for n, p in self.model.named_parameters() if p.requires_grad}
            partial = self.path.with_suffix(".partial")
            save_file(trained, partial, metadata={"eval_loss": repr(self.best), "step": str(self.step)})
            os.replace(partial, self.path)

    def restore(self) -> int:
        """Load the best weights into the model; returns their step, or 0 if there was no evaluation."""
        if not self.step:
            return 0
        saved = load_file(self.path) if is_main() else {}  # other machines may not see the file
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                if is_main():
                    parameter.data.copy_(saved[name])
                spread(parameter.data)
        return self.step

    def discard(self) -> None:
        """Remove the file, once its weights are delivered: until then a run that is killed needs it again."""
        if is_main():
            self.path.unlink(missing_ok=True)


def _about(weights: Path) -> dict[str, str]:
    with safe_open(weights, framework="pt") as saved:
        return saved.metadata()


class Saving(TrainerCallback):
    """Decides at the end of a step what all ranks then do: save, and stop if a signal has asked for it on any of them.

    Args:
        checkpoint: what training goes on from, if it does.
        minutes: a checkpoint is due after this long without one, and at the last step; None: never for that reason.
    """

    def __init__(self, trainer: Any, stop: StopRequest, *, checkpoint: Path | None, minutes: float | None):
        self.trainer, self.stop, self.checkpoint = trainer, stop, checkpoint
        self.seconds = math.inf if minutes is None else 60 * minutes

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.checkpoint is not None:
            load_accumulators(self.trainer, self.checkpoint)
            args.eval_on_start = self.trainer.evaluation_pending = read_manifest(self.checkpoint)["evaluation_pending"]
        self.trainer.writer.last_begun = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        due = time.monotonic() - self.trainer.writer.last_begun > self.seconds
        # What comes after the last step can take long too.
        due |= state.global_step >= state.max_steps and self.seconds < math.inf
        stop, due = any_rank(self.stop.signal is not None, due, device=args.device)
        control.should_save |= stop or due
        control.should_training_stop |= stop
