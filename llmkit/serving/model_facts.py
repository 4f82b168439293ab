"""What a model's own files say of it: context, heads, bytes. Read without Transformers, whose import takes longer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.config.schema import ModelConfig
from llmkit.model.source import explained

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
INDEX = "model.safetensors.index.json"
# Kinds of rotary embeddings whose max_position_embeddings is the whole context; vLLM multiplies it for the others.
PLAIN_ROPE = (None, "default", "llama3", "longrope", "su")
# Signs that layers keep less in the KV cache than all keys and values of all tokens.
SMALLER_CACHE = ("kv_lora_rank", "sliding_window", "layer_types", "attention_chunk_size", "full_attention_interval")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model's config.json (its text part) and the size of its weight files, in bytes, where they are known."""

    config: dict[str, Any]
    weights: int | None

    @property
    def dtype(self) -> str:
        """Of the saved weights."""
        return str(self.config.get("dtype") or self.config.get("torch_dtype")).removeprefix("torch.")

    @property
    def heads(self) -> int | None:
        """Of attention."""
        return self.config.get("num_attention_heads")

    @property
    def context(self) -> int | None:
        """Longest sequence in tokens; None where it takes more than a look at the config to know."""
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) not in PLAIN_ROPE:
            return None
        return self.config.get("max_position_embeddings") or self.config.get("n_positions")

    @property
    def has_experts(self) -> bool:
        """Whether it is a mixture of experts."""
        return any(self.config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))

    @property
    def is_quantized(self) -> bool:
        """Whether its files hold quantized weights."""
        return "quantization_config" in self.config

    def cache_bytes(self, width: int, *, degree: int) -> float | None:
        """Bytes of keys and values of one token over all layers, on one of `degree` devices that share each layer.

        None where the config does not tell, or not all layers keep everything.
        """
        config = self.config
        if any(
            config.get(key) for key in SMALLER_CACHE if key != "sliding_window" or config.get("use_sliding_window", 1)
        ):
            return None
        try:
            heads = config.get("num_key_value_heads") or config["num_attention_heads"]
            size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
            return 2 * config["num_hidden_layers"] * max(heads / degree, 1) * size * width
        except KeyError:
            return None


def read_model(model: ModelConfig, source: str, revision: str | None) -> ModelFacts:
    """The facts of a model at `source`, a directory or a hub id. Raises ConfigError if it cannot be had."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        with explained(model):
            folder = Path(hf_hub_download(source, "config.json", revision=revision)).parent
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= config.get("text_config") or {}
    facts = ModelFacts(config=config, weights=_size_of_weights(folder))
    if facts.weights is None and model.parameters:  # not on this machine yet, but a model that llmkit knows
        facts = ModelFacts(config=config, weights=int(model.parameters * BYTES.get(facts.dtype, 2)))
    return facts


def _size_of_weights(folder: Path) -> int | None:
    """Bytes of the files that are loaded: those of the index, where there is one; some folders hold others too."""
    files = set(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        if not {folder / name for name in named} <= files:
            return None  # not all of them are here
        files = {folder / name for name in named}
    return sum(file.stat().st_size for file in files) or None
