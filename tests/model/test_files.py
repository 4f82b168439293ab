"""Of a model's files those are taken that loading it takes: weights once, in safetensors, and what is small."""

import pytest

from llmkit.errors import ConfigError
from llmkit.model.files import model_files

SMALL = ["chat_template.jinja", "config.json", "tokenizer.json", "tokenizer.model", "vocab.txt"]
PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize(
    "weights",
    [["model.safetensors"], PARTS, ["adapter_config.json", "adapter_model.safetensors"]],
    ids=["whole", "parts", "adapter"],
)
def test_a_model_without_anything_else_is_taken_whole(weights):
    assert model_files([*SMALL, *weights]) == sorted([*SMALL, *weights])


@pytest.mark.parametrize(
    "other",
    [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "training_args.bin",
        "tf_model.h5",
        "flax_model.msgpack",
        "rust_model.ot",
        "model.Q4_K_M.gguf",
        "model.fp16.safetensors",
        "model.safetensors.index.fp16.index.json",
        "consolidated.safetensors",
        "consolidated.00.pth",
        "original/consolidated.00.pth",
        "original/params.json",
        "onnx/model_quantized.onnx",
        "onnx/config.json",
        "onnx/model.onnx_data",
        "openvino/openvino_model.bin",
        "checkpoint-100/model.safetensors",
        ".gitattributes",
        ".cache/huggingface/config.json",
        "manifest.json",
    ],
)
def test_other_forms_of_the_weights_are_left_out(other):
    assert model_files([*SMALL, "model.safetensors", other]) == sorted([*SMALL, "model.safetensors"])


def test_where_weights_are_there_whole_and_in_parts_they_are_taken_whole():
    assert model_files(["config.json", "model.safetensors", *PARTS]) == ["config.json", "model.safetensors"]


def test_patterns_choose_among_what_would_be_taken():
    names = ["config.json", "model.safetensors", "README.md", "pytorch_model.bin"]

    assert model_files(names, allow=["*.json", "*.bin"]) == ["config.json"]
    assert model_files(names, ignore=["*.md"]) == ["config.json", "model.safetensors"]
    assert model_files(names, allow=["*.*"], ignore=["*.json", "*.md"]) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["config.json", "pytorch_model.bin"], "pytorch_model.bin but no .safetensors; pickled weights can run code"),
        (["config.json", "consolidated.00.pth"], "consolidated.00.pth but no .safetensors"),
        (["model.gguf"], r"no weights that Transformers loads \(\*.safetensors\), but model.gguf"),
        (["README.md"], r"no weights that Transformers loads \(\*.safetensors\)."),
        ([], "no weights"),
    ],
)
def test_without_safetensors_it_is_no_model(names, words):
    with pytest.raises(ConfigError, match=words):
        model_files(names)
