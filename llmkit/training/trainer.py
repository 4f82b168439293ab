"""What every recipe's trainer does beyond upstream's: stop at a non-finite value, and commit checkpoints whole."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmkit import rundir
from llmkit.data.encoding.batches import IGNORED
from llmkit.errors import NonFiniteError
from llmkit.training import checkpoints

# fp16's loss scaler overflows by design while it looks for its scale; this many times in a row is a divergence.
FP16_OVERFLOWS_IN_A_ROW = 10


class RunMixin:
    """Put in front of a Transformers or TRL trainer: `class Trainer(RunMixin, SFTTrainer)`."""

    run_dir: Path
    state: Any
    args: Any
    processing_class: Any
    accelerator: Any

    def __init__(self, *args: Any, run_dir: Path, **kwargs: Any):
        self.run_dir = run_dir
        self._batches_of_step: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []
        self._overflows = 0
        self.facts: Callable[[], dict[str, Any]] = dict  # what a checkpoint's manifest says of the run
        self._evaluated = torch.zeros(2)  # summed loss and items of the evaluation under way
        super().__init__(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Remember the step's micro-batches until its gradient is known to be finite."""
        kept = {"input_ids": inputs["input_ids"], "labels": labels_of(inputs)}
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self._batches_of_step.append((kept, loss))
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called once a step, before the optimizer moves anything: a non-finite loss shows in the gradient too."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        value = float(norm)
        if math.isfinite(value):
            self._overflows = 0
        else:
            self._overflows += 1
            scaled = self.accelerator.scaler is not None
            if not scaled or self._overflows >= FP16_OVERFLOWS_IN_A_ROW:
                self._stop_at_non_finite(value)
        self._batches_of_step.clear()
        return norm

    def _stop_at_non_finite(self, grad_norm: float) -> None:
        losses = [float(loss) for _, loss in self._batches_of_step]
        bad = [batch for batch, loss in zip(self._batches_of_step, losses, strict=True) if not math.isfinite(loss)]
        step = self.state.global_step + 1
        record = {
            "step": step,
            "losses": [str(loss) for loss in losses],
            "grad_norm": str(grad_norm),
            "batches": [
                {
                    "texts": self.processing_class.batch_decode(inputs["input_ids"]),
                    "input_ids": inputs["input_ids"].tolist(),
                    "labels": inputs["labels"].tolist(),
                }
                for inputs, _ in (bad or self._batches_of_step)
            ],
        }
        path = self.run_dir / rundir.NON_FINITE_BATCH
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        what = "loss" if bad else "gradient"
        raise NonFiniteError(
            f"step {step}: the {what} is not a finite number (loss {losses}, gradient norm {grad_norm}). "
            f"The batch is in {path}. Try a lower training.learning_rate, more training.warmup_steps, a smaller "
            "training.max_grad_norm, or precision=fp32; and look at the batch."
        )

    def count_items(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """How many items a batch's loss is the mean over: its learnt tokens."""
        return (labels_of(inputs)[..., 1:] != IGNORED).sum()

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one batch, and count what its mean stands for."""
        output = super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        items = self.count_items(inputs).to(output[0].device)
        self._evaluated = self._evaluated.to(items.device) + torch.stack([output[0].detach() * items, items])
        return output

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The loss is the mean over all items.

        Upstream averages the means of batches, so its evaluation loss depends on the batch size (transformers 5.19).
        """
        self._evaluated = torch.zeros(2, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        total, items = self.accelerator.reduce(self._evaluated, "sum")
        if items:
            output.metrics[f"{metric_key_prefix}_loss"] = float(total / items)
        return output

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        step = self.state.global_step
        written = Path(self.args.output_dir) / f"checkpoint-{step}"
        checkpoints.commit(written, self.run_dir, step=step, facts=self.facts())

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Ours is written at the end, for what a user loads."""


def labels_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tokens that a batch is to make likelier or, in the second half of DPO's, less likely; IGNORED elsewhere."""
    if "labels" in inputs:
        return inputs["labels"]
    return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
