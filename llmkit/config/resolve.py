"""From the composed DictConfig to one plain, complete TrainConfig: fill in what follows from the rest."""

import contextlib
import glob
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmkit.config.init_from import adopt_init_from
from llmkit.config.schema import FIGURES_OF_RECIPE, DpoConfig, LoraConfig, TrainConfig, TrainingConfig
from llmkit.config.sources import names_split
from llmkit.errors import ConfigError
from llmkit.remote import reach_with

DEFAULT_GLOBAL_BATCH_SIZE = 16
# Micro-batches that llmkit chooses itself: a large model's activations should fit without a thought.
LARGEST_MICRO_BATCH = 16
LARGEST_MICRO_BATCH_OF_LARGE_MODELS = 4
LARGE_MODEL = 0.5e9  # parameters
EVAL_BATCHES_PER_MICRO_BATCH = 2  # without gradients a batch takes less than half the memory
SEQUENCES = {"sft": 1, "dpo": 2}  # of one example: a pair is two
# Recipe -> method -> rate. Those for dpo are of TRL's own example commands, trl/scripts/dpo.py (trl 1.16).
DEFAULT_LEARNING_RATE = {
    "sft": {"full": 2e-5, "freeze": 2e-5, "lora": 2e-4, "qlora": 2e-4},
    "dpo": {"full": 5e-7, "freeze": 5e-7, "lora": 5e-6, "qlora": 5e-6},
}
# TOKENIZERS_PARALLELISM is none.
SECRET = re.compile(r"(?i)(token(?!iz)|secret|passw|credential|(^|_)(api)?key(_|$))")


def resolve(config: DictConfig) -> TrainConfig:
    """The typed config with every derived value filled in; `derived` lists their keys.

    What only the training machine knows (device, precision, the model's context) stays open: the worker fills it in.
    Raises ConfigError for values that cannot be resolved and for secrets, which belong in the environment.
    """
    node = OmegaConf.create({key: value for key, value in config.items_ex(resolve=False) if key != "hydra"})
    _refuse_secrets(OmegaConf.to_container(node, resolve=False))
    try:
        values: Any = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    resolved = TrainConfig(**values)
    resolved.sweeper = None  # it has chosen the runs, of which this is one
    reach_with(resolved.storage)
    adopt_init_from(resolved)
    if resolved.training.learning_rate is None:
        # An unknown recipe or method has no rate: `validate` names it, with all else.
        resolved.training.learning_rate = DEFAULT_LEARNING_RATE.get(resolved.recipe, {}).get(resolved.method.name)
        resolved.derived.append("training.learning_rate")
    if resolved.objective == "eval_loss" and resolved.data.validation is None:
        resolved.objective = "train_loss"  # the only loss there is
        resolved.derived.append("objective")
    if resolved.early_stop.name != "none" and resolved.early_stop.metric is None:
        can_compare = resolved.objective in rung_metrics(resolved.recipe)
        resolved.early_stop.metric = resolved.objective if can_compare else "eval_loss"
        resolved.derived.append("early_stop.metric")
    if isinstance(resolved.lora, LoraConfig) and resolved.lora.lora_alpha is None:
        resolved.lora.lora_alpha = 2 * resolved.lora.r
        resolved.derived.append("lora.lora_alpha")
    if isinstance(resolved.dpo, DpoConfig) and isinstance(resolved.dpo.loss_type, str):
        resolved.dpo.loss_type = [resolved.dpo.loss_type]
    with contextlib.suppress(ConfigError):  # batch sizes that contradict each other: `validate` says so, with all else
        small = (resolved.model.parameters or LARGE_MODEL) < LARGE_MODEL
        largest = (
            LARGEST_MICRO_BATCH if small else LARGEST_MICRO_BATCH_OF_LARGE_MODELS // SEQUENCES.get(resolved.recipe, 1)
        )
        resolved.derived += resolve_batch(resolved.training, device_count(resolved), largest=largest)
    return resolved


def rung_metrics(recipe: str) -> list[str]:
    """What `early_stop.metric` may be: what the recipe measures on held-out rows."""
    return ["eval_loss", *(name for name in FIGURES_OF_RECIPE.get(recipe, ()) if not name.startswith("train_"))]


