"""Whether a model fits the memory it is to be served from: an estimate, with its numbers, and what would fit."""

import math
import os
import shutil
import subprocess
from dataclasses import dataclass

from llmkit.config.schema import HardwareConfig, ServeConfig
from llmkit.host_memory import available_host_memory
from llmkit.serving.model_facts import BYTES, ModelFacts
from llmkit.serving.plan import Plan

GIB = 2**30
CPU_CACHE_GIB = 4.0  # for the KV cache on a CPU, or a tenth of the memory if that is less
BESIDE_WEIGHTS = 0.9  # of what may be used; the rest is for activations and a cache that is of use
EIGHT_BIT = ("fp8", "int8", "mxfp8", "experts_int8")  # beginnings of the quantizations that take half of 16 bits


@dataclass(frozen=True)
class Device:
    """Bytes of memory of one device, and how much of it is free now, where that is known."""

    total: float
    free: float | None


@dataclass(frozen=True)
class Estimate:
    """What is said of memory; what does not fit, and how to change that; warnings."""

    fact: str
    problem: str | None = None
    warning: str | None = None


def cpu_cache_gib() -> float:
    """GiB for the KV cache of a server on the CPU that was not told."""
    return min(CPU_CACHE_GIB, round(available_host_memory() / GIB / 10, 2))


def estimate(plan: Plan, model: ModelFacts, hardware: HardwareConfig) -> Estimate:
    """Compare weights and KV cache with the device's memory."""
    serve = plan.serve
    device = _device(plan, hardware)
    if device is None or model.weights is None:
        unknown = "the device's memory" if device is None else "the size of the weights, which are not here yet,"
        return Estimate(f"not checked: {unknown} is not known")
    width = BYTES.get(_dtype(plan, model), 2)
    weights = model.weights * width / BYTES.get(model.dtype, width) if not model.is_quantized else model.weights
    if serve.quantization and serve.quantization.startswith(EIGHT_BIT) and not model.is_quantized:
        weights *= 1 / width
    weights /= serve.tensor_parallel_size * serve.pipeline_parallel_size
    usable = device.total if plan.environment.for_cpu else device.total * serve.gpu_memory_utilization
    cache = usable - weights
    if serve.kv_cache_gib is not None:
        cache = min(cache, serve.kv_cache_gib * GIB)
    fact = f"weights {_size(weights)}, KV cache {_size(max(cache, 0))} of {_size(device.total)}"
    if weights > usable * BESIDE_WEIGHTS:
        return Estimate(fact, problem=_too_large(plan, model, weights, usable))
    warning = None
    if device.free is not None and not plan.environment.for_cpu and device.free < usable:
        warning = (
            f"only {_size(device.free)} of the device are free, and serve.gpu_memory_utilization="
            f"{serve.gpu_memory_utilization} asks for {_size(usable)}: stop what else uses it, or set it lower."
        )
    per_token = model.cache_bytes(width, degree=serve.tensor_parallel_size)
    if per_token is None:
        return Estimate(fact, warning=warning)
    tokens = int(cache / (per_token / serve.pipeline_parallel_size))
    fact += f" = about {tokens:,} tokens"
    if serve.max_model_len is not None and serve.max_model_len > tokens:
        more = "serve.kv_cache_gib" if plan.environment.for_cpu else "serve.gpu_memory_utilization"
        problem = f"serve.max_model_len={serve.max_model_len:,}: {fact}; use at most that, or {more} higher."
        return Estimate(fact, problem=problem)
    return Estimate(fact, warning=warning)


def visible_gpus(serve: ServeConfig) -> int | None:
    """How many GPUs the server sees; None where that is not known."""
    if serve.devices is not None:
        return len([one for one in str(serve.devices).split(",") if one.strip()])
    if chosen := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return len(chosen.split(","))
    lines = _ask_driver("memory.total", None)
    return len(lines) if lines else None


def _device(plan: Plan, hardware: HardwareConfig) -> Device | None:
    """The device it will run on, of several the one with the least: as `hardware` says, or asked of the driver."""
    if hardware.memory_gib is not None:
        return Device(hardware.memory_gib * GIB, None)
    if plan.environment.for_cpu:
        free = available_host_memory()
        return Device(free, free)
    chosen = plan.serve.devices if plan.serve.devices is not None else os.environ.get("CUDA_VISIBLE_DEVICES")
    lines = _ask_driver("memory.total,memory.free", None if chosen is None else str(chosen))
    if not lines:
        return None
    used = lines[: plan.serve.tensor_parallel_size * plan.serve.pipeline_parallel_size]
    return Device(*(min(float(line.split(",")[column]) * 2**20 for line in used) for column in (0, 1)))


def _ask_driver(what: str, devices: str | None) -> list[str]:
    """A line for each GPU; none where the driver does not answer."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    query += [f"--id={devices}"] if devices else []
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def _too_large(plan: Plan, model: ModelFacts, weights: float, usable: float) -> str:
    serve = plan.serve
    said = next(iter(plan.targets.values())).said
    start = f"{said}: its weights take {_size(weights)} on each device, and {_size(usable)} may be used. "
    ways = []
    if serve.dtype in ("fp32", "auto") and plan.dtype == "float32":
        ways.append("serve.dtype=bf16 (half the memory)")
    elif serve.quantization is None and not model.is_quantized and not plan.environment.for_cpu:
        ways.append("serve.quantization=fp8 (half the memory)")
    if not plan.environment.for_cpu:
        needed = math.ceil(weights * serve.tensor_parallel_size / (usable * BESIDE_WEIGHTS))
        degrees = [n for n in range(needed, (model.heads or needed) + 1) if (model.heads or n) % n == 0]
        ways += [f"serve.tensor_parallel_size={degrees[0]}"] if degrees else ["serve.pipeline_parallel_size"]
    return start + f"What would fit: {' or '.join(ways or ['a machine with more memory'])}."


def _dtype(plan: Plan, model: ModelFacts) -> str:
    if plan.dtype != "auto":
        return plan.dtype
    return "bfloat16" if model.dtype == "float32" else model.dtype  # vLLM makes 16 bits of 32


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
