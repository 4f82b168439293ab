"""The decoder that packed runs share: each run's rows go through its own adapter, as in its own model."""

import peft
import pytest
import torch
import transformers

from llmkit.training.pack.process_state import ProcessState
from llmkit.training.pack.shared_base import sharing_weights
from llmkit.training.pack.trunk import JointTrunk, NotOfRows, replaced_layers

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = transformers.LlamaConfig(intermediate_size=24, **SIZES)
# The products of its attention have a bias.
QWEN = transformers.Qwen2Config(intermediate_size=24, num_key_value_heads=2, **SIZES)
# Its feed-forward layers are given all tokens of a batch in one dimension.
OPT = transformers.OPTConfig(
    ffn_dim=24, dropout=0.0, attention_dropout=0.0, word_embed_proj_dim=16, pad_token_id=0, **SIZES
)
GPT2 = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **SIZES)
LENGTHS = (5, 9, 9)


class Run:
    """One of the runs: its adapter, its batch and its random numbers."""

    def __init__(self, base, number, **adapter):
        torch.manual_seed(number)
        config = peft.LoraConfig(**{"init_lora_weights": False, "lora_dropout": 0.3, "r": 2 * number + 2} | adapter)
        self.model = peft.get_peft_model(sharing_weights(base), config)
        self.trunk = self.model.get_base_model().base_model.train()
        self.layers = replaced_layers(self.trunk)
        self.state = ProcessState()
        self.before = self.state.random()
        ids = torch.randint(50, (2, LENGTHS[number]))
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        self.weights = torch.randn(2, LENGTHS[number], 16, dtype=torch.float64)

    def gradients(self, hidden, backward):
        """Those of a loss on the hidden states."""
        loss = (hidden * self.weights).sum()
        loss.backward()
        backward()
        found = [one.grad for one in self.model.parameters() if one.requires_grad]
        self.model.zero_grad()
        return found


def test_rows_of_a_run_without_an_adapter_on_a_layer_are_those_of_the_base():
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(LLAMA).double()
    everywhere, one_layer = (
        Run(base, number, target_modules=target, lora_dropout=0.0)
        for number, target in enumerate(["all-linear", ["v_proj"]])
    )
    alone = one_layer.trunk(**one_layer.batch).last_hidden_state
    gradients = one_layer.gradients(alone, lambda: None)

    step = JointTrunk(sharing_weights(base)).forward([everywhere, one_layer], [everywhere.batch, one_layer.batch])
    together = one_layer.gradients(step.hidden[1], step.backward)

    torch.testing.assert_close(step.hidden[1].detach(), alone.detach())
    torch.testing.assert_close(together, gradients)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    ("config", "adapter"),
    [
        (LLAMA, {"target_modules": "all-linear"}),
        (LLAMA, {"target_modules": "all-linear", "lora_dropout": 0.0}),
        (QWEN, {"target_modules": "all-linear", "lora_dropout": 0.0}),
        (LLAMA, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
        (LLAMA, {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]}),
        (OPT, {"target_modules": "all-linear", "lora_dropout": 0.0}),
        (OPT, {"target_modules": ["fc1"], "use_dora": True, "lora_dropout": 0.0}),
        (GPT2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
    ids=[
        "llama",
        "llama, no dropout",
        "qwen, no dropout",
        "llama, dora",
        "llama, embedding",
        "opt",
        "opt, dora",
        "gpt2",
    ],
)
def test_rows_of_each_run_are_as_in_its_own_model_with_its_own_dropout(config, adapter, checkpointing):
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config).double()  # rounding is not what is tested
    runs = [Run(base, number, **adapter) for number in range(len(LENGTHS))]
    own = []
    for run in runs:
        run.state.take_random()
        hidden = run.trunk(**run.batch).last_hidden_state
        own.append((hidden.detach(), run.gradients(hidden, lambda: None)))
        run.state.set_random(run.before)

    step = JointTrunk(sharing_weights(base), checkpointing=checkpointing).forward(runs, [run.batch for run in runs])
    for run, part in zip(runs, step.hidden, strict=True):
        (part * run.weights).sum().backward()
    step.backward()

    for run, part, (hidden, gradients) in zip(runs, step.hidden, own, strict=True):
        torch.testing.assert_close(part.detach(), hidden)
        trained = [one for one in run.model.parameters() if one.requires_grad]
        assert trained
        for one, gradient in zip(trained, gradients, strict=True):
            torch.testing.assert_close(one.grad, gradient)


def test_a_layer_that_sees_neither_rows_nor_all_tokens_is_noticed():
    """As an expert does, which is given the tokens that are routed to it."""
    base = transformers.AutoModelForCausalLM.from_config(LLAMA)
    base.model.layers[0].mlp.register_forward_pre_hook(lambda _, given: (given[0][:, ::2],))
    runs = [Run(base, number, target_modules="all-linear") for number in range(2)]

    with pytest.raises(NotOfRows, match=r"mlp\.(gate|up)_proj"):
        JointTrunk(sharing_weights(base)).forward(runs, [run.batch for run in runs])


@pytest.mark.parametrize(
    ("config", "settings", "reason"),
    [
        (LLAMA, {}, None),
        (LLAMA, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "positions (dynamic)"),
        (LLAMA, {"output_router_logits": True}, "router"),
        (LLAMA, {"attention_dropout": 0.1}, "random numbers of its own"),
        (GPT2, {}, None),
        (GPT2, {"attn_pdrop": 0.1}, "random numbers of its own"),
        (OPT, {}, "random numbers of its own"),  # whether to skip a layer, even if it never does
    ],
)
def test_what_makes_a_decoder_unfit_for_several_runs_at_once_is_named(config, settings, reason):
    config = type(config)(**config.to_dict() | settings)
    trunk = JointTrunk(transformers.AutoModelForCausalLM.from_config(config))
    before = torch.get_rng_state()

    found = trunk.why_apart()

    assert found is None if reason is None else reason in found
    assert before.equal(torch.get_rng_state())