def use_absolute_paths(config: TrainConfig) -> None:
    """Name local files by absolute paths, in place: the config is read again from other directories."""
    data, model = config.data, config.model
    for name in ("validation", "test"):
        value = getattr(data, name)
        if isinstance(value, dict):
            setattr(data, name, {key: _absolute(item) if key == "path" else item for key, item in value.items()})
        elif isinstance(value, str) and not names_split(data, value):
            setattr(data, name, _absolute(value))
    for node, key in (
        *((source, "path") for source in (data, *data.datasets)),
        (data, "special_tokens"),
        (data, "chat_template"),
        (model, "path"),
        (model, "chat_template"),
        (config, "init_from"),
        (config, "resume"),
    ):
        setattr(node, key, _absolute(getattr(node, key)))
    if (remote := config.checkpoint.remote) and "://" not in remote:
        config.checkpoint.remote = str(Path(remote).expanduser().absolute())


def _absolute(value: Any) -> Any:
    """The absolute path of what exists, or of a glob that something matches; any other value as it is."""
    if not isinstance(value, str) or value in ("", "demo"):
        return value
    return str(Path(value).absolute()) if Path(value).exists() or glob.glob(value, recursive=True) else value


def in_group(config: TrainConfig) -> bool:
    """Whether the run is one of a process group; DeepSpeed wants one of a single process too."""
    return device_count(config) > 1 or config.deepspeed.stage > 0


def device_count(config: TrainConfig) -> int:
    """Devices of the whole run."""
    return config.hardware.num_processes * config.hardware.num_nodes


def resolve_batch(training: TrainingConfig, devices: int, *, largest: int = LARGEST_MICRO_BATCH) -> list[str]:
    """Complete global batch = micro-batch x accumulation x devices in place; return the keys that were filled in.

    Args:
        largest: most examples of a micro-batch where neither it nor the accumulation is set.

    Raises ConfigError if the given values contradict each other or do not divide.
    """
    total, micro, steps = (
        training.global_batch_size,
        training.per_device_train_batch_size,
        training.gradient_accumulation_steps,
    )
    given = {
        "training.global_batch_size": total,
        "training.per_device_train_batch_size": micro,
        "training.gradient_accumulation_steps": steps,
    }
    if total is None:
        total = micro * (steps or 1) * devices if micro else max(DEFAULT_GLOBAL_BATCH_SIZE, (steps or 1) * devices)
        if not micro:
            total -= total % ((steps or 1) * devices)
    if micro is None:
        micro = total // ((steps or 1) * devices)
        if steps is None:
            micro = next((size for size in range(min(micro, largest), 0, -1) if total % (size * devices) == 0), micro)
    if steps is None:
        steps = total // (micro * devices) if micro else 0
    if micro * steps * devices != total or not total:
        stated = ", ".join(f"{key}={value}" for key, value in given.items() if value is not None)
        raise ConfigError(
            f"{stated}: examples per step must be global_batch_size = per_device_train_batch_size x "
            f"gradient_accumulation_steps x {devices} device{'s' if devices > 1 else ''}; unset one of them, or make "
            "global_batch_size divide."
        )
    training.global_batch_size = total
    training.per_device_train_batch_size = micro
    training.gradient_accumulation_steps = steps
    derived = [key for key, value in given.items() if value is None]
    if training.per_device_eval_batch_size is None:
        training.per_device_eval_batch_size = EVAL_BATCHES_PER_MICRO_BATCH * micro
        derived.append("training.per_device_eval_batch_size")
    return derived


def secret_problem(key: str) -> str:
    """The message for an environment variable that holds a secret, set in a config; empty for any other key."""
    name = key.removeprefix("hardware.env.")
    if name == key or not SECRET.search(name):
        return ""
    return (
        f"{key}: secrets are never part of a config, which is written to disk; export {name} in the shell that starts "
        "llmkit, and the run has it."
    )


def _refuse_secrets(values: Any, key: str = "") -> None:
    if isinstance(values, dict):
        for name, value in values.items():
            dotted = f"{key}.{name}" if key else str(name)
            if problem := secret_problem(dotted):
                raise ConfigError(problem)
            _refuse_secrets(value, dotted)
    elif isinstance(values, list):
        for value in values:
            _refuse_secrets(value, key)
    elif isinstance(values, str):
        for name in re.findall(r"\$\{oc\.env:\s*([^,}]+)", values):
            if SECRET.search(name):
                raise ConfigError(f"{key}: ${{oc.env:{name}}} would write a secret to disk; the run has {name} anyway.")
