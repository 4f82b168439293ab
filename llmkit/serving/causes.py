"""Why a vLLM server died, read from its log, and what to change."""

import re
import signal

# What the log says -> what to do. The first that is found counts; `{n}` is the first group.
CAUSES = (
    (
        r"estimated maximum model length is (\d+)",
        "The KV cache does not hold one request of that length: serve.max_model_len={n}, or more memory for it "
        "(serve.gpu_memory_utilization, on a CPU serve.kv_cache_gib).",
    ),
    (
        r"No available memory for the cache blocks|is less than desired GPU memory utilization"
        r"|less than requested memory for kv|CUDA out of memory|OutOfMemoryError|DefaultCPUAllocator: can't allocate",
        "There is too little memory: stop what else uses the device, or set serve.max_model_len, serve.max_num_seqs or "
        "serve.gpu_memory_utilization lower, or serve.tensor_parallel_size higher.",
    ),
    (r"Address already in use|address already in use", "The port was taken meanwhile: choose another serve.port."),
    (
        r"Bfloat16 is only supported on GPUs",
        "This GPU has no bfloat16: serve.dtype=fp16.",
    ),
    (
        r"max_model_len \(\d+\) is greater than the derived max_model_len \(.*?=(\d+)",
        "serve.max_model_len is beyond the model's context: at most {n}.",
    ),
    (
        r"unsupported LoRA weight|LoRA rank \d+ is greater|Call to add_lora method failed|LoRA.*not supported"
        r"|expected target modules",
        "vLLM cannot serve this adapter beside its base: serve.adapter=merged.",
    ),
    (
        r"Model architectures \[(.*?)\] (?:are not supported|failed to be inspected)",
        "This vLLM does not know the architecture {n}; a newer one may (serve.python=PYTHON).",
    ),
    (r"unrecognized arguments: (.*)", "vLLM does not know {n}: see serve.extra_args, and vLLM's version."),
    (r"Cannot find any model weights|No safetensors", "There are no weights of the kind serve.load_format there."),
)


def explain(log: str, returncode: int) -> str:
    """What to change, for a cause that is known; else empty."""
    for pattern, advice in CAUSES:
        if found := re.search(pattern, log):
            return advice.replace("{n}", found[1] if found.groups() and found[1] else "")
    if returncode == -signal.SIGKILL:
        return "It was killed, as the system does when memory runs out: serve.kv_cache_gib or serve.max_num_seqs lower."
    return ""
