"""Direct preference optimization: of two answers the model learns to prefer the chosen one (arXiv 2305.18290).

    llmkit train recipe=dpo data.path=pairs.jsonl model=qwen3_0_6b

Runs in the worker: `run` takes a resolved config and a run directory and returns what goes into result.json.
"""

from pathlib import Path
from typing import Any

from trl import DPOConfig

from llmkit.config import TrainConfig
from llmkit.config.init_from import adapter_directory
from llmkit.training.arguments import dpo_arguments
from llmkit.training.console import RunConsole
from llmkit.training.figures import preference_figures
from llmkit.training.preference_trainer import PreferenceTrainer, tell_precomputed
from llmkit.training.ready import make_ready
from llmkit.training.session import Session
from llmkit.training.stopping import StopRequest
from llmkit.training.trial import run_trial


def run(config: TrainConfig, run_dir: Path, console: RunConsole, stop: StopRequest) -> dict[str, Any]:
    """Fine-tune as `config` says; returns the contents of result.json. Raises LlmkitError for the user to read."""
    ready = make_ready(config, run_dir, console, stop, preference=True)
    data = ready.data
    trainer = PreferenceTrainer(
        run_dir=run_dir,
        model=ready.model,
        continued=adapter_directory(config) is not None,
        precomputed=tell_precomputed(console, stop),
        args=DPOConfig(**ready.arguments, **dpo_arguments(config.dpo)),
        train_dataset=data.train.dataset,
        eval_dataset=data.validation.dataset if data.validation else None,
        processing_class=ready.tokenizer,
    )
    console.fact("reference", trainer.reference)
    run_trial(trainer, config, console)

    with Session(
        config,
        run_dir,
        trainer,
        ready,
        console,
        stop,
        figures=preference_figures,
    ) as session:
        session.measure_base()
        session.train()
        session.measure_result()
        session.measure_test()
        return session.deliver()
