"""Rules that a whole config must satisfy: ranges of every value, and values that must fit together.

All problems are reported in one message. What only the training machine can tell (does the device compute bf16?) is
checked there, by the worker.
"""

import dataclasses
from pathlib import Path
from typing import Any

from llmkit.config.files import NEVER_ALLOWED
from llmkit.config.nodes import NODES_OF_OPTION, chosen_option, nodes_of_group, schema_keys
from llmkit.config.resolve import device_count, resolve_batch
from llmkit.config.schema import FIGURES_OF_RECIPE, ExportConfig, LoraConfig, QloraConfig, TrainConfig
from llmkit.config.setting import is_legal, legal_values
from llmkit.config.validate_data import data_problems, data_warnings
from llmkit.config.validate_dpo import dpo_problems, dpo_warnings
from llmkit.config.validate_launcher import launcher_problems, launcher_warnings
from llmkit.config.validate_ranks import rank_problems, rank_warnings
from llmkit.config.validate_sweep import early_stop_problems
from llmkit.errors import ConfigError, did_you_mean
from llmkit.storage.names import storage_problems

# Initialisations of PEFT that move part of the base into the adapter.
CHANGE_THE_BASE = ("pissa", "olora")


def validate(config: TrainConfig) -> None:
    """Raise one ConfigError that lists every problem of `config`."""
    problems = [
        *_range_problems(config),
        *_node_problems(config),
        *_method_problems(config),
        *_model_problems(config),
        *data_problems(config),
        *_hardware_problems(config),
        *rank_problems(config),
        *_objective_problems(config),
        *_training_problems(config),
        *_checkpoint_problems(config),
        *dpo_problems(config),
        *launcher_problems(config),
    ]
    if problems:
        raise ConfigError(*problems)


def _checkpoint_problems(config: TrainConfig) -> list[str]:
    problems = storage_problems(config.checkpoint.remote or "")
    if config.resume not in ("auto", "never") and "://" not in config.resume and not Path(config.resume).exists():
        near = did_you_mean(config.resume, ["auto", "never"])
        problems.append(
            f"resume={config.resume}: there is no such directory (seen from {Path.cwd()}); auto, never, a run's "
            f"directory, one of its checkpoints, or s3://...{near}"
        )
    elif "://" in config.resume:
        problems += storage_problems(config.resume)
    known = schema_keys() | {key.partition(".")[0] for key in schema_keys()}
    for name in config.resume_allow:
        if name not in known:
            problems.append(f"resume_allow: {name} is no key and no node.{did_you_mean(name, known)}")
        elif name in NEVER_ALLOWED:
            problems.append(f"resume_allow: {name} decides which weights there are, so it has to be as it was.")
    return problems


def _objective_problems(config: TrainConfig) -> list[str]:
    name = config.objective
    if problems := early_stop_problems(config):
        return problems
    if name in ("eval_loss", "train_loss"):
        return []
    figures = FIGURES_OF_RECIPE.get(config.recipe, ())
    if name not in figures:
        return [f"objective={name}: recipe={config.recipe} measures eval_loss, train_loss, {', '.join(figures)}."]
    if not config.evaluation.examples:
        return [f"objective={name}: evaluation.examples=0 measures it on no rows; set it, or objective=eval_loss."]
    if not name.startswith("train_") and config.data.validation is None:
        return [f"objective={name}: there are no held-out rows; set data.validation, or objective=train_{name}."]
    return []


