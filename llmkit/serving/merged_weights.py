"""A model whose adapter, or whose trained weights, are merged into its base: in memory, into files, and from them.

One model is in memory at a time and is changed in place, layer by layer.
"""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from llmkit.byte_progress import in_bytes
from llmkit.config.schema import ModelConfig
from llmkit.errors import LlmkitError
from llmkit.model.loading import load_model
from llmkit.model.precision import KINDS, resolve_device
from llmkit.serving.target import Target

# Of a model's parameter inside PEFT's wrappers, the parts of its name that the wrappers add.
WRAPPERS = (".base_layer", ".original_module", ".token_adapter")
GB = 10**9


def merge_weights(model: Any, target: Target, dtype: torch.dtype) -> Any:
    """The base with what was trained in its weights, all of it in host memory; `model` is used up.

    What a graphics card has no room for in 16 bits was trained there in four or eight.
    """
    if target.adapter is not None:
        from peft import PeftModel

        if is_quantized(model):
            base = model.unload()
            dequantize(base, dtype)
            base.to("cpu")
            model = PeftModel.from_pretrained(base, target.source)
        model.to("cpu")
        wide = _wide_weights(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a head that was trained whole is not the embeddings any more
            model = model.merge_and_unload()
    else:
        model.to("cpu")
        wide = _wide_weights(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and name not in wide:
            parameter.data = parameter.data.to(dtype)
    return model


def _wide_weights(model: Any) -> set[str]:
    """The names of those weights of a 16-bit base that its own code keeps in float32, such as routers'."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    dtypes: dict[str, torch.dtype] = {}
    for name, parameter in base.named_parameters():
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        dtypes[name] = parameter.dtype
    narrow = set(dtypes.values()) & {torch.bfloat16, torch.float16}
    return {name for name, dtype in dtypes.items() if narrow and dtype == torch.float32}


def is_quantized(model: Any) -> bool:
    """Whether layers of the model are bitsandbytes'."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def dequantize(model: Any, dtype: torch.dtype) -> None:
    """Make every quantized layer an ordinary one, in host memory, with the numbers that training multiplied with.

    Transformers' own `dequantize` (5.19) keeps all quantized layers until the last one is done.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    names = [name for name, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)]
    for name in names:
        layer: Any = model.get_submodule(name)
        weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
        with torch.device("meta"):
            ordinary = nn.Linear(layer.in_features, layer.out_features, bias=False)
        ordinary.weight = nn.Parameter(weight.to("cpu", dtype), requires_grad=False)
        ordinary.bias = layer.bias
        model.set_submodule(name, ordinary)
    model.hf_quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False


def write_model(model: Any, tokenizer: PreTrainedTokenizerBase, directory: Path, *, max_shard_gb: float) -> None:
    """Weights, tokenizer, template and generation config, as plain Transformers reads them.

    Raises LlmkitError, with the numbers, if the disk has no room for them.
    """
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    free = shutil.disk_usage(directory.parent).free
    if needed > free:
        raise LlmkitError(
            f"{directory.parent}: the merged model needs {in_bytes(needed)}, and that disk has {in_bytes(free)} free; "
            "make room there."
        )
    model.save_pretrained(directory, max_shard_size=int(max_shard_gb * GB))
    tokenizer.save_pretrained(directory)


def load_merged(target: Target, directory: Path, dtype: torch.dtype) -> Any:
    """The merged model from its files, as whoever is given them loads it: on the device if it has room for it."""
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    device = resolve_device(target.run.hardware) if target.run and torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info(device)[0] < 1.2 * size:
            device = torch.device("cpu")
    own = ModelConfig(
        path=str(directory),
        attn_implementation=target.base.attn_implementation,
        trust_remote_code=target.base.trust_remote_code,
    )
    return load_model(own, dtype=dtype, device=device, quantization=None, precision=KINDS["bf16"]).eval()
