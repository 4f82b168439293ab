"""Supervised fine-tuning: the model learns the assistant's turns of conversations.

    llmkit train data.path=chats.jsonl model=qwen3_0_6b

Runs in the worker: `run` takes a resolved config and a run directory and returns what goes into result.json.
"""

from pathlib import Path
from typing import Any

from trl import SFTConfig, SFTTrainer

from llmkit.config import TrainConfig
from llmkit.model.methods import trained_weights_kept
from llmkit.training.console import RunConsole
from llmkit.training.figures import exact_match_figures
from llmkit.training.final_test import sums_of_rows
from llmkit.training.ready import make_ready
from llmkit.training.session import Session
from llmkit.training.stopping import StopRequest
from llmkit.training.trainer import RunMixin
from llmkit.training.trial import run_trial


class Trainer(RunMixin, SFTTrainer):
    """TRL's SFT trainer with llmkit's checkpoints and its stop at the first non-finite value."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As TRL does; of an evaluation each row's part is kept."""

        def keeping_rows(**given: Any) -> Any:  # asked for outputs, TRL would apply the model once more
            output = model(**given)
            self.evaluated_rows.append(sums_of_rows(output.log_probs, given))
            return output

        asked = model if self.model.training else keeping_rows
        return super().compute_loss(asked, inputs, return_outputs, num_items_in_batch)


def run(config: TrainConfig, run_dir: Path, console: RunConsole, stop: StopRequest) -> dict[str, Any]:
    """Fine-tune as `config` says; returns the contents of result.json. Raises LlmkitError for the user to read."""
    ready = make_ready(config, run_dir, console, stop)
    data = ready.data
    arguments = SFTConfig(
        **ready.arguments,
        max_length=None,  # nothing is cut or packed here: the data is prepared
        dataset_kwargs={"skip_prepare_dataset": True},
        packing=config.data.packing != "none",  # has the collator keep packed rows apart
        eval_packing=False,
    )
    with trained_weights_kept(ready.model):
        trainer = Trainer(
            run_dir=run_dir,
            model=ready.model,
            args=arguments,
            train_dataset=data.train.dataset,
            eval_dataset=data.validation.dataset if data.validation else None,
            processing_class=ready.tokenizer,
        )
    run_trial(trainer, config, console)

    with Session(
        config,
        run_dir,
        trainer,
        ready,
        console,
        stop,
        figures=exact_match_figures,
    ) as session:
        session.measure_base()
        session.train()
        session.measure_result()
        session.measure_test()
        return session.deliver()
