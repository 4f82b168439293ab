"""The typed config: every key a run can have, with its meaning, unit, default and legal range.

Field names are those of the library a value goes to (Transformers, PEFT, bitsandbytes, DeepSpeed, W&B).
`conf/` sets values; nothing is declared there. Nodes typed `Any` at the root exist only when their group asks for
them: `lora` with `method=lora`, `dpo` with `recipe=dpo`, so that `method=full lora.r=4` is an error and not a setting
without effect.
"""

from dataclasses import dataclass, field
from typing import Any

from llmkit.config.serving_schema import ExportConfig, ServeConfig
from llmkit.config.setting import setting
from llmkit.config.sweeper_schema import EarlyStopConfig

RECIPES = ("sft", "dpo")
METHODS = ("full", "freeze", "lora", "qlora")
PRECISIONS = ("auto", "bf16", "fp16", "fp32", "bf16_pure")
DEVICES = ("auto", "cpu", "cuda")
# trl 1.16's losses for DPO; see trl.DPOConfig.
DPO_LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# The figures beside the loss that a recipe measures before and after training.
FIGURES_OF_RECIPE = {
    "sft": ("exact_match", "train_exact_match"),
    "dpo": ("preference_accuracy", "train_preference_accuracy"),
}
# Layouts of a row, see docs/data.md; `auto` tries them in this order.
FORMATS = (
    "messages",
    "sharegpt",
    "prompt_completion",
    "alpaca",
    "question_answer",
    "role_markers",
    "text",
    "preference_messages",
    "preference",
    "preference_sharegpt",
)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    name: str = setting("custom", "The option of the model group; `custom` for any hub id or directory.")
    hub_id: str | None = setting(None, "Hugging Face hub id, `org/name`.")
    revision: str = setting("main", "Branch, tag or commit of the hub model.")
    commit: str | None = setting(None, "The commit `revision` was at; recorded by the worker, used by a repeated run.")
    path: str | None = setting(None, "A directory with a model; takes the place of `hub_id`.")
    context_length: int | None = setting(None, "Longest sequence in tokens; unset: the model's own config says.", gt=0)
    parameters: float | None = setting(None, "Number of parameters; unset: counted when the model is loaded.", gt=0)
    gated: bool = setting(False, "Whether the hub asks for an accepted licence and a token (HF_TOKEN).")
    attn_implementation: str = setting(
        "auto",
        "Attention kernel; `auto` lets Transformers choose.",
        choices=("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
    )
    chat_template: str = setting(
        "keep-original",
        "Template where `data.chat_template` is unset: `keep-original`, a shipped name, or a Jinja file.",
    )
    pad_token: str = setting("auto", "Padding token: `auto`, `unk`, `bos`, `eos`, or a token of the vocabulary.")
    trust_remote_code: bool = setting(False, "Run Python code that comes with the model; off unless you trust it.")


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """Where rows come from and how they look; `data` is one itself, `data.datasets` lists several."""

    path: str | None = setting(None, "A file, a directory or a glob: JSON, JSONL, CSV or Parquet, also gzipped.")
    hub_id: str | None = setting(None, "Hub data set, `org/name`, used where `path` is unset.")
    hub_config: str | None = setting(None, "Configuration of the hub data set.")
    split: str = setting("train", "Split of the hub data set, or of a directory that holds several.")
    revision: str = setting("main", "Branch, tag or commit of the hub data set.")
    commit: str | None = setting(None, "The commit `revision` was at; recorded by the worker, used by a repeated run.")
    format: str = setting("auto", "Layout of a row; `auto` detects it from the columns.", choices=("auto", *FORMATS))
    columns: dict[str, str] = setting({}, "Foreign column names, as {OURS: THEIRS}: {question: Problem}.")
    limit: int | None = setting(None, "Use only the first rows.", gt=0)
    weight: float | None = setting(
        None, "Share of the training rows relative to the other sources' weights; unset: all rows.", gt=0
    )
    repeat: int = setting(1, "How many times each training row is used in a pass.", ge=1)


@dataclass(kw_only=True, slots=True)
class DataConfig(SourceConfig):
    name: str = setting("jsonl", "The option of the data group.")
    datasets: list[SourceConfig] = setting([], "Several sources, concatenated; takes the place of `path` and `hub_id`.")
    validation: Any = setting(
        0.05, "Held-out rows: a share of the training rows (0-1), a file, a split's name, a source, or null.", text=True
    )
    test: Any = setting(None, "Rows measured once, at the end: a file, a split's name, a source, or null.", text=True)
    max_length: int | None = setting(None, "Longest example in tokens; unset: the model's context, at most 2048.", ge=8)
    chat_template: str | None = setting(
        None, "`keep-original`, a shipped name (chat-ml, plain), or a Jinja file; unset: model.chat_template."
    )
    chat_template_kwargs: dict[str, Any] = setting(
        {}, "Variables of the chat template, the same in training, evaluation and serving: {enable_thinking: false}."
    )
    special_tokens: Any = setting(None, "New tokens: a list, or a JSON file {tokens: [...]}.", text=True)
    special_tokens_init: str = setting(
        "similar",
        "Where new tokens start: the mean of the tokens they were written with (similar), drawn around the mean of "
        "all (sample), or that mean (mean).",
        choices=("similar", "sample", "mean"),
    )
    train_on: str = setting(
        "assistant",
        "What is learnt: every assistant turn, the last one, those after the prompt (completion), or all tokens.",
        choices=("assistant", "last", "completion", "all"),
    )
    on_overlong: str = setting(
        "error",
        "Rows over max_length: an error, dropped, shortened from the front, or split at turns.",
        choices=("error", "drop", "truncate_prompt", "split"),
    )
    on_empty: str = setting("error", "What happens to rows with nothing to learn from.", choices=("error", "drop"))
    packing: str = setting(
        "none",
        "Rows put together up to max_length, unseen by each other: none, or best fit decreasing.",
        choices=("none", "bfd"),
    )
    num_proc: int | None = setting(None, "Processes that prepare the data; unset: one per core.", ge=1)


@dataclass(kw_only=True, slots=True)
class MethodConfig:
    name: str = setting("lora", "What is trained.", choices=METHODS)


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """PEFT's names; see peft.LoraConfig."""

    r: int = setting(8, "Rank of the adapter matrices.", ge=1)
    lora_alpha: int | None = setting(None, "Scale of the update is lora_alpha / r; unset: 2r.", gt=0)
    lora_dropout: float = setting(0.0, "Dropout on the adapter's input.", ge=0, lt=1)
    target_modules: Any = setting("all-linear", "Modules that get an adapter: a list of names, or `all-linear`.")
    modules_to_save: list[str] | None = setting(None, "Modules trained in full and saved with the adapter.")
    use_rslora: bool = setting(False, "Scale by lora_alpha / sqrt(r) (arXiv 2312.03732).")
    use_dora: bool = setting(False, "Weight-decomposed LoRA (arXiv 2402.09353).")
    init_lora_weights: Any = setting(True, "PEFT's initialisation: true, gaussian, pissa, olora, ...")
    bias: str = setting("none", "Which biases are trained too.", choices=("none", "all", "lora_only"))
    layers_to_transform: list[int] | None = setting(None, "Indices of the layers that get adapters; unset: all.")


@dataclass(kw_only=True, slots=True)
class QloraConfig:
    """How the frozen base is quantized by bitsandbytes; the adapter itself is the `lora` node."""

    bits: int = setting(4, "Bits per frozen weight.", choices=(4, 8))
    bnb_4bit_quant_type: str = setting("nf4", "4-bit data type (arXiv 2305.14314).", choices=("nf4", "fp4"))
    bnb_4bit_use_double_quant: bool = setting(True, "Quantize the 4-bit scales too; saves 0.4 bits per weight.")


@dataclass(kw_only=True, slots=True)
class FreezeConfig:
    last_n_layers: int = setting(2, "Number of decoder layers, counted from the last, that are trained.", ge=0)
    patterns: list[str] = setting([], "Regular expressions; parameters whose name matches one are trained too.")
    embeddings: bool = setting(False, "Train the input embeddings.")
    head: bool = setting(False, "Train the output head.")


@dataclass(kw_only=True, slots=True)
class DpoConfig:
    """TRL's names; see trl.DPOConfig."""

    loss_type: Any = setting(
        ["sigmoid"], "A loss by its name, or a list of losses that are added up.", choices=DPO_LOSSES
    )
    loss_weights: list[float] | None = setting(None, "Factor of each loss in the list; unset: 1.0 for all.")
    beta: float = setting(
        0.1,
        "How strongly the policy is held to the reference; losses of unlike beta do not compare, so sweep it with "
        "objective=preference_accuracy.",
        gt=0,
    )
    label_smoothing: float = setting(
        0.0,
        "Share of pairs taken to be labelled the wrong way round (robust, exo_pair, aot, aot_unpaired).",
        ge=0,
        lt=1,
    )
    f_divergence_type: str = setting(
        "reverse_kl", "Divergence between policy and reference (arXiv 2309.16240).", choices=F_DIVERGENCES
    )
    f_alpha_divergence_coef: float = setting(0.5, "Alpha of f_divergence_type=alpha_divergence.")
    use_weighting: bool = setting(False, "Weight pairs by their likelihood under the policy (arXiv 2406.11827).")
    ld_alpha: float | None = setting(
        None, "Weight of the tokens past the shorter answer's length (arXiv 2409.06411); unset: 1.", ge=0, le=1
    )
    discopop_tau: float = setting(0.05, "Temperature of the loss discopop (arXiv 2406.08414).", gt=0)
    disable_dropout: bool = setting(True, "Switch all dropout off, that of the adapter too.")
    precompute_ref_log_probs: bool = setting(
        False, "Ask the reference once, before training, and keep no copy of it in memory."
    )
    precompute_ref_batch_size: int | None = setting(
        None, "Pairs at a time when precomputing; unset: per_device_eval_batch_size.", ge=1
    )


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    name: str = setting(
        "auto",
        "Arithmetic: fp32; bf16 or fp16 (trained weights in fp32); bf16_pure (all bf16); auto (the device's best).",
        choices=PRECISIONS,
    )


@dataclass(kw_only=True, slots=True)
class DeepSpeedConfig:
    """DeepSpeed's `zero_optimization` section, in its own names."""

    name: str = setting("none", "The option of the deepspeed group.")
    stage: int = setting(0, "ZeRO stage; 0 is no DeepSpeed.", choices=(0, 1, 2, 3))
    overlap_comm: bool = setting(True, "Overlap gradient reduction with the backward pass.")
    contiguous_gradients: bool = setting(True, "Copy gradients to a contiguous buffer as they are produced.")
    reduce_bucket_size: Any = setting("auto", "Elements reduced at a time, or auto.")
    offload_optimizer: str = setting("none", "Where optimizer state lives.", choices=("none", "cpu", "nvme"))
    offload_param: str = setting("none", "Where parameters live (stage 3).", choices=("none", "cpu", "nvme"))
    stage3_gather_16bit_weights_on_model_save: bool = setting(True, "Save a whole model under stage 3.")


@dataclass(kw_only=True, slots=True)
class DistributedConfig:
    """How several processes share one model where DeepSpeed does not; see torch.distributed."""

    name: str = setting(
        "ddp", "Each process holds the whole model (ddp), or a part of it (fsdp2, on GPUs).", choices=("ddp", "fsdp2")
    )
    reshard_after_forward: bool = setting(True, "Free the parts of other processes after the forward pass too (fsdp2).")
    cpu_offload: bool = setting(False, "Keep weights, gradients and optimizer state in host memory (fsdp2).")


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    name: str = setting("auto", "The option of the hardware group.")
    device: str = setting("auto", "Device kind; `auto`: a GPU where there is one.", choices=DEVICES)
    memory_gib: float | None = setting(None, "Memory of one device in GiB; unset: asked of the device.", gt=0)
    precisions: list[str] = setting(["fp32", "bf16", "bf16_pure", "fp16"], "Precisions the device computes natively.")
    env: dict[str, str] = setting({}, "Environment variables of the worker.")
    price_per_hour: float | None = setting(None, "Price of one device per hour, in your currency.", ge=0)
    num_processes: int = setting(1, "Processes (devices) per node.", ge=1)
    num_nodes: int = setting(1, "Machines.", ge=1)
    node_rank: int | None = setting(
        None, "Which of the machines this is, from 0; only where no scheduler starts them (launcher=local).", ge=0
    )
    rendezvous: str | None = setting(
        None, "HOST:PORT on machine 0 where the machines find one another (launcher=local).", text=True
    )


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """Transformers' names; see transformers.TrainingArguments."""

    num_train_epochs: float = setting(3.0, "Passes over the training data.", gt=0)
    max_steps: int | None = setting(None, "Optimizer steps; set, it takes the place of num_train_epochs.", ge=1)
    learning_rate: float | None = setting(
        None,
        "Peak learning rate; unset: 2e-4 for lora and qlora, 2e-5 for full and freeze; with recipe=dpo 5e-6 and 5e-7.",
        gt=0,
    )
    lr_scheduler_type: str = setting(
        "cosine",
        "Shape of the learning rate over the run.",
        choices=(
            "linear",
            "cosine",
            "constant",
            "constant_with_warmup",
            "inverse_sqrt",
            "polynomial",
            "cosine_with_restarts",
        ),
    )
    warmup_steps: float = setting(0.03, "Warm-up: steps, or below 1 a share of all steps.", ge=0)
    global_batch_size: int | None = setting(
        None, "Examples per optimizer step over all devices; unset: 16, or what the two keys below make.", ge=1
    )
    per_device_train_batch_size: int | None = setting(None, "Examples per device and micro-batch, on average.", ge=1)
    gradient_accumulation_steps: int | None = setting(None, "Micro-batches per optimizer step.", ge=1)
    per_device_eval_batch_size: int | None = setting(
        None, "As above, in evaluation; unset: twice the micro-batch.", ge=1
    )
    weight_decay: float = setting(0.0, "Decoupled weight decay.", ge=0)
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm; 0 switches clipping off.", ge=0)
    optim: str = setting(
        "adamw_torch_fused", "Optimizer, by Transformers' name (adamw_torch, adamw_8bit, adafactor, ...)."
    )
    adam_beta1: float = setting(0.9, "AdamW's first moment decay.", ge=0, lt=1)
    adam_beta2: float = setting(0.999, "AdamW's second moment decay.", ge=0, lt=1)
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon.", gt=0)
    gradient_checkpointing: bool | None = setting(
        None, "Recompute activations to save memory; unset: on from half a billion parameters."
    )
    logging_steps: int = setting(10, "Steps between two lines of metrics.", ge=1)
    eval_steps: float = setting(0.25, "Steps between evaluations, or below 1 a share of the run.", gt=0)
    save_steps: float | None = setting(
        None, "Steps between checkpoints, or below 1 a share of the run; unset: checkpoint.minutes alone decides.", gt=0
    )
    final: str = setting(
        "last", "Which weights `final/` holds: of the last step or of the best evaluation.", choices=("last", "best")
    )


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    minutes: float | None = setting(
        30.0, "A checkpoint after this long without one, beside those of training.save_steps; null: none.", gt=0
    )
    keep: int = setting(2, "How many of the newest stay; the one with the lowest eval_loss stays too.", ge=1)
    remote: str | None = setting(
        None, "Mirror checkpoints and the final model below this place (s3://bucket/path or a directory), as they come."
    )
    patience_s: float = setting(
        300.0, "Seconds that the end of a run waits for a remote place that does not answer.", ge=0
    )
    trust: bool = setting(
        False, "Load files that can run code (DeepSpeed's own) from a checkpoint in a bucket; off unless you trust it."
    )


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    examples: int = setting(
        64,
        "Rows per split that figures beside the loss (exact match, preference accuracy) are measured on; 0: none.",
        ge=0,
    )
    samples: int = setting(3, "Fixed prompts whose answers are shown at each evaluation.", ge=0)
    max_new_tokens: int | None = setting(
        None, "Longest generated answer in tokens; unset: that of the longest reference answer, at most 256.", ge=1
    )
    baseline: bool = setting(True, "Measure the base model before training, for comparison.")


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """W&B's names for project, entity, group and tags."""

    name: str = setting("none", "The option of the tracking group.", choices=("none", "wandb"))
    report_to: list[str] = setting([], "Other trackers Transformers knows: tensorboard, mlflow, ...")
    project: str = setting("llmkit", "W&B project.")
    entity: str | None = setting(None, "W&B user or team; unset: the key's default.")
    group: str | None = setting(None, "W&B group; unset: a sweep's jobs are grouped under the sweep's directory name.")
    run_name: str | None = setting(None, "Name of the run in the tracker; unset: the run directory's name.")
    tags: list[str] = setting([], "W&B tags.")


@dataclass(kw_only=True, slots=True)
class StorageConfig:
    """How `s3://` addresses are reached; credentials come from the usual AWS variables or the profile only."""

    endpoint_url: str | None = setting(
        None, "Address of an S3-compatible server; unset: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, or Amazon's own."
    )
    region: str | None = setting(None, "Region of the buckets; unset: AWS_REGION, AWS_DEFAULT_REGION or the profile's.")
    profile: str | None = setting(None, "Profile in the AWS files of this machine; unset: AWS_PROFILE, or `default`.")
    addressing_style: str = setting(
        "auto",
        "Where the bucket stands in a request's address: in the path, in the host name (virtual), or as boto3 chooses.",
        choices=("auto", "path", "virtual"),
    )
    checksums: str = setting(
        "when_required",
        "When boto3 adds checksums of its own, which some S3-compatible servers refuse; llmkit checks SHA-256 anyway.",
        choices=("when_required", "when_supported"),
    )
    max_concurrency: int = setting(8, "Requests at a time.", ge=1, le=256)
    part_size_mib: int = setting(
        16, "Size in MiB of the parts that large files are sent and fetched in.", ge=5, le=5120
    )
    timeout_s: float = setting(60.0, "Seconds without an answer after which a request counts as failed.", gt=0)
    max_attempts: int = setting(5, "How often a request is tried before it counts as failed.", ge=1)
    cache_gib: float = setting(
        200.0, "Bound in GiB of the local cache of files fetched from buckets; what is in use stays.", gt=0
    )


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    recipe: str = setting(
        "sft", "What the run does: learn answers (sft), or prefer one answer to another (dpo).", choices=RECIPES
    )
    name: str | None = setting(None, "Name of the run: it lives in runs/<name>; unset: a timestamp.")
    run_dir: str | None = setting(None, "Directory of the run; unset: runs/<name>.")
    init_from: str | None = setting(
        None, "Start from the weights of this finished run (its directory); an adapter is continued, not stacked."
    )
    resume: str = setting(
        "auto",
        "Go on with the run's own newest checkpoint (auto), start over (never), or, where it has none, with another: a "
        "run, a checkpoint, s3://...",
        text=True,
    )
    resume_allow: list[str] = setting(
        [], "Keys or nodes that may differ from those the run began with: [data, training.max_steps]."
    )
    seed: int = setting(42, "Seed of initialisation, data order and dropout.", ge=0, le=2**32 - 1)
    objective: str = setting(
        "eval_loss",
        "The figure a sweep compares runs by.",
        choices=("eval_loss", "train_loss", *(name for names in FIGURES_OF_RECIPE.values() for name in names)),
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    lora: Any = None
    qlora: Any = None
    freeze: Any = None
    dpo: Any = None
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    launcher: Any = None
    sweeper: Any = None
    derived: list[str] = setting([], "Keys llmkit filled in; a run repeated from its config.yaml derives them anew.")