def warnings(config: TrainConfig) -> list[str]:
    """Settings that are legal but have no effect, or not the one a user would expect."""
    found = []
    training = config.training
    if config.model.name == "tiny" and config.data.name != "demo":
        found.append(
            "model=tiny is the demo's random toy: it learns the form of your data and little else. "
            "Choose a real one, for example model=qwen3_0_6b."
        )
    if training.max_steps is not None and training.num_train_epochs != 3.0:
        found.append(
            f"training.num_train_epochs={training.num_train_epochs:g} has no effect: "
            f"training.max_steps={training.max_steps} ends the run (null: epochs do)."
        )
    if training.warmup_steps and training.lr_scheduler_type == "constant":
        found.append(
            "training.warmup_steps has no effect with lr_scheduler_type=constant; constant_with_warmup has one."
        )
    if (remote := config.checkpoint.remote) and "://" not in remote and _same_disk(Path(remote), Path.cwd()):
        found.append(f"checkpoint.remote={remote} is a directory on the run's own disk; a bucket is s3://BUCKET/PATH.")
    if config.model.path and config.model.hub_id:
        found.append(f"model.hub_id={config.model.hub_id} has no effect: model.path={config.model.path} is loaded.")
    if config.model.revision != "main" and (config.model.path or not config.model.hub_id):
        found.append(f"model.revision={config.model.revision} has no effect on a model that is not from the hub.")
    if config.data.validation is None and training.final == "best":
        found.append("training.final=best has no effect without data.validation: the last weights are kept.")
    if config.tracking.name == "none" and (config.tracking.tags or config.tracking.entity or config.tracking.group):
        found.append("tracking.tags, entity and group have no effect with tracking=none; choose tracking=wandb.")
    if config.lora is not None and config.lora.init_lora_weights in CHANGE_THE_BASE:
        found.append(
            f"lora.init_lora_weights={config.lora.init_lora_weights} changes the base's weights too: the adapter is "
            "right only where PEFT loads it, which changes them again. Merge it before serving with anything else."
        )
    if config.export.merge and config.lora is None:
        found.append(f"export.merge=true has no effect with method={config.method.name}: final/ is a whole model.")
    if config.export.merge_base != ExportConfig().merge_base and config.qlora is None:
        found.append(f"export.merge_base={config.export.merge_base} has no effect without a quantized base.")
    if config.qlora is not None and config.qlora.bits == 8:
        for key in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
            if getattr(config.qlora, key) != getattr(QloraConfig(), key):
                found.append(f"qlora.{key} has no effect with qlora.bits=8.")
    found += [*data_warnings(config), *dpo_warnings(config), *rank_warnings(config)]
    return found + launcher_warnings(config)


def _same_disk(place: Path, other: Path) -> bool:
    while not place.exists():
        place = place.parent
    return place.stat().st_dev == other.stat().st_dev


def _range_problems(node: Any, prefix: str = "") -> list[str]:
    problems = []
    for field in dataclasses.fields(node):
        value, key = getattr(node, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            problems += _range_problems(value, f"{key}.")
        elif not is_legal(field, value):
            problems.append(f"{key}={value}: must be {legal_values(field)}.")
    return problems


def _node_problems(config: TrainConfig) -> list[str]:
    problems = []
    for group, nodes_of_option in NODES_OF_OPTION.items():
        option = chosen_option(config, group)
        wanted = nodes_of_option.get(option, ())
        for node in sorted(nodes_of_group(group)):
            if (getattr(config, node) is not None) != (node in wanted):
                problems.append(
                    f"{group}: {option} does not go with its settings ({node}); choose it with {group}={option}."
                )
    return problems


def _method_problems(config: TrainConfig) -> list[str]:
    problems = []
    if isinstance(config.lora, LoraConfig):
        target = config.lora.target_modules
        if isinstance(target, str) and target != "all-linear":
            problems.append(f"lora.target_modules={target}: write a list, [{target}], or all-linear.")
        elif isinstance(target, list) and not all(isinstance(name, str) for name in target):
            problems.append(f"lora.target_modules={target}: a list of module names, for example [q_proj,v_proj].")
        elif not target:
            problems.append("lora.target_modules is empty: no parameter would be trained.")
    if config.freeze is not None and not (
        config.freeze.last_n_layers or config.freeze.patterns or config.freeze.embeddings or config.freeze.head
    ):
        problems.append("freeze: nothing is left to train; set last_n_layers, patterns, embeddings or head.")
    return problems


def _model_problems(config: TrainConfig) -> list[str]:
    model = config.model
    if not (model.path or model.hub_id or model.name == "tiny"):
        return ["model=custom: say which, with model=org/name (the hub) or model.path=DIR."]
    if model.path and "://" in model.path:
        return [f"model.path={problem}" for problem in storage_problems(model.path)]
    if model.path and not Path(model.path).is_dir():
        return [f"model.path={model.path}: the directory does not exist."]
    return []


def _hardware_problems(config: TrainConfig) -> list[str]:
    hardware, precision = config.hardware, config.precision.name
    problems = []
    if precision != "auto" and precision not in hardware.precisions:
        problems.append(f"precision={precision}: hardware={hardware.name} has {', '.join(hardware.precisions)}.")
    return problems


def _training_problems(config: TrainConfig) -> list[str]:
    training, problems = config.training, []
    for key in ("warmup_steps", "eval_steps", "save_steps"):
        value = getattr(training, key)
        if value is not None and value > 1 and not float(value).is_integer():
            problems.append(f"training.{key}={value}: a whole number of steps, or below 1 a share of the run.")
    sizes = (training.global_batch_size, training.per_device_train_batch_size, training.gradient_accumulation_steps)
    devices = device_count(config)
    if all(size is None or size > 0 for size in sizes) and devices > 0:
        try:
            resolve_batch(dataclasses.replace(training), devices)
        except ConfigError as error:
            problems += error.problems
    return problems
