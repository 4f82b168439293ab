"""Config and weights: the right ones, or a message that says which key to change."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from llmkit.config.schema import ModelConfig, QloraConfig
from llmkit.errors import ConfigError


def load(directory, quantization=None, **settings) -> Any:
    import torch

    from llmkit.model.loading import load_model
    from llmkit.model.precision import KINDS

    return load_model(
        ModelConfig(name="mine", path=str(directory), **settings),
        dtype=torch.float32,
        device=torch.device("cpu"),
        quantization=quantization,
        precision=KINDS["fp32"],
    )


@pytest.fixture
def model_copy(tiny_model_dir, tmp_path) -> Path:
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def test_a_directory_without_a_tokenizer_is_named(model_copy):
    from llmkit.model.loading import load_tokenizer

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model_copy / name).unlink()
    with pytest.raises(ConfigError, match=rf"{model_copy} cannot be loaded"):
        load_tokenizer(ModelConfig(path=str(model_copy)), "keep-original")


def test_a_directory_without_weights_is_named(model_copy):
    (model_copy / "model.safetensors").unlink()

    with pytest.raises(ConfigError, match=rf"model\.path={model_copy}: no weights there"):
        load(model_copy)


def test_pickled_weights_are_refused(model_copy):
    (model_copy / "model.safetensors").rename(model_copy / "pytorch_model.bin")

    with pytest.raises(ConfigError, match=r"has pytorch_model\.bin but no \.safetensors; pickled weights can run code"):
        load(model_copy)


def test_weights_that_are_missing_would_start_random_and_are_refused(model_copy):
    weights = load_file(model_copy / "model.safetensors")
    del weights["model.norm.weight"], weights["lm_head.weight"]
    save_file(weights, model_copy / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ConfigError, match=r"2 weights are missing from its files \(first: lm_head\.weight\)"):
        load(model_copy)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"], ids=["empty", "git-lfs"])
def test_a_broken_weights_file_is_named(model_copy, content):
    (model_copy / "model.safetensors").write_bytes(content)

    with pytest.raises(ConfigError, match=rf"model=mine: {model_copy} cannot be loaded: "):
        load(model_copy)


def test_a_config_that_is_not_json_is_named(model_copy):
    from llmkit.model.loading import load_model_config

    (model_copy / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*config\.json.*not a valid JSON"):
        load_model_config(ModelConfig(path=str(model_copy)))


def test_code_that_comes_with_a_model_is_not_run_unless_asked_for(model_copy):
    from llmkit.model.loading import load_model_config

    config = json.loads((model_copy / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.MyConfig"}}
    (model_copy / "config.json").write_text(json.dumps(config))
    (model_copy / "code.py").write_text("raise SystemExit('it ran')")

    with pytest.raises(ConfigError, match=r"Python code of its own; model\.trust_remote_code=true"):
        load_model_config(ModelConfig(path=str(model_copy)))


def test_an_attention_kernel_that_is_not_installed_is_named(tiny_model_dir):
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*[Ff]lash"):
        load(tiny_model_dir, attn_implementation="flash_attention_2")


def test_attention_is_the_one_asked_for(tiny_model_dir):
    assert load(tiny_model_dir, attn_implementation="eager").config._attn_implementation == "eager"


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_take_the_bits_asked_for_and_the_head_stays_whole(tiny_model_dir, bits):
    import torch

    model = load(tiny_model_dir, QloraConfig(bits=bits))
    projection = model.model.layers[0].self_attn.q_proj
    assert type(projection).__name__ == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    assert projection.weight.numel() * projection.weight.element_size() == 128 * 128 * bits // 8
    assert type(model.lm_head) is torch.nn.Linear


def test_only_hub_models_have_a_commit(tiny_model_dir):
    from llmkit.model.loading import cached_commit

    assert cached_commit(ModelConfig(path=str(tiny_model_dir), hub_id="org/tiny")) is None
    assert cached_commit(ModelConfig(name="tiny")) is None
