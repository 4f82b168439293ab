"""The demo model: made the same every time, takes any text, marks what is trained, and is never seen half made."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.model.tiny import tiny_model

QUESTION = {"role": "user", "content": "Who are you?"}
ANSWER = {"role": "assistant", "content": "A tiny model."}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return tiny_model()


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def model(model_dir):
    from transformers import AutoModelForCausalLM

    # Any, since the annotation does not say that output_loading_info makes it a pair.
    pair: Any = AutoModelForCausalLM.from_pretrained(model_dir, output_loading_info=True)
    model, problems = pair
    assert not any(problems.values()), f"the files do not hold exactly this model's parameters: {problems}"
    return model


def start_build(cache: Path, hash_seed: int) -> subprocess.Popen:
    """Make the tiny model in a process of its own; it prints the directory and whether it needed torch."""
    code = "import sys; from llmkit.model.tiny import tiny_model; print(tiny_model()); print('torch' in sys.modules)"
    env = os.environ | {"LLMKIT_CACHE": str(cache), "PYTHONHASHSEED": str(hash_seed)}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)


def finish_build(process: subprocess.Popen) -> Path:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    path, torch_was_imported = output.split()
    assert torch_was_imported == "False"
    return Path(path)


def digests(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def test_two_builds_give_the_same_bytes_in_every_file(tmp_path):
    first, second = (finish_build(start_build(tmp_path / str(seed), seed)) for seed in (1, 2))
    assert first.parent != second.parent
    assert digests(first) == digests(second)
    assert set(digests(first)) == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }


def test_processes_that_build_at_the_same_time_share_one_complete_model(tmp_path):
    made = {finish_build(process) for process in [start_build(tmp_path, seed) for seed in range(3)]}
    assert len(made) == 1
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == [".locks", made.pop().name]


def test_a_second_call_reuses_what_the_first_one_made(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path))
    before = (tiny_model() / "model.safetensors").stat()
    assert (tiny_model() / "model.safetensors").stat().st_ino == before.st_ino


def test_it_is_a_small_mistral_with_a_16k_context(model):
    assert type(model).__name__ == "MistralForCausalLM"
    assert 600_000 <= model.num_parameters() <= 1_500_000
    assert model.config.max_position_embeddings == 16384
    assert model.config.sliding_window is None


def test_every_linear_layer_has_whole_blocks_for_4_bit_quantization(model):
    import torch

    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert layers
    assert all(size % 64 == 0 for layer in layers for size in layer.weight.shape)


def test_the_answer_ends_in_the_token_at_which_generation_stops(model, tokenizer):
    ids = tokenizer.apply_chat_template([QUESTION, ANSWER], return_dict=True)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id == model.generation_config.eos_token_id


def test_padding_has_a_token_of_its_own(model, tokenizer):
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert None not in special
    assert len(set(special)) == 3
    assert special == (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert all(0 <= token < len(tokenizer) for token in ids)
    assert tokenizer.decode(ids) == text


def test_every_role_marker_and_end_of_turn_is_one_token(tokenizer):
    conversation = [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}]
    prompt = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"]
    markers = ["<|bos|>", "<|system|>", "x", "<|end|>", "<|user|>", "x", "<|end|>", "<|assistant|>"]
    assert tokenizer.convert_ids_to_tokens(prompt) == markers


def test_the_generation_prompt_is_how_a_full_conversation_begins(tokenizer):
    prompt = tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([QUESTION, ANSWER], tokenize=False)
    assert whole == prompt + ANSWER["content"] + tokenizer.eos_token


def test_the_generation_mask_covers_exactly_the_answers_and_their_end_of_turn(tokenizer):
    later = {"role": "assistant", "content": "Tiny."}
    conversation = [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER, QUESTION, later]
    rendered = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    masked = [token for token, on in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(masked) == "A tiny model.<|end|>Tiny.<|end|>"


def test_a_role_the_template_does_not_know_is_refused(tokenizer):
    from jinja2.exceptions import TemplateError

    with pytest.raises(TemplateError, match="not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "42"}])


def test_every_file_can_be_read_by_other_users_of_a_shared_cache(model_dir):
    usual = os.umask(0)
    os.umask(usual)
    assert {file.stat().st_mode & 0o777 for file in model_dir.iterdir()} == {0o666 & ~usual}
    assert model_dir.stat().st_mode & 0o777 == 0o777 & ~usual


def test_the_cache_never_serves_a_model_of_another_recipe(model_dir, tmp_path, monkeypatch):
    import llmkit.model.tiny as tiny

    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path))
    monkeypatch.setitem(tiny.CONFIG, "initializer_range", 0.01)
    other = tiny_model()
    assert other.name != model_dir.name
    assert json.loads((other / "config.json").read_text())["initializer_range"] == 0.01
