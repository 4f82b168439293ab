"""What every recipe's trainer does beyond upstream's: stop at a non-finite value, and commit checkpoints whole."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Sampler
from transformers.integrations import is_deepspeed_zero3_enabled

from llmkit import rundir
from llmkit.data.encoding.batches import IGNORED
from llmkit.errors import NonFiniteError, Stopped
from llmkit.training.checkpoints.contents import collect, load_divided, load_weights, state_files
from llmkit.training.checkpoints.saving import CheckpointWriter
from llmkit.training.engine import engine_in_use, shard_weights
from llmkit.training.estimate import ratio
from llmkit.training.longest_batch import row_lengths
from llmkit.training.rank_batches import Blank, EvaluationBatches, StepBatches, rank_loader
from llmkit.training.ranks import any_rank, gathered, is_main
from llmkit.training.stopping import StopRequest
from llmkit.training.walks import shorten_walks

# fp16's loss scaler overflows by design while it looks for its scale; this many times in a row is a divergence.
FP16_OVERFLOWS_IN_A_ROW = 10


class EvaluationStopped(Exception):
    """A request to stop came in while an evaluation was under way."""


class RunMixin:
    """Put in front of a Transformers or TRL trainer: `class Trainer(RunMixin, SFTTrainer)`."""

    run_dir: Path
    model: Any
    state: Any
    args: Any
    train_dataset: Any
    eval_dataset: Any
    data_collator: Any
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    _tr_loss: torch.Tensor
    _total_loss_scalar: float
    _globalstep_last_logged: int
    _total_train_tokens: int
    _metrics: dict[str, Any]
    model_wrapped: Any
    processing_class: Any
    accelerator: Any
    control: Any

    def __init__(self, *args: Any, run_dir: Path, **kwargs: Any):
        self.run_dir = run_dir
        self._batches_of_step: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []
        self._overflows = 0
        self._operations_per_token: int | None = None
        self._trained: list[torch.nn.Parameter] | None = None  # where the model visits no more than these
        # What the run adds to its checkpoints: for the manifest, and files of its own (see CheckpointWriter.save).
        self.facts: Callable[[], dict[str, Any]] = dict
        self.run_files: Callable[[], dict[str, Any]] = dict
        self.stop = StopRequest()
        self.evaluation_pending = False  # whether the last step was to be evaluated and has not been
        self.may_stop: Callable[[], bool] = lambda: True  # whether a request to stop may end an evaluation now
        self.writer = CheckpointWriter(run_dir, keep=1, warn=print)
        self._evaluated = torch.zeros(2, dtype=torch.float64)  # summed loss and items of the evaluation under way
        self.evaluated_rows: list[torch.Tensor] = []  # the same of each row, (2, rows), where a recipe gives them
        self.rows_are_draws = True  # else several are parts of one, and no interval is known
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """This rank's rows of each step: see StepBatches."""
        batches = StepBatches(
            row_lengths(self.train_dataset),
            micro_batch=self.args.train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            seed=self.args.data_seed,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
        )
        return self._rank_loader(self.train_dataset, batches)

    def get_eval_dataloader(self, eval_dataset: datasets.Dataset | None = None) -> DataLoader:
        """This rank's rows of an evaluation: see EvaluationBatches."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        batches = EvaluationBatches(
            row_lengths(dataset),
            batch_size=self.args.eval_batch_size,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
        )
        # Of its own: an evaluation must not change what dropout draws after it.
        return self._rank_loader(dataset, batches, generator=torch.Generator())

    def _rank_loader(
        self, dataset: datasets.Dataset, batches: Sampler[list[int]], generator: torch.Generator | None = None
    ) -> DataLoader:
        return rank_loader(
            self._remove_unused_columns(dataset),  # type: ignore[attr-defined]
            batches,
            self.data_collator,
            device=self.accelerator.device,
            pin_memory=self.args.dataloader_pin_memory,
            generator=generator,
        )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Have the model put into its engine, whatever has been done with it before.

        Upstream leaves a model alone that an earlier evaluation has prepared: each rank would then train for itself
        (transformers 5.19, accelerate 1.15).
        """
        if self.args.world_size > 1:
            self.model = self.model_wrapped = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            vars(self.model).pop("_is_accelerate_prepared", None)
        if is_deepspeed_zero3_enabled():
            shard_weights(self)
        prepared = super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]
        if engine_in_use(self) == "single":
            self._trained = shorten_walks(self.model)
        return prepared

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        if self._trained is None:
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Remember the step's micro-batches until its gradient is known to be finite."""
        kept = {"input_ids": inputs["input_ids"], "labels": labels_of(inputs)}
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self._batches_of_step.append((kept, loss))
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        """As upstream, which counts the model's parameters in every step: a tenth of a small model's (5.19)."""
        name = self.model.main_input_name
        if name not in inputs:
            return 0
        if self._operations_per_token is None:
            self._operations_per_token = super().floating_point_ops({name: torch.empty(1)})  # type: ignore[misc]
        return self._operations_per_token * inputs[name].numel()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called once a step: a non-finite loss shows in the gradient too.

        Before the optimizer moves anything, but for DeepSpeed's, which has taken its step by now.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        value = float(norm)
        if math.isfinite(value):
            self._overflows = 0
        else:
            self._overflows += 1
            # DeepSpeed scales by itself, and Accelerate has no scaler then.
            scaled = self.accelerator.scaler is not None or (self.is_deepspeed_enabled and self.args.fp16)
            if not scaled or self._overflows >= FP16_OVERFLOWS_IN_A_ROW:
                self._stop_at_non_finite(value)
        self._batches_of_step.clear()
        return norm

    def _stop_at_non_finite(self, grad_norm: float) -> None:
        losses = [float(loss) for _, loss in self._batches_of_step]
        bad = [batch for batch, loss in zip(self._batches_of_step, losses, strict=True) if not math.isfinite(loss)]
        (a_loss,) = any_rank(bool(bad), device=self.args.device)
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
        if bad or (is_main() and not a_loss):  # of several ranks, one that had a hand in it
            path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        what = "loss" if a_loss else "gradient"
        raise NonFiniteError(
            f"step {step}: the {what} is not a finite number (loss {losses}, gradient norm {grad_norm}). "
            f"The batch is in {path}. Try a lower training.learning_rate, more training.warmup_steps, a smaller "
            "training.max_grad_norm, or precision=fp32; and look at the batch."
        )

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if isinstance(inputs, Blank):
            inputs = inputs | {"attention_mask": torch.zeros(1)}
        super()._track_num_input_tokens(inputs)  # type: ignore[misc]

    def count_items(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """How many items a batch's loss is the mean over: its learnt tokens."""
        return (labels_of(inputs)[..., 1:] != IGNORED).sum()

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """An evaluation within training. A request to stop ends it: its step is saved, and it is made up for later."""
        try:
            metrics = super()._evaluate(*args, **kwargs)  # type: ignore[misc]
        except EvaluationStopped as error:
            if self.evaluation_pending:  # this is what makes up for it: the checkpoint still says so
                raise Stopped(f"stopped by {self.stop.signal} in an evaluation; the same command goes on.") from error
            self.evaluation_pending = self.control.should_save = self.control.should_training_stop = True
            self.control.should_evaluate = False  # else the end of the epoch, which follows, asks for it once more
            return {}
        self.evaluation_pending = False
        return metrics

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one batch, and count what its mean stands for."""
        if all(any_rank(self.stop.signal is not None, self.may_stop(), device=self.args.device)):
            raise EvaluationStopped
        output = super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        items = self.count_items(inputs).to(output[0].device)
        self._evaluated = self._evaluated.to(items.device) + torch.stack([output[0].detach() * items, items])
        return output

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The loss is the mean over all items, with its 95% interval where each row's part is known.

        Upstream averages the means of batches, so its evaluation loss depends on the batch size (transformers 5.19).
        """
        self._evaluated = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self.evaluated_rows.clear()
        with self._engine_if_there():
            output = super().evaluation_loop(  # type: ignore[misc]
                *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
        total, items = self.accelerator.reduce(self._evaluated, "sum")
        if items:
            output.metrics[f"{metric_key_prefix}_loss"] = float(total / items)
        if self.evaluated_rows and self.rows_are_draws:
            of_all = np.concatenate(gathered(torch.cat(self.evaluated_rows, dim=1).cpu().numpy()), axis=1)
            estimate = ratio(*of_all[:, of_all[1] > 0])  # a rank's last batches may be blank
            if estimate.low is not None and estimate.high is not None:
                loss = output.metrics[f"{metric_key_prefix}_loss"]
                output.metrics[f"{metric_key_prefix}_loss_low"] = loss + estimate.low - estimate.value
                output.metrics[f"{metric_key_prefix}_loss_high"] = loss + estimate.high - estimate.value
        self.evaluated_rows.clear()
        return output

    @contextmanager
    def _engine_if_there(self) -> Iterator[None]:
        """Evaluate a model that DeepSpeed does not have yet as it is, whole.

        For stage 3 upstream makes an engine then; for the others it raises an error (transformers 5.19).
        """
        enabled = self.is_deepspeed_enabled
        if enabled and not hasattr(self.model_wrapped, "zero_optimization_stage"):
            self.is_deepspeed_enabled = is_deepspeed_zero3_enabled()
        try:
            yield
        finally:
            self.is_deepspeed_enabled = enabled

    def since_last_log(self) -> dict[str, Any] | None:
        """What a log event would say now of the steps since the last one, on every rank; None if there are none."""
        steps = self.state.global_step - getattr(self, "_globalstep_last_logged", self.state.global_step)
        if steps <= 0:
            return None
        losses = gathered(float(self._tr_loss))
        return {"step": self.state.global_step, "loss": sum(losses) / len(losses) / steps}

    def accumulators(self) -> dict[str, Any]:
        """The sums behind the next log event, which upstream forgets (transformers 5.19, trl 1.16).

        Numbers and lists only: floats survive JSON to the last bit.
        """
        return {
            "loss": float(self._tr_loss),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "total_train_tokens": self._total_train_tokens,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
        }

    def take_up(self, accumulators: dict[str, Any]) -> None:
        """Go on with the sums of a checkpoint, once `train` has set its own to zero."""
        self._tr_loss.fill_(accumulators["loss"])
        self._total_loss_scalar = accumulators["total_loss"]
        self._globalstep_last_logged = accumulators["last_logged"]
        self._total_train_tokens = accumulators["total_train_tokens"]
        self._metrics["train"].update(accumulators["metrics"])

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Copy what the step has made, and let it be written while training goes on."""
        step = self.state.global_step
        if self.is_deepspeed_enabled:  # it writes its own files, from every rank
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            files = state_files(self, gather_object([self.accumulators()]))  # every rank takes part
            if self.args.should_save:
                written = Path(self.args.output_dir) / f"checkpoint-{step}"
                self.writer.commit(written, step, files | self.run_files(), self.facts())
            self.accelerator.wait_for_everyone()
            return
        contents = collect(self)
        if self.args.should_save:
            self.writer.save(step, contents | self.run_files(), self.facts())

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled and model is not None:  # it is divided by now
            load_divided(model, Path(checkpoint))
        else:
            load_weights(self.model, Path(checkpoint))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Ours is written at the end, for what a user loads."""


def labels_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tokens that a batch is to make likelier or, in the second half of DPO's, less likely; IGNORED elsewhere."""
    if "labels" in inputs:
        return inputs["labels"]
    return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
