"""What can be known before a server is started: whether the model fits, its lengths, its heads, the port, the key."""

import errno
import json
import math
import os
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmkit.config.schema import HardwareConfig
from llmkit.errors import ConfigError, did_you_mean
from llmkit.host_memory import available_host_memory
from llmkit.model.source import explained
from llmkit.serving.plan import KEY, LOCAL_HOSTS, Plan

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
EIGHT_BIT = 0.5  # of what 16-bit weights take
MADE_SO = re.compile("awq|gptq|compressed")  # quantizations that only checkpoints made for them have
LONG = 0.8  # of a model's context; beyond it prompts and answers get worse
CPU_CACHE_GIB = 4.0  # for the KV cache on a CPU, or a tenth of the memory if that is less


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device: what there is, what the weights take, and what a token takes in the KV cache."""

    device: int
    weights: int
    per_token: int
    cache: int  # what is left for the KV cache

    @property
    def tokens(self) -> int:
        """How many tokens the KV cache holds."""
        return max(self.cache, 0) // self.per_token


def check(plan: Plan, hardware: HardwareConfig) -> tuple[Plan, list[str], list[str]]:
    """The plan with what follows from model and machine filled in; facts; warnings.

    Raises ConfigError with everything that would keep the server from starting, and what to change.
    """
    problems, warnings, facts = [], [], []
    problems += _address_problems(plan)
    config = _model_config(plan)
    problems += _quantization_problems(plan, config)
    context: int | None = config.get("max_position_embeddings")
    serve = plan.serve
    problems += _head_problems(plan, config)
    if serve.max_model_len is not None and context is not None and serve.max_model_len > context:
        problems.append(f"serve.max_model_len={serve.max_model_len}: the model takes at most {context:,} tokens.")
    elif serve.max_model_len is not None and context is not None and serve.max_model_len > LONG * context:
        warnings.append(
            f"serve.max_model_len={serve.max_model_len:,} is more than {LONG:.0%} of the model's context of "
            f"{context:,} tokens: where prompts and answers use that much, quality falls."
        )
    if plan.environment.for_cpu and serve.kv_cache_gib is None:
        serve = replace(serve, kv_cache_gib=min(CPU_CACHE_GIB, round(available_host_memory() / GIB / 10, 2)))
    memory = _memory(replace(plan, serve=serve), config, hardware)
    if memory is not None:
        fit, problem, length = _fit(memory, plan, context)
        facts.append(fit)
        problems += [problem] if problem else []
        if length is not None:
            serve = replace(serve, max_model_len=length)
    if problems:
        raise ConfigError(*problems)
    return replace(plan, serve=serve), facts, warnings


def _address_problems(plan: Plan) -> list[str]:
    serve, problems = plan.serve, []
    if serve.host not in LOCAL_HOSTS and not os.environ.get(KEY):
        problems.append(
            f"serve.host={serve.host}: others reach that address, so a key is needed: set {KEY} in the environment "
            "(clients send it as Authorization: Bearer KEY), or leave serve.host out."
        )
    family = socket.AF_INET6 if ":" in serve.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serve.host, serve.port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                problems.append(f"serve.port={serve.port}: is in use; choose another, or stop what listens there.")
            else:
                problems.append(f"serve.host={serve.host} serve.port={serve.port}: {error.strerror}.")
    return problems


def _quantization_problems(plan: Plan, config: dict[str, Any]) -> list[str]:
    wanted = plan.serve.quantization
    if wanted is None:
        return []
    known = plan.environment.quantizations()
    if wanted in known and (not MADE_SO.search(wanted) or "quantization_config" in config):
        return []
    if wanted in known:
        return [f"serve.quantization={wanted}: is for checkpoints made so, and this one is not; fp8 takes any."]
    return [
        f"serve.quantization={wanted}: vLLM {plan.environment.version} does not list it.{did_you_mean(wanted, known)} "
        f"It has {', '.join(known)}; fp8 needs no checkpoint made for it."
    ]


def _head_problems(plan: Plan, config: dict[str, Any]) -> list[str]:
    heads, degree = config.get("num_attention_heads"), plan.serve.tensor_parallel_size
    if not heads or heads % degree == 0:
        return []
    fitting = [n for n in range(1, heads + 1) if heads % n == 0]
    return [
        f"serve.tensor_parallel_size={degree}: the model has {heads} attention heads, which do not divide; "
        f"{', '.join(map(str, fitting))} do."
    ]


def _fit(memory: Memory, plan: Plan, context: int | None) -> tuple[str, str | None, int | None]:
    """A fact about memory; what does not fit; and the longest request, where it is open and memory decides."""
    serve = plan.serve
    said = f"weights {_size(memory.weights)}, KV cache {_size(max(memory.cache, 0))} of {_size(memory.device)}"
    if memory.cache < memory.per_token:
        return said, _too_large(memory, plan), None
    said += f" = {memory.tokens:,} tokens"
    wanted = serve.max_model_len or context
    if wanted is None or memory.tokens >= wanted:
        return said, None, None
    if serve.max_model_len is None:
        length = max(memory.tokens // 16 * 16, 1)  # the cache is handed out in blocks of 16 tokens
        return f"{said}; requests of up to {length:,} tokens, the model would take {wanted:,}", None, length
    return (
        said,
        (
            f"serve.max_model_len={wanted:,}: the KV cache holds {memory.tokens:,} tokens ({said}); use at most that, "
            f"or {'serve.kv_cache_gib' if plan.environment.for_cpu else 'serve.gpu_memory_utilization'} higher."
        ),
        None,
    )


def _too_large(memory: Memory, plan: Plan) -> str:
    serve = plan.serve
    share = memory.device * serve.gpu_memory_utilization
    needed = math.ceil(memory.weights * serve.tensor_parallel_size / (share * 0.9))
    degree = next(n for n in range(needed, needed * 2 + 64) if n & (n - 1) == 0)
    ways = [f"serve.tensor_parallel_size={max(degree, 2 * serve.tensor_parallel_size)}"]
    if serve.quantization is None and memory.weights * EIGHT_BIT < share * 0.9:
        ways.append("serve.quantization=fp8 (half the memory)")
    return (
        f"{next(iter(plan.targets.values())).said}: its weights take {memory.weights / GIB:.1f} GiB on each device, "
        f"and {share / GIB:.1f} GiB ({serve.gpu_memory_utilization:.0%} of {memory.device / GIB:.1f}) may be used. "
        f"What would fit: {' or '.join(ways)}."
    )


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def _memory(plan: Plan, config: dict[str, Any], hardware: HardwareConfig) -> Memory | None:
    """What is known of the memory; None where the device or the model does not tell."""
    device = _device_memory(plan, hardware)
    saved = _saved_bytes(plan)
    if device is None or saved is None:
        return None
    width = BYTES.get(_dtype(plan, config), 2)
    held = BYTES.get(_saved_dtype(config), width)
    weights = saved * width / held * (EIGHT_BIT if plan.serve.quantization in ("fp8", "int8") else 1)
    shards = plan.serve.tensor_parallel_size * plan.serve.pipeline_parallel_size
    per_token = _cache_bytes(config, width)
    if per_token is None:
        return None
    weights, per_token = weights / shards, per_token / shards
    if plan.serve.kv_cache_gib is not None:
        cache = plan.serve.kv_cache_gib * GIB
        if weights + cache > device:
            cache = device - weights
    else:
        cache = device * plan.serve.gpu_memory_utilization - weights
    return Memory(device=int(device), weights=int(weights), per_token=max(int(per_token), 1), cache=int(cache))


def _device_memory(plan: Plan, hardware: HardwareConfig) -> float | None:
    """Bytes of the device it will run on: as `hardware` says, or asked of the driver."""
    if hardware.memory_gib is not None:
        return hardware.memory_gib * GIB
    if plan.environment.for_cpu:
        return available_host_memory()
    first = str(plan.serve.devices or os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", f"--id={first}", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        return float(answer.splitlines()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _saved_bytes(plan: Plan) -> int | None:
    """The size of the weight files; None for a model of the hub that is not on this machine yet."""
    folder = Path(plan.base)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(plan.base, "config.json", revision=plan.revision or "main")
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None


def _dtype(plan: Plan, config: dict[str, Any]) -> str:
    if plan.dtype != "auto":
        return plan.dtype
    return "bfloat16" if _saved_dtype(config) == "float32" else _saved_dtype(config)  # vLLM makes 16 bits of 32


def _cache_bytes(config: dict[str, Any], width: int) -> float | None:
    """Bytes of keys and values of one token over all layers; None where the model's config does not tell."""
    try:
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return 2 * config["num_hidden_layers"] * heads * head * width
    except KeyError:
        return None


def _model_config(plan: Plan) -> dict[str, Any]:
    """The model's config.json, its text part; read without Transformers, which takes longer than all other checks."""
    file = Path(plan.base, "config.json")
    if not Path(plan.base).is_dir():
        from huggingface_hub import hf_hub_download

        with explained(next(iter(plan.targets.values())).base):
            file = Path(hf_hub_download(plan.base, "config.json", revision=plan.revision))
    config = json.loads(file.read_text(encoding="utf-8"))
    return config | config.get("text_config", {})


def _saved_dtype(config: dict[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
