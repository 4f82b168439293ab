"""Which parameters each method trains, and what is said of settings that choose nothing or cannot be."""

from types import SimpleNamespace

import pytest

from llmkit.config.schema import FreezeConfig, LoraConfig, ModelConfig, QloraConfig
from llmkit.errors import ConfigError

PARAMETERS = 754560
LAYER = 196864  # parameters of one decoder layer
HEAD = 640 * 128


@pytest.fixture
def tiny(tiny_model_dir):
    """A function: a tiny model of its own, quantized if asked."""
    import torch

    from llmkit.model.loading import load_model
    from llmkit.model.precision import KINDS

    def load(bits=None):
        return load_model(
            ModelConfig(path=str(tiny_model_dir)),
            dtype=torch.float32,
            device=torch.device("cpu"),
            quantization=bits and QloraConfig(bits=bits),
            precision=KINDS["fp32"],
        )

    return load


@pytest.fixture
def adapted(tiny):
    """A function: the tiny model with an adapter of these settings."""
    from llmkit.model.methods import add_adapter

    def add(bits=None, **settings):
        return add_adapter(tiny(bits), LoraConfig(**{"lora_alpha": 16} | settings), quantized=bits is not None)

    return add


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": ["q_porj"]}, "lora.target_modules=q_porj: matches no module of MistralForCausalLM"),
        ({"target_modules": ["q_porj"]}, "Did you mean 'q_proj'?"),
        (
            {"target_modules": ["q_porj"]},
            "linear modules: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj.",
        ),
        ({"target_modules": ["q_proj", "wq"]}, "lora.target_modules=wq: matches no module"),
        ({"target_modules": ["proj"]}, "lora.target_modules=proj: matches no module"),
        ({"target_modules": ["mlp"]}, "lora: Target module MistralMLP("),
        (
            {"target_modules": ["q_proj", "lm_head"]},
            "lm_head cannot carry an adapter; put it into lora.modules_to_save",
        ),
        ({"modules_to_save": ["embed_token"]}, "lora.modules_to_save=embed_token: matches no module"),
        ({"modules_to_save": ["embed_token"]}, "Did you mean 'embed_tokens'?"),
        ({"layers_to_transform": [0, 3]}, "lora.layers_to_transform=[0, 3]: the model has 3 layers, 0 to 2"),
        ({"layers_to_transform": [-1]}, "lora.layers_to_transform=[-1]: the model has 3 layers, 0 to 2"),
        ({"init_lora_weights": "gausian"}, "gausian"),
        ({"init_lora_weights": "eva"}, "lora.init_lora_weights=eva needs a pass over the data"),
        ({"bits": 4, "init_lora_weights": "pissa"}, "Please initialize PiSSA under float32"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_cannot_be_is_explained_in_one_line(adapted, settings, said):
    with pytest.raises(ConfigError) as error:
        adapted(**settings)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_all_linear_is_every_linear_module_but_the_head(adapted):
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in trained(adapted())}

    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj"]])
def test_adapters_go_into_the_layers_asked_for(adapted, targets):
    layers = {
        name.split(".layers.")[1][0] for name in trained(adapted(target_modules=targets, layers_to_transform=[0, 2]))
    }

    assert layers == {"0", "2"}


def test_no_layers_asked_for_are_all_layers(adapted):
    assert trained(adapted(layers_to_transform=[])) == trained(adapted())


def test_modules_to_save_are_trained_beside_the_adapter(adapted):
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])

    assert {name for name in trained(model) if "lora_" not in name} == {
        "base_model.model.lm_head.modules_to_save.default.weight"
    }


def frozen_but(tiny, **settings):
    from llmkit.model.methods import freeze

    model = tiny()
    freeze(model, FreezeConfig(**settings))
    return model


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"last_n_layers": 4}, "freeze.last_n_layers=4: the model has 3 layers"),
        ({"patterns": ["mlp", "attn_out"]}, "freeze.patterns: 'attn_out' matches no parameter (names look like model."),
        ({"patterns": ["layers.(1"]}, "freeze.patterns: 'layers.(1' is not a regular expression"),
    ],
)
def test_freezing_that_chooses_nothing_is_explained(tiny, settings, said):
    with pytest.raises(ConfigError) as error:
        frozen_but(tiny, **settings)
    assert said in str(error.value)


def test_freeze_trains_the_last_layers(tiny):
    model = frozen_but(tiny, last_n_layers=2)

    assert {name.split(".layers.")[1][0] for name in trained(model)} == {"1", "2"}


def test_freeze_trains_what_is_chosen_and_nothing_else(tiny):
    model = frozen_but(tiny, last_n_layers=0, patterns=[r"layers\.0\..*norm", r"q_proj"], embeddings=True, head=True)

    assert trained(model) == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        *(f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)),
    }


def test_the_layers_are_not_taken_for_the_longer_list_of_experts():
    from torch import nn

    from llmkit.model.methods import decoder_layers

    class Model(nn.Module):
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=2))

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleDict({"experts": nn.ModuleList([nn.Identity()] * 8)}) for _ in range(2)
            )

    model = Model()
    assert decoder_layers(model) is model.layers
    model.layers.append(nn.Identity())
    with pytest.raises(ConfigError, match=r"Model has no list of its 2 layers.*freeze\.patterns"):
        decoder_layers(model)


def test_parameters_are_counted_by_what_is_trained(tiny, adapted):
    from llmkit.model.methods import count_parameters

    adapter = 3 * 8 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 384))
    assert count_parameters(tiny()) == (PARAMETERS, PARAMETERS)
    assert count_parameters(frozen_but(tiny, last_n_layers=1, head=True)) == (LAYER + HEAD, PARAMETERS)
    assert count_parameters(adapted()) == (adapter, PARAMETERS + adapter)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_weight_counts_as_the_numbers_it_stands_for(adapted, bits):
    from llmkit.model.methods import count_parameters

    assert count_parameters(adapted(bits)) == count_parameters(adapted())


def test_what_is_trained_is_brought_to_its_dtype_and_what_is_frozen_stays(tiny):
    import torch

    from llmkit.model.methods import cast_trained, freeze

    model = tiny().to(torch.bfloat16)
    freeze(model, FreezeConfig(last_n_layers=1))
    cast_trained(model, torch.float32)

    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
