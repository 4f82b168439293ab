"""TRL's DPO trainer on pairs that are prepared already, measured against the policy as it stood at the start."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import PeftModel
from torch import nn
from trl import DPOConfig, DPOTrainer

from llmkit.errors import Stopped
from llmkit.model.adapters import ADAPTER
from llmkit.model.methods import trained_weights_kept
from llmkit.training.console import RunConsole
from llmkit.training.memory import in_units
from llmkit.training.preferences import batches, evaluating
from llmkit.training.rank_batches import Blank
from llmkit.training.ranks import gathered, gathering_uneven, of_each_rank
from llmkit.training.reference import (
    REFERENCE,
    copy_adapter,
    forget_reference,
    frozen_copy,
    plain_copies,
    starts_as_nothing,
)
from llmkit.training.stopping import StopRequest
from llmkit.training.trainer import RunMixin

SAID_EVERY = 10.0  # seconds


class PreferenceTrainer(RunMixin, DPOTrainer):
    """Takes datasets of `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Args:
        model: as it is at the start, also where the run goes on from a checkpoint, which is loaded by `train`.
        continued: whether its adapter comes from an earlier run, instead of being fresh.
        precomputed: told after each batch of a reference that is precomputed: which pairs, how many are done, of how
            many.
    """

    model: Any
    ref_model: Any
    loss_is_scaled_for_ga = True  # by compute_loss: all pairs of a step count alike

    def __init__(
        self,
        *,
        model: nn.Module,
        args: DPOConfig,
        continued: bool,
        precomputed: Callable[[str, int, int], None] = lambda name, done, total: None,
        **arguments: Any,
    ):
        self._pairs: dict[str, list[int]] = {"train": [], "eval": []}  # of the batches since the last log
        if isinstance(model, PeftModel):
            with plain_copies(model), trained_weights_kept(model):
                super().__init__(model=model, args=args, **arguments)
            copy_adapter(model)
        else:
            reference = None if args.precompute_ref_log_probs else frozen_copy(model)
            super().__init__(model=model, ref_model=reference, args=args, **arguments)
        if args.precompute_ref_log_probs:
            self.train_dataset = self._with_reference(self.train_dataset, "training", precomputed)
            if self.eval_dataset is not None:
                self.eval_dataset = self._with_reference(self.eval_dataset, "held-out", precomputed)
            forget_reference(model)
        elif isinstance(model, PeftModel) and not continued and starts_as_nothing(model.peft_config[ADAPTER]):
            forget_reference(model)  # the model without the adapter is the same, and TRL takes that

    @property
    def reference(self) -> str:
        """What stands for the policy at the start, in words."""
        if self.precompute_ref_logps:
            return "precomputed, not kept in memory"
        if self.ref_model is not None:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            return f"a frozen copy of what is trained, {in_units(sum(p.numel() * p.element_size() for p in trained))}"
        kept = REFERENCE in self.model.peft_config
        return "a frozen copy of the adapter" if kept else "the model with the adapter switched off"

    def _with_reference(
        self, dataset: datasets.Dataset, name: str, precomputed: Callable[[str, int, int], None]
    ) -> datasets.Dataset:
        """The pairs with their log-probabilities under the reference.

        TRL's own way keeps them in a cache that does not know of `ld_alpha` and precision (trl 1.16).
        """
        size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
        found = []
        first, last = self._share(len(dataset))
        with evaluating(self.model):
            for batch in batches(self, dataset.select(range(first, last)), size):
                found.append(torch.stack(self.compute_ref_log_probs(self.model, batch)).float().cpu())
                precomputed(name, min(len(found) * size, last - first), last - first)
        own = torch.cat(found, dim=1).numpy() if found else np.empty((2, 0), dtype=np.float32)
        # Goes when the run is finished.
        file = Path(self.args.output_dir) / f"reference-{name}-{self.args.process_index}.arrow"
        file.parent.mkdir(parents=True, exist_ok=True)
        columns = ("ref_chosen_logps", "ref_rejected_logps")
        values = np.concatenate(gathered(own), axis=1)

        def add(_: dict[str, Any], indices: list[int]) -> dict[str, np.ndarray]:
            return {column: side[indices] for column, side in zip(columns, values, strict=True)}

        datasets.disable_progress_bars()  # a moment's work
        return dataset.map(
            add,
            with_indices=True,
            batched=True,
            cache_file_name=str(file),
            load_from_cache_file=False,  # an earlier, interrupted run may have left half of it
            new_fingerprint=f"{dataset._fingerprint}-reference",
        )

    def _share(self, rows: int) -> tuple[int, int]:
        """The rows that this rank asks the reference about: from the first to before the last."""
        rank, ranks = self.args.process_index, self.args.world_size
        return rank * rows // ranks, (rank + 1) * rows // ranks

    def _precompute_ref_logps(self, dataset: datasets.Dataset, name: str, batch_size: int) -> datasets.Dataset:
        return dataset  # see _with_reference

    def _prepare_dataset(self, dataset: datasets.Dataset, *_: Any) -> datasets.Dataset:
        return dataset  # it is

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> int:
        return sum(of_each_rank(sum(map(pairs_of, batch_samples)), device=device))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The mean over the batch's pairs; in training its part of the mean over all pairs of the step."""
        counts = of_each_rank(pairs_of(inputs), device=self.args.device)
        with gathering_uneven(self.accelerator, counts):
            loss = super().compute_loss(model, inputs, return_outputs)
        self._pairs["train" if self.model.training else "eval"].append(sum(counts))
        if num_items_in_batch is None:
            return loss
        return loss * pairs_of(inputs) * len(counts) / num_items_in_batch  # gradients are averaged over ranks

    def count_items(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """An evaluation's loss is the mean over pairs."""
        return torch.tensor(pairs_of(inputs))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Average the figures of batches over their pairs: TRL counts a small last batch like a full one."""
        mode = "train" if self.model.training else "eval"
        pairs, figures = self._pairs[mode], self._metrics[mode]
        for values in figures.values():
            if len(values) == len(pairs) > 0:
                values[:] = [float(np.average(values, weights=pairs))]
        pairs.clear()
        super().log(logs, start_time)

    def accumulators(self) -> dict[str, Any]:
        """Those of every trainer, and the pairs that figures are averaged over."""
        return super().accumulators() | {"pairs": list(self._pairs["train"])}

    def take_up(self, accumulators: dict[str, Any]) -> None:
        """As every trainer does, and the pairs too."""
        super().take_up(accumulators)
        self._pairs["train"] = accumulators["pairs"]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Under DeepSpeed upstream saves: the trained adapter alone, the reference is made anew from the start.

        With a second adapter in it, Transformers would load that one and leave the trained one where it began
        (transformers 5.19).
        """
        super()._save(output_dir, state_dict)
        shutil.rmtree(Path(output_dir or self.args.output_dir) / REFERENCE, ignore_errors=True)


def pairs_of(inputs: dict[str, torch.Tensor]) -> int:
    """The pairs of a batch, which holds all chosen sides and then all rejected ones; none of a blank one."""
    return 0 if isinstance(inputs, Blank) else len(inputs["input_ids"]) // 2


def tell_precomputed(console: RunConsole, stop: StopRequest) -> Callable[[str, int, int], None]:
    """For `precomputed`: says now and then how far it is; raises Stopped if a signal asks for that."""
    said = time.monotonic()

    def tell(name: str, done: int, total: int) -> None:
        nonlocal said
        if stop.signal:
            raise Stopped(
                f"stopped by {stop.signal} while the reference was precomputed; the same command begins again."
            )
        if time.monotonic() - said > SAID_EVERY:
            said = time.monotonic()
            console.fact("reference", f"precomputed for {done:,} of {total:,} {name} pairs")

    return tell
