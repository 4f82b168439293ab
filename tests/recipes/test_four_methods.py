"""What each method promises: which parameters move, and that what it leaves loads with the plain libraries."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's deprecations inside real training runs


@pytest.fixture(scope="session")
def base_weights():
    from llmkit.model.tiny import tiny_model

    return load_file(tiny_model() / "model.safetensors")


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def next_token_logits(model, text="<|bos|><|user|>Who are you?<|end|><|assistant|>"):
    from transformers import AutoTokenizer

    from llmkit.model.tiny import tiny_model

    ids = AutoTokenizer.from_pretrained(tiny_model())(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits[0, -1]


def test_full_moves_every_parameter_and_loads_with_plain_transformers(train, base_weights):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = train("method=full")

    final = AutoModelForCausalLM.from_pretrained(run.final).state_dict()
    assert changed(base_weights, final) == set(base_weights)
    assert AutoTokenizer.from_pretrained(run.final).chat_template


def test_freeze_moves_the_last_layers_and_nothing_else(train, base_weights):
    run = train("method=freeze", "freeze.last_n_layers=1")

    after = load_file(run.final / "model.safetensors")
    assert changed(base_weights, after) == {name for name in base_weights if name.startswith("model.layers.2.")}


def test_freeze_by_pattern_embeddings_and_head(train, base_weights):
    run = train(
        "method=freeze",
        "freeze.last_n_layers=0",
        r"freeze.patterns=['layers\.0\.mlp']",
        "freeze.head=true",
        "freeze.embeddings=true",
    )

    after = load_file(run.final / "model.safetensors")
    expected = {n for n in base_weights if re.search(r"layers\.0\.mlp|embed_tokens|lm_head", n)}
    assert changed(base_weights, after) == expected


def test_lora_leaves_the_base_alone_and_its_adapter_loads_with_plain_peft(train, base_weights):
    import peft
    from transformers import AutoModelForCausalLM

    from llmkit.model.tiny import tiny_model

    run = train("method=lora", "lora.r=4")

    adapter = json.loads((run.final / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (4, 8)
    assert adapter["base_model_name_or_path"] == str(tiny_model()) == run.result["base_model"]
    assert not changed(base_weights, load_file(tiny_model() / "model.safetensors"))
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model()), run.final)
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(run.final)
    assert torch.equal(next_token_logits(plain), next_token_logits(auto))
    bare = AutoModelForCausalLM.from_pretrained(tiny_model())
    assert not torch.allclose(next_token_logits(plain), next_token_logits(bare), atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_trains_a_float32_adapter_on_a_quantized_base(train, bits):
    import peft

    run = train("method=qlora", f"qlora.bits={bits}")

    weights = load_file(run.final / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all("lora_" in name for name in weights)
    moved = [name for name, tensor in weights.items() if "lora_B" in name and tensor.abs().max() > 0]
    assert len(moved) == len(weights) // 2  # B starts at zero: every adapter has learnt something
    peft.AutoPeftModelForCausalLM.from_pretrained(run.final)
    assert json.loads((run.final / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_a_4_bit_base_gives_the_same_gradients_after_an_evaluation_as_before(compose):
    """bitsandbytes repacks 4-bit weights at the first forward in evaluation mode on some CPUs."""
    from llmkit.model.loading import load_model
    from llmkit.model.methods import apply_method
    from llmkit.model.precision import KINDS

    config, precision = compose("method=qlora"), KINDS["fp32"]
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    model = load_model(config.model, dtype=torch.float32, device=cpu, quantization=config.qlora, precision=precision)
    model = apply_method(model, config, precision)
    ids = torch.randint(6, 600, (2, 16))

    def gradient():
        model.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    before = gradient()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    torch.testing.assert_close(gradient(), before)


def test_modules_to_save_are_trained_in_full_and_travel_with_the_adapter(train, base_weights):
    run = train("lora.modules_to_save=[lm_head]", "lora.target_modules=[q_proj]")

    saved = load_file(run.final / "adapter_model.safetensors")
    (head,) = [tensor for name, tensor in saved.items() if "lm_head" in name]
    assert not torch.equal(head, base_weights["lm_head.weight"])
    assert {name.split(".")[-3] for name in saved if "lora_" in name} == {"q_proj"}


def test_lora_options_reach_peft(train):
    run = train(
        "lora.use_rslora=true",
        "lora.use_dora=true",
        "lora.layers_to_transform=[1]",
        "lora.lora_dropout=0.1",
        "lora.init_lora_weights=gaussian",
        "lora.lora_alpha=5",
        "lora.bias=lora_only",
    )

    adapter = json.loads((run.final / "adapter_config.json").read_text())
    expected = {
        "use_rslora": True,
        "use_dora": True,
        "layers_to_transform": [1],
        "lora_dropout": 0.1,
        "init_lora_weights": "gaussian",
        "lora_alpha": 5,
        "bias": "lora_only",
    }
    assert {key: adapter[key] for key in expected} == expected
    assert {n.split("layers.")[1][0] for n in load_file(run.final / "adapter_model.safetensors")} == {"1"}
