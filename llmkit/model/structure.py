"""The parts of a model that the methods choose from: its layers, its linear modules, its rows per token."""

from torch import nn
from transformers import PreTrainedModel

from llmkit.errors import ConfigError


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of decoder layers: the first ModuleList as long as the config says (experts are lists too).

    Raises ConfigError for a model without one.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ConfigError(
        f"{type(model).__name__} has no list of its {count} layers: choose by name, with freeze.patterns or "
        "lora.target_modules."
    )


def linear_names(model: nn.Module) -> list[str]:
    """The last words of the names of linear modules: q_proj, k_proj, ..."""
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})


def token_matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """The parameters with a row per token: the input embeddings and, where they are not the same, the head's."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = [] if head is None else [p for p in (head.weight, getattr(head, "bias", None)) if p is not None]
    return [embeddings.weight, *(parameter for parameter in own if parameter is not embeddings.weight)]


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head is the input embeddings."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def token_modules(model: PreTrainedModel) -> list[str]:
    """The names of the modules with a row per token: the input embeddings and, where it is not the same, the head."""
    head = None if is_tied(model) else model.get_output_embeddings()
    wanted = [module for module in (model.get_input_embeddings(), head) if module is not None]
    return [name for module in wanted for name, one in model.named_modules() if one is module]
