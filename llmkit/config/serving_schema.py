"""The typed settings of what happens to a trained model: how it is served, and how it is merged.

Names are vLLM's own where it has one.
"""

from dataclasses import dataclass
from typing import Any

from llmkit.config.setting import setting

SERVE_DTYPES = ("auto", "bf16", "fp16", "fp32")


@dataclass(kw_only=True, slots=True)
class ServeConfig:
    """How vLLM is started; see `vllm serve --help` for what it makes of each."""

    name: str = setting("default", "The option of the serve group.")
    served_model_name: str | None = setting(None, "Name in requests; unset: that of the run, or of the model.")
    adapter: str = setting(
        "auto",
        "Serve an adapter beside its base (unmerged), merged into it, or as vLLM can (auto).",
        choices=("auto", "unmerged", "merged"),
    )
    all: bool = setting(False, "Of a sweep: serve every adapter under its own name, on one shared base.")
    tokenizer: str | None = setting(
        None, "Directory or hub id of another tokenizer; unset: the one it was trained with."
    )
    dtype: str = setting("auto", "Arithmetic of the server; auto: the one it was trained in.", choices=SERVE_DTYPES)
    quantization: str | None = setting(None, "How vLLM quantizes the weights as it loads them (fp8, ...); unset: not.")
    max_model_len: int | None = setting(
        None, "Longest prompt and answer together in tokens; unset: what the model allows and the memory holds.", ge=1
    )
    devices: Any = setting(None, "The GPUs to use, by number: 0,1; unset: the first ones.", text=True)
    tensor_parallel_size: int = setting(1, "GPUs that share each layer.", ge=1)
    pipeline_parallel_size: int = setting(1, "Groups of layers, each on GPUs of its own.", ge=1)
    gpu_memory_utilization: float = setting(
        0.85, "Share of a GPU's memory that weights and KV cache may take.", gt=0, le=1
    )
    kv_cache_gib: float | None = setting(
        None, "On a CPU: GiB for the KV cache (VLLM_CPU_KVCACHE_SPACE); unset: a tenth of the memory, 4 at most.", gt=0
    )
    port: int = setting(8000, "Port of the server.", ge=1, le=65535)
    host: str = setting("127.0.0.1", "Address it listens on; any but this machine's own needs VLLM_API_KEY set.")
    max_num_seqs: int | None = setting(None, "Requests computed together; unset: as vLLM chooses.", ge=1)
    max_num_batched_tokens: int | None = setting(None, "Tokens computed together; unset: as vLLM chooses.", ge=1)
    enforce_eager: bool | None = setting(None, "Start faster without compiled graphs, and run slower; unset: vLLM's.")
    enable_prefix_caching: bool | None = setting(None, "Keep the beginnings prompts share; unset: as vLLM chooses.")
    load_format: str = setting("safetensors", "Kind of the weight files; auto lets vLLM look, pickled ones included.")
    extra_args: list[str] = setting([], "More words for vLLM's command line: [--max-logprobs,40].")
    python: str | None = setting(None, "Python of the environment that has vLLM; unset: this one.")
    detach: bool = setting(False, "Leave the server running when the command ends.")
    parity: str = setting(
        "strict",
        "What a server is that computes something else than what was trained: an error, a warning, not looked for.",
        choices=("strict", "warn", "off"),
    )
    startup_timeout_s: float = setting(1800.0, "Seconds in which the server must be ready.", gt=0)
    shutdown_timeout: int = setting(60, "Seconds that requests in flight have to end when the server is stopped.", ge=0)


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """How an adapter is merged into its base, and how far the merged model may be from the two."""

    merge: bool = setting(
        False, "Merge the adapter into 16-bit weights beside the run (merged/), at the end of training."
    )
    merge_base: str = setting(
        "dequantized",
        "The base of a QLoRA adapter: the quantized weights it was trained on, made 16-bit, or the original ones.",
        choices=("dequantized", "original"),
    )
    max_shard_gb: float = setting(5.0, "Largest file of merged weights in GB.", gt=0)
    max_kl: float = setting(
        0.02, "Largest mean KL divergence in nats of merged from unmerged next-token distributions.", gt=0
    )
    min_top1_agreement: float = setting(
        0.95, "Smallest share of positions where merged and unmerged agree on the likeliest token.", ge=0, le=1
    )
