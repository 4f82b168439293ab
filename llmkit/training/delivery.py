"""`final/`: what a user loads, with tokenizer, template, generation config and a model card."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llmkit import durable, rundir
from llmkit.config.schema import TrainConfig
from llmkit.model.adapters import ADAPTER
from llmkit.remote import is_remote

BASE_IN_BUCKET = """\
Its base is in a bucket, which PEFT does not read: copy it to a directory first, and name that one in
`base_model_name_or_path` of `adapter_config.json`."""
LOAD_FULL = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(DIRECTORY)"""
# PEFT leaves generation_config.json aside, and with it the tokens that end an answer.
LOAD_ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import GenerationConfig

model = AutoPeftModelForCausalLM.from_pretrained(DIRECTORY)
model.generation_config = GenerationConfig.from_pretrained(DIRECTORY)"""
MERGE = """\
merged = model.merge_and_unload()
merged.generation_config = model.generation_config
merged.save_pretrained(MERGED)
AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(MERGED)"""


def save_final(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    run_dir: Path,
    card: str,
    *,
    weights: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write `final/` in one step: a full model, or a PEFT adapter that names its base.

    Args:
        weights: the model's, where it is sharded and does not hold them itself.
    """
    sharded = {} if weights is None else {"state_dict": weights}
    partial = run_dir / ".final.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if config.lora is not None:
        settings = model.peft_config[ADAPTER]
        settings.base_model_name_or_path = base_model(config)
        settings.revision = config.model.commit if config.model.hub_id and not config.model.path else None
        model.get_base_model().generation_config.save_pretrained(partial)
        # Rows of new tokens are saved as such, the matrices they stand in are not; nor is DPO's reference adapter.
        model.save_pretrained(partial, selected_adapters=[ADAPTER], save_embedding_layers=False, **sharded)
    else:
        model.save_pretrained(partial, **sharded)
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    durable.sync_tree(partial)
    final, former = run_dir / rundir.FINAL, run_dir / ".final.former"
    if final.exists():
        shutil.rmtree(former, ignore_errors=True)
        os.replace(final, former)
    os.replace(partial, final)
    durable.sync(run_dir)
    shutil.rmtree(former, ignore_errors=True)
    return final


def base_model(config: TrainConfig) -> str:
    """The base as a loader needs it: a hub id, an absolute directory, or the address of one in a bucket."""
    if config.model.hub_id and not config.model.path:
        return config.model.hub_id
    from llmkit.model.source import shown_source

    source = shown_source(config.model)
    return source if is_remote(source) else str(Path(source).resolve())


def model_card(config: TrainConfig, figures: dict[str, Any], *, model: Any = None) -> str:
    """A short model card in the hub's format: what it was made from, how, how well it did, and how to load it.

    Args:
        model: the trained model; if it is an adapter with rows of new tokens, the card says what that asks for.
    """
    base, method, data = base_model(config), config.method.name, config.data
    sources = ", ".join(f"`{source.path or source.hub_id}`" for source in data.datasets or [data])
    head = ["---", f"base_model: {base}", "library_name: " + ("peft" if config.lora else "transformers")]
    head += [f"tags: [llmkit, {config.recipe}]", "---"]
    lines = [f"# {base.rsplit('/', 1)[-1]}, fine-tuned", "", f"- base model: `{base}`", f"- method: {method}"]
    if config.model.commit:
        lines.append(f"- base revision: `{config.model.commit}`")
    if config.init_from:
        lines.append(f"- started from: `{config.init_from}`")
    if config.lora is not None:
        lines.append(f"- adapter: r={config.lora.r}, lora_alpha={config.lora.lora_alpha}")
    lines += [f"- data: {sources}", f"- learning rate: {config.training.learning_rate:g}"]
    if rows := new_token_rows(model):
        lines.append(f"- new tokens: {rows}")
    lines += [f"- {name.replace('_', ' ')}: {value:.4g}" for name, value in figures.items() if isinstance(value, float)]
    lines += ["", "The chat template in this folder is the one it was trained with."]
    if data.chat_template_kwargs:
        lines.append(f"It takes {json.dumps(data.chat_template_kwargs)} where no other values are given.")
    if config.lora is not None and is_remote(base):
        lines += ["", BASE_IN_BUCKET]
    lines += ["", "```python", LOAD_FULL if config.lora is None else LOAD_ADAPTER, "```"]
    if config.lora is not None:
        if rows:
            lines += [
                "",
                "The rows of the new tokens are part of this adapter. AutoPeftModelForCausalLM gives the base as many "
                "rows as the tokenizer in this folder has tokens; PeftModel on the base as it is fails.",
            ]
        merged = "from transformers import AutoTokenizer\n\n" + MERGE
        lines += ["", "Merged into its base it is an ordinary model:", "", "```python", merged, "```"]
    return "\n".join([*head, "", *lines, ""])


def new_token_rows(model: Any) -> int:
    """The number of new tokens whose rows an adapter trains; 0 for other models."""
    settings = getattr(model, "peft_config", {}).get(ADAPTER)
    held = getattr(settings, "trainable_token_indices", None) or {}
    return max((len(rows) for rows in held.values()), default=0) if isinstance(held, dict) else len(held)
