"""What several processes cannot do is refused before anything starts, with what to use instead."""

import pytest

from llmkit.config import warnings
from llmkit.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "said", "instead"),
    [
        (["method=qlora", "deepspeed=zero3"], "method=qlora with deepspeed=zero3", "deepspeed=zero2"),
        (["method=qlora", "distributed=fsdp2"], "method=qlora with distributed=fsdp2", "deepspeed=zero2"),
        (["distributed=fsdp2", "hardware=cpu"], "distributed=fsdp2 needs GPUs", "distributed=ddp"),
        (["distributed=fsdp2", "deepspeed=zero2"], "divide the same weights", "choose one"),
        (["method=qlora", "lora.use_dora=true", "deepspeed=zero2"], "lora.use_dora=true", "distributed=ddp"),
        (["precision=fp16", "distributed=fsdp2"], "no loss scaler", "precision=bf16"),
        (["precision=fp16", "hardware=cpu"], "precision=fp16", "fp32, bf16"),
        (["precision=bf16_pure", "deepspeed=zero2"], "precision=bf16_pure", "precision=bf16"),
        (["training.final=best", "deepspeed=zero3"], "training.final=best", "training.final=last"),
        (["deepspeed=zero2", "deepspeed.offload_param=cpu"], "offload_param=cpu", "deepspeed=zero3"),
        (["hardware.num_nodes=2"], "say which machine this is", "launcher=slurm"),
        (
            ["hardware.num_nodes=2", "hardware.node_rank=2", "hardware.rendezvous=a:29500"],
            "hardware.node_rank=2",
            "0 to 1",
        ),
        (["hardware.num_nodes=2", "hardware.node_rank=0", "hardware.rendezvous=a"], "rendezvous=a", "HOST:PORT"),
        (
            ["hardware.num_processes=4", "training.global_batch_size=6"],
            "global_batch_size",
            "4",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_does(compose, words, said, instead):
    with pytest.raises(ConfigError) as refused:
        compose("model=mistral7b", *words)

    assert said in str(refused.value)
    assert instead in str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        ["hardware.num_processes=2"],
        ["hardware.num_processes=2", "deepspeed=zero3"],
        ["hardware.num_processes=2", "method=qlora", "deepspeed=zero2"],
        ["hardware=h100", "hardware.num_processes=8", "distributed=fsdp2", "method=full"],
        ["hardware.num_nodes=2", "hardware.node_rank=1", "hardware.rendezvous=10.0.0.1:29500"],
    ],
)
def test_what_goes_together_is_taken(compose, words):
    config = compose("model=mistral7b", *words)

    processes = config.hardware.num_processes * config.hardware.num_nodes
    training = config.training
    assert training.global_batch_size == (
        training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
    )


def test_the_micro_batch_follows_from_the_global_batch_and_the_processes(compose):
    config = compose("model=mistral7b", "training.global_batch_size=64", "hardware.num_processes=8")

    assert config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps == 8


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["hardware.rendezvous=a:1"], "hardware.rendezvous"),
        (["hardware.node_rank=0"], "hardware.node_rank"),
        (["distributed=fsdp2"], "distributed=fsdp2"),
        (["distributed.cpu_offload=true"], "distributed.cpu_offload"),
    ],
)
def test_a_setting_without_effect_is_a_warning(compose, words, key):
    assert any(key in text and "no effect" in text for text in warnings(compose("model=mistral7b", *words)))
