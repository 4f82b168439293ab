"""`launcher=packed`: the LoRA runs of a sweep in one process, on one frozen base, as many at a time as pays.

    llmkit train method=lora model=tinyllama launcher=packed -m lora.r=4,8,16,32

Runs that cannot share a base with others run by themselves, as with launcher=local.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from llmkit.config import TrainConfig
from llmkit.config.files import flat_values
from llmkit.config.resolve import in_group
from llmkit.launchers.sweep import Job

# What may differ between the runs of a pack: each run's own adapter, optimisation, order of data, names and places.
OWN = {
    "": ("name", "run_dir", "seed", "resume", "derived"),
    "lora": ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "init_lora_weights"),
    "training": (
        "num_train_epochs",
        "max_steps",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "logging_steps",
        "eval_steps",
        "save_steps",
        "final",
    ),
    "tracking": ("run_name", "tags"),
}
# PEFT's starts that leave the base as it is; the others, pissa and olora say, move a part of it into the adapter.
STARTS = (True, False, "gaussian", "orthogonal")
# Trackers of Transformers with state of their own for each run.
OF_EACH_RUN = {"none", "tensorboard"}


def packs(jobs: Sequence[Job], *, devices: int = 1) -> list[list[Job]]:
    """The jobs that are to share a process each, in the order of their first; says which ones cannot share one.

    Args:
        devices: there are to be at least so many packs where there are so many jobs.
    """
    alike: dict[str, list[Job]] = {}
    for job in jobs:
        reason = why_not(job.config)
        if reason:
            print(f"alone   {job.run_dir.name}: {reason}", file=sys.stderr, flush=True)
        key = str(job.run_dir) if reason else json.dumps(_shared(job.config), sort_keys=True, default=str)
        alike.setdefault(key, []).append(job)
    found = list(alike.values())
    _say_who_differs(found)
    while len(found) < devices and (largest := max(found, key=len)) and len(largest) > 1:
        found.remove(largest)
        half = (len(largest) + 1) // 2
        found += [largest[:half], largest[half:]]
    return found


def why_not(config: TrainConfig) -> str | None:
    """Why a run cannot share a base with others; None if it can."""
    if config.lora is None:
        return f"method={config.method.name} trains the base itself; only lora and qlora leave it to be shared"
    if in_group(config):
        return "a run of several processes has them to itself"
    if config.qlora is not None and config.qlora.bits == 8:
        return "qlora.bits=8 rounds a batch by its largest activations, which would be those of all runs"
    if config.lora.bias != "none":
        return f"lora.bias={config.lora.bias} trains biases of the base, which the others share"
    if trackers := set(config.tracking.report_to) - OF_EACH_RUN:
        return f"tracking.report_to={','.join(sorted(trackers))} keeps one run in a process"
    if config.lora.init_lora_weights not in STARTS:
        return f"lora.init_lora_weights={config.lora.init_lora_weights} changes the base, which the others share"
    return None


def _say_who_differs(packs: Sequence[Sequence[Job]]) -> None:
    """Say of jobs that could share a base with others, but have no job like themselves, what they differ in."""
    could = [pack for pack in packs if why_not(pack[0].config) is None]
    if len(could) < 2:
        return
    largest = max(could, key=len)
    others = flat_values(_shared(largest[0].config))
    for pack in could:
        if len(pack) == 1 and pack is not largest:
            own = flat_values(_shared(pack[0].config))
            keys = sorted(key for key in own.keys() | others.keys() if own.get(key) != others.get(key))
            name = pack[0].run_dir.name
            print(f"alone   {name}: differs from the others in {', '.join(keys)}", file=sys.stderr, flush=True)


def _shared(config: TrainConfig) -> dict[str, Any]:
    """All that runs of one pack have in common."""
    values: dict[str, Any] = dataclasses.asdict(config)
    for node, keys in OWN.items():
        for key in keys:
            (values[node] if node else values).pop(key)
    if config.data.special_tokens_init == "sample":  # draws the rows of new tokens, which are the base's
        values["seed"] = config.seed
    return values
