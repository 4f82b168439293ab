"""What the jobs of a sweep need in order to be ranked, and compared while they train."""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields

from llmkit.config.resolve import rung_metrics
from llmkit.config.schema import SourceConfig, TrainConfig
from llmkit.errors import did_you_mean


def early_stop_problems(config: TrainConfig) -> list[str]:
    """Why one run could not be compared with others at a rung."""
    settings, metrics = config.early_stop, rung_metrics(config.recipe)
    if settings.name == "none":
        return []
    if config.data.validation is None:
        return [f"early_stop={settings.name} compares runs on held-out rows; set data.validation, there are none."]
    problems = []
    if settings.metric not in metrics:
        problems.append(
            f"early_stop.metric={settings.metric}: recipe={config.recipe} measures {', '.join(metrics)} on held-out "
            f"rows.{did_you_mean(str(settings.metric), metrics)}"
        )
    elif settings.metric != "eval_loss" and not config.evaluation.examples:
        problems.append(
            f"early_stop.metric={settings.metric}: evaluation.examples=0 measures it on no rows; set it, or "
            "early_stop.metric=eval_loss."
        )
    if settings.min_steps > 1 and not float(settings.min_steps).is_integer():
        problems.append(
            f"early_stop.min_steps={settings.min_steps}: a whole number of steps, or below 1 a share of the run."
        )
    return problems


def sweep_problems(configs: Sequence[TrainConfig]) -> list[str]:
    """Why these jobs could not be ranked, or not be compared at the same steps."""
    problems = []
    if len({config.objective for config in configs}) > 1:
        problems.append("the jobs have different objectives and cannot be ranked; set objective= for all of them.")
    if len({json.dumps(asdict(config.early_stop)) for config in configs}) > 1:
        problems.append("early_stop: its settings are those of a whole sweep; give each of them one value.")
    elif configs[0].early_stop.name != "none" and configs[0].early_stop.min_steps < 1:
        lengths = [_length(config) for config in configs]
        keys = list(dict.fromkeys(key for length in lengths for key in length))
        if unlike := [key for key in keys if len({length.get(key) for length in lengths}) > 1]:
            problems.append(
                f"early_stop.min_steps={configs[0].early_stop.min_steps:g} is a share of each run's steps, of which "
                f"these jobs may have more or fewer ({', '.join(unlike)}), and runs are compared after the same step: "
                "set it to a number of steps."
            )
    return problems


def sweep_warnings(configs: Sequence[TrainConfig]) -> list[str]:
    """What these jobs are compared by though it says little."""
    first, keys = configs[0], []
    if len({repr(config.dpo) for config in configs if config.dpo is not None}) > 1:
        keys = ["objective"] if first.objective in ("eval_loss", "train_loss") else []
        keys += ["early_stop.metric"] if first.early_stop.metric == "eval_loss" else []
    if not keys:
        return []
    return [
        "the jobs differ in dpo.*, and losses of unlike kinds do not compare: what comes first by them need not be the "
        f"best. {' '.join(f'{key}=preference_accuracy' for key in keys)} compares them."
    ]


def _length(config: TrainConfig) -> dict[str, str]:
    """What says how many steps a run has, as far as that is known before its data is read: key -> value."""
    training, data = config.training, config.data
    if training.max_steps:
        return {"training.max_steps": repr(training.max_steps)}
    keys = [field.name for field in fields(SourceConfig)] + ["datasets", "validation", "packing"]
    if data.packing != "none" or data.on_overlong in ("drop", "split") or data.on_empty == "drop":
        keys += ["on_overlong", "on_empty", "max_length", "chat_template", "chat_template_kwargs", "train_on"]
    length = {f"training.{key}": repr(getattr(training, key)) for key in ("num_train_epochs", "global_batch_size")}
    return length | {f"data.{key}": repr(getattr(data, key)) for key in keys}
