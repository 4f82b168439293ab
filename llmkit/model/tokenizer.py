"""The tokenizer of a run: padding token, chat template and new tokens, the same in training, evaluation and serving."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from llmkit.config.init_from import adapter_directory
from llmkit.config.schema import ModelConfig, TrainConfig
from llmkit.data.template_date import todays_date
from llmkit.data.templates import read_template, split_defaults, with_defaults
from llmkit.errors import ConfigError
from llmkit.model.source import explained, hub_arguments, model_source
from llmkit.model.special_tokens import add_tokens, read_special_tokens

# The tokens that a shipped template writes around a turn.
TEMPLATE_TOKENS = {
    "chat-ml": ("<|im_start|>", "<|im_end|>"),
    "role-markers": ("<SYSTEM>", "</SYSTEM>", "<USER>", "</USER>", "<ASSISTANT>", "</ASSISTANT>"),
}


def load_tokenizer(
    config: ModelConfig, chat_template: str, *, special_tokens: Iterable[str] = (), directory: Path | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer with its padding token, new tokens and the chat template that training and serving share.

    Args:
        special_tokens: added where the vocabulary lacks them.
        directory: where the tokenizer lies, if not with the model: beside an adapter that is continued.
    """
    tokenizer = load_original_tokenizer(config, directory=directory)
    if not tokenizer.is_fast:  # only these say which characters a token stands for, and so which tokens are answers
        raise ConfigError(f"model={config.name}: {model_source(config)} has no fast tokenizer (tokenizer.json).")
    add_tokens(tokenizer, special_tokens)
    set_pad_token(tokenizer, config.pad_token)
    set_chat_template(tokenizer, chat_template)
    return tokenizer


def load_original_tokenizer(config: ModelConfig, *, directory: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer as it lies with the model, or in `directory`."""
    with explained(config):
        if directory is not None:
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=config.trust_remote_code)
        return AutoTokenizer.from_pretrained(model_source(config), **hub_arguments(config))


def load_run_tokenizer(config: TrainConfig, tokens_beside_rows: Iterable[str] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer a run trains with and saves, all its new tokens added.

    Its template takes `data.chat_template_kwargs` by itself, wherever it is rendered from now on. These are completed
    in place: with those that the template of a model saved by llmkit brings, and with today's date where it writes one.

    Args:
        tokens_beside_rows: those of a tokens.json found with the data.
    """
    data = config.data
    tokens = [*read_special_tokens(data.special_tokens), *tokens_beside_rows]
    template = data.chat_template or config.model.chat_template
    adapter = adapter_directory(config)
    beside = adapter if adapter and (adapter / "tokenizer_config.json").is_file() else None
    tokenizer = load_tokenizer(config.model, template, special_tokens=tokens, directory=beside)
    own: Any = tokenizer.chat_template
    templates = own if isinstance(own, dict) else {"": own}  # some models have several, by name
    _complete_values(config, list(templates.values()))
    completed = {name: with_defaults(one, data.chat_template_kwargs) for name, one in templates.items()}
    tokenizer.chat_template = completed if isinstance(own, dict) else completed[""]
    return tokenizer


def _complete_values(config: TrainConfig, templates: list[str]) -> None:
    """Add to `data.chat_template_kwargs` what the templates bring and the run does not set, in place."""
    data = config.data
    texts, saved = zip(*map(split_defaults, templates), strict=True)
    found: dict[str, Any] = {}
    for values in (*map(todays_date, texts), *saved):
        found |= values
    config.derived += [f"data.chat_template_kwargs.{name}" for name in found if name not in data.chat_template_kwargs]
    data.chat_template_kwargs = found | data.chat_template_kwargs


def may_add_tokens(config: TrainConfig, tokens_beside_rows: Iterable[str]) -> bool:
    """Whether the tokenizer of the run may have tokens that the model does not know.

    To be certain takes the model's own tokenizer, and a large one takes its time to load again.
    """
    template = config.data.chat_template or config.model.chat_template
    pads_with_its_own = config.model.pad_token in ("auto", "unk", "bos", "eos")
    added = config.data.special_tokens or list(tokens_beside_rows) or template in TEMPLATE_TOKENS
    return bool(added or config.init_from or not pads_with_its_own)


def set_pad_token(tokenizer: PreTrainedTokenizerBase, choice: str) -> None:
    """Give the tokenizer a padding token: `auto`, `unk`, `bos`, `eos`, a token of the vocabulary, or a new one.

    Padding is masked by its position, never by its token: an end-of-turn token that pads too is learnt where it ends an
    answer.

    Raises ConfigError for a token the tokenizer lacks, and for a new one that ordinary text could contain.
    """
    if choice == "auto":
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise ConfigError(
                "model.pad_token=auto: this tokenizer has no pad, unk or eos token; name one that it has, or a new "
                "one: model.pad_token='<|pad|>'."
            )
    elif choice in ("unk", "bos", "eos"):
        token = getattr(tokenizer, f"{choice}_token")
        if token is None:
            raise ConfigError(f"model.pad_token={choice}: this tokenizer has no {choice} token; use auto.")
        tokenizer.pad_token = token
    elif choice in tokenizer.get_vocab():
        tokenizer.pad_token = choice
    elif len(choice) > 2 and not (choice[0].isalnum() or choice[-1].isalnum()):
        add_tokens(tokenizer, [choice])
        tokenizer.pad_token = choice
    else:
        raise ConfigError(
            f"model.pad_token={choice}: not in the vocabulary; use auto, unk, bos, eos or an existing token. A new one "
            "is written with marks around it, '<|pad|>', so that no text contains it."
        )


def set_chat_template(tokenizer: PreTrainedTokenizerBase, choice: str) -> None:
    """Put the chosen template on the tokenizer, where saving takes it along, and add the tokens that it writes.

    Raises ConfigError if there is none.
    """
    if choice == "keep-original":
        if not tokenizer.chat_template:
            raise ConfigError(
                "This model has no chat template: choose one with data.chat_template=plain (ordinary text, for base "
                "models), data.chat_template=chat-ml (adds and trains two tokens) or a Jinja file."
            )
        return
    tokenizer.chat_template = read_template(choice)
    try:
        _compile_jinja_template(tokenizer.chat_template)
    except TemplateSyntaxError as error:
        raise ConfigError(f"data.chat_template={choice}, line {error.lineno}: not Jinja: {error.message}.") from error
    if choice == "plain" and tokenizer.eos_token is None:
        raise ConfigError("data.chat_template=plain: this tokenizer has no eos token to end answers with.")
    add_tokens(tokenizer, TEMPLATE_TOKENS.get(choice, ()))
