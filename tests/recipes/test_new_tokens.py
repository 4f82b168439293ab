"""New tokens, template values and `init_from` through whole runs."""

import json

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's deprecations inside real training runs


@pytest.fixture(scope="module")
def taught(train):
    """An adapter with chat-ml's two tokens."""
    from llmkit import rundir

    run = train("data.chat_template=chat-ml", "data.limit=40", "training.max_steps=8")
    rundir.write_result(run.run_dir, **run.result)
    return run


def test_a_run_with_new_tokens_leaves_an_adapter_that_loads(taught):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model, tokenizer = (
        AutoPeftModelForCausalLM.from_pretrained(taught.final),
        AutoTokenizer.from_pretrained(taught.final),
    )
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 642
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in json.loads((taught.final / "generation_config.json").read_text())["eos_token_id"]


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_an_adapter_is_continued_by_either_recipe(train, taught, recipe):
    run = train(f"recipe={recipe}", f"init_from={taught.run_dir}", "data.limit=40", "training.learning_rate=1e-3")

    adapters = [json.loads((one.final / "adapter_config.json").read_text()) for one in (taught, run)]
    same = ("base_model_name_or_path", "r", "lora_alpha", "trainable_token_indices")
    assert [adapters[0][key] for key in same] == [adapters[1][key] for key in same]
    before, after = (load_file(one.final / "adapter_model.safetensors") for one in (taught, run))
    assert before.keys() == after.keys()  # one adapter: not two, and no reference of DPO's
    assert all(not torch.equal(before[name], after[name]) for name in before)
    if recipe == "dpo":
        first = next(record for record in run.metrics() if "loss" in record)
        assert first["loss"] == pytest.approx(0.6931, abs=1e-4)  # the reference is the policy as it starts


def test_the_values_of_a_template_are_the_same_for_those_who_load_it(train, tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "own.jinja").write_text(
        "{{ bos_token }}{% if terse %}Be terse.{% endif %}{% for m in messages %}<|{{ m.role }}|>"
        "{{ m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    run = train(f"data.chat_template={tmp_path}/own.jinja", "data.chat_template_kwargs.terse=true", "data.limit=40")

    tokenizer = AutoTokenizer.from_pretrained(run.final)
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False).startswith("<|bos|>Be terse.<|user|>")
    assert tokenizer.apply_chat_template(chat, tokenize=False, terse=False).startswith("<|bos|><|user|>")
