"""Our config reaches Transformers' and DeepSpeed's arguments under their own names."""

import dataclasses
from pathlib import Path

import pytest
import torch

from llmkit.config.resolve import resolve_batch
from llmkit.config.schema import DeepSpeedConfig, TrainConfig, TrainingConfig
from llmkit.errors import ConfigError
from llmkit.model.precision import KINDS
from llmkit.training.arguments import deepspeed_dict, total_steps, training_arguments


def arguments(config: TrainConfig, precision: str = "fp32") -> dict:
    return training_arguments(
        config, output_dir=Path("out"), precision=KINDS[precision], device=torch.device("cpu"), steps=100
    )


def test_every_training_setting_changes_what_the_trainer_is_given():
    """A field that is mapped to nothing would be decoration."""
    base = TrainConfig()
    resolve_batch(base.training, devices=1)
    before = arguments(base)
    other = {str: "linear", int: 7, float: 0.125, bool: True}
    elsewhere = {"global_batch_size", "final"}  # what resolve_batch and the session read

    for field in dataclasses.fields(TrainingConfig):
        if field.name in elsewhere:
            continue
        changed = TrainConfig()
        resolve_batch(changed.training, devices=1)
        kinds = getattr(field.type, "__args__", (field.type,))
        value = "adafactor" if field.name == "optim" else other[kinds[0]]
        setattr(changed.training, field.name, value)
        assert arguments(changed) != before, field.name


@pytest.mark.parametrize(
    ("name", "flags"), [("bf16", (True, False)), ("fp16", (False, True)), ("bf16_pure", (False, False))]
)
def test_mixed_precision_switches_autocast_on_and_pure_does_not(name, flags):
    given = arguments(TrainConfig(), name)

    assert (given["bf16"], given["fp16"]) == flags


def test_an_unknown_optimizer_names_the_nearest():
    config = TrainConfig()
    config.training.optim = "adamw_tourch"

    with pytest.raises(ConfigError, match="adamw_torch"):
        arguments(config)


def test_deepspeed_settings_become_its_own_config():
    offload = DeepSpeedConfig(name="zero3_offload", stage=3, offload_optimizer="cpu", offload_param="cpu")

    given = deepspeed_dict(offload, TrainingConfig())

    assert given is not None
    assert given["optimizer"]["type"] == "AdamW"  # DeepSpeed's own, for state in host memory
    assert given["zero_optimization"]["stage"] == 3
    assert given["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert deepspeed_dict(DeepSpeedConfig(), TrainingConfig()) is None


def test_an_optimizer_that_deepspeed_lacks_on_the_host_is_allowed_there():
    offload = DeepSpeedConfig(name="zero2", stage=2, offload_optimizer="cpu")

    given = deepspeed_dict(offload, TrainingConfig(optim="adafactor"))

    assert given is not None
    assert given["zero_force_ds_cpu_optimizer"] is False
    assert "optimizer" not in given


@pytest.mark.filterwarnings("ignore")
def test_deepspeed_reaches_training_arguments_as_a_dict(tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed (make deepspeed)")
    from transformers import TrainingArguments

    config = TrainConfig(deepspeed=DeepSpeedConfig(name="zero2", stage=2, overlap_comm=False))
    resolve_batch(config.training, devices=1)

    given = TrainingArguments(**arguments(config))

    assert isinstance(given.deepspeed, dict)
    section = given.hf_deepspeed_config.config["zero_optimization"]
    assert (section["stage"], section["overlap_comm"]) == (2, False)


@pytest.mark.parametrize(
    ("settings", "examples", "steps"),
    [
        ({"num_train_epochs": 3.0}, 142, 27),
        ({"num_train_epochs": 0.5}, 160, 5),
        ({"max_steps": 7, "num_train_epochs": 100.0}, 142, 7),
        ({"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4}, 10, 3),
    ],
)
def test_the_number_of_steps_is_known_before_training(settings, examples, steps):
    training = TrainingConfig(**settings)
    resolve_batch(training, devices=1)

    assert total_steps(training, examples) == steps


@pytest.mark.parametrize(("examples", "steps"), [(16, 2), (17, 4), (21, 4), (3, 2)])
def test_steps_are_those_of_all_devices_together(examples, steps):
    training = TrainingConfig(num_train_epochs=2.0, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    resolve_batch(training, devices=2)

    assert total_steps(training, examples) == steps
