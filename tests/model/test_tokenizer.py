"""Padding token, chat template and new tokens of a run's tokenizer, or a message that says which key to change."""

import copy
import json

import pytest

from llmkit.config.schema import DataConfig, ModelConfig, TrainConfig
from llmkit.errors import ConfigError


@pytest.fixture
def tokenizer(tiny_tokenizer):
    """A copy of the tiny tokenizer that a test may change."""
    return copy.deepcopy(tiny_tokenizer)


@pytest.fixture
def load(tiny_model_dir):
    """A function: settings of `data` -> the tokenizer of a run on the tiny model."""
    from llmkit.model.tokenizer import load_run_tokenizer

    def make(*beside_rows, model=None, **data):
        config = TrainConfig(
            model=ModelConfig(name="tiny", path=str(tiny_model_dir), **(model or {})), data=DataConfig(**data)
        )
        return load_run_tokenizer(config, beside_rows)

    return make


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("auto", "<|pad|>"), ("bos", "<|bos|>"), ("eos", "<|end|>"), ("<|system|>", "<|system|>")],
)
def test_the_padding_token_is_the_one_chosen(tokenizer, choice, expected):
    from llmkit.model.tokenizer import set_pad_token

    size = len(tokenizer)
    set_pad_token(tokenizer, choice)
    assert tokenizer.pad_token == expected
    assert len(tokenizer) == size


@pytest.mark.parametrize("choice", ["[PAD]", "<|padding|>"])
def test_a_padding_token_that_is_new_is_added(tokenizer, choice):
    from llmkit.model.tokenizer import set_pad_token

    set_pad_token(tokenizer, choice)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (choice, 640)
    assert tokenizer(f"a{choice}b", add_special_tokens=False)["input_ids"][1] == 640


def test_a_tokenizer_without_a_padding_token_gets_unk_or_else_eos(tokenizer):
    from llmkit.model.tokenizer import set_pad_token

    tokenizer.pad_token = None
    set_pad_token(tokenizer, "auto")
    assert tokenizer.pad_token == "<|end|>"
    tokenizer.pad_token, tokenizer.unk_token = None, "<|system|>"
    set_pad_token(tokenizer, "auto")
    assert tokenizer.pad_token == "<|system|>"


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("unk", "this tokenizer has no unk token; use auto"),
        ("eso", "not in the vocabulary; use auto, unk, bos, eos or an existing token. A new one is written with marks"),
        ("<>", "not in the vocabulary"),
    ],
)
def test_a_padding_token_that_cannot_be_is_refused(tokenizer, choice, said):
    from llmkit.model.tokenizer import set_pad_token

    with pytest.raises(ConfigError) as error:
        set_pad_token(tokenizer, choice)
    assert str(error.value).startswith(f"model.pad_token={choice}: {said}")


def test_a_tokenizer_with_nothing_to_pad_with_says_so(tokenizer):
    from llmkit.model.tokenizer import set_pad_token

    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has no pad, unk or eos token"):
        set_pad_token(tokenizer, "auto")


def test_the_models_own_chat_template_is_kept(tokenizer):
    from llmkit.model.tokenizer import set_chat_template

    own = tokenizer.chat_template
    set_chat_template(tokenizer, "keep-original")
    assert tokenizer.chat_template == own


def test_a_model_without_a_chat_template_is_told_of_some(tokenizer):
    from llmkit.model.tokenizer import set_chat_template

    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"no chat template.*data\.chat_template=plain.*chat-ml"):
        set_chat_template(tokenizer, "keep-original")
    set_chat_template(tokenizer, "plain")
    assert "### User" in tokenizer.chat_template


def test_the_plain_template_needs_a_token_to_end_with(tokenizer):
    from llmkit.model.tokenizer import set_chat_template

    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"data\.chat_template=plain: .*no eos token"):
        set_chat_template(tokenizer, "plain")


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("chat-ml", ["<|im_start|>", "<|im_end|>"]),
        ("role-markers", ["<SYSTEM>", "</SYSTEM>", "<USER>", "</USER>", "<ASSISTANT>", "</ASSISTANT>"]),
    ],
)
def test_a_template_adds_the_tokens_that_it_writes_once(tokenizer, template, written):
    from llmkit.model.tokenizer import set_chat_template

    set_chat_template(tokenizer, template)
    assert tokenizer.convert_tokens_to_ids(written) == list(range(640, 640 + len(written)))
    set_chat_template(tokenizer, template)
    assert len(tokenizer) == 640 + len(written)


def test_a_template_file_is_used_as_it_is(load, tmp_path):
    (tmp_path / "own.jinja").write_text("{% for m in messages %}<Q>{{ m.content }}{% endfor %}", encoding="utf-8")

    tokenizer = load(chat_template=str(tmp_path / "own.jinja"), special_tokens=["<Q>"])
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<Q>Hi"
    assert tokenizer("<Q>", add_special_tokens=False)["input_ids"] == [640]


def test_tokens_of_the_config_and_beside_the_rows_are_added_and_known_ones_are_not(load, tmp_path):
    (tmp_path / "tokens.json").write_text(json.dumps({"tokens": ["<A>", "<|end|>", "<B>"]}))

    tokenizer = load("<B>", "<C>", special_tokens=str(tmp_path / "tokens.json"))
    assert {token: number for token, number in tokenizer.get_vocab().items() if number >= 640} == {
        "<A>": 640,
        "<B>": 641,
        "<C>": 642,
    }


def test_new_tokens_are_special_and_survive_saving(load, tmp_path):
    from transformers import AutoTokenizer

    load(special_tokens=["<A>", "two words"]).save_pretrained(tmp_path)

    loaded = AutoTokenizer.from_pretrained(tmp_path)
    ids = loaded("x<A>two wordsy", add_special_tokens=False)["input_ids"]
    assert ids[1:3] == [640, 641]
    assert loaded.decode(ids, skip_special_tokens=True) == "xy"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ('{"token": ["<A>"]}', r'expected a list of tokens, or {"tokens": [...]}, found \'None\''),
        ('"<A>"', "expected a list of tokens"),
        ('["<A>", 3]', "a token is a text that is not blank, found 3"),
        ('["<A>", " "]', "a token is a text that is not blank, found ' '"),
    ],
)
def test_a_broken_token_file_is_explained(tmp_path, content, said):
    from llmkit.model.special_tokens import read_special_tokens

    (tmp_path / "tokens.json").write_text(content)
    with pytest.raises(ConfigError) as error:
        read_special_tokens(str(tmp_path / "tokens.json"))
    assert f"data.special_tokens={tmp_path}/tokens.json: " in str(error.value)
    assert said.replace("\\'", "'") in str(error.value)


def test_a_token_in_the_place_of_a_file_is_explained():
    from llmkit.model.special_tokens import read_special_tokens

    with pytest.raises(ConfigError, match=r"data\.special_tokens=<A>: no such file; write a list"):
        read_special_tokens("<A>")


def test_values_that_a_template_was_saved_with_join_the_config_and_its_own_win(tiny_model_dir, tmp_path):
    import shutil

    from llmkit.data.templates import with_defaults
    from llmkit.model.tokenizer import load_run_tokenizer

    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    own = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(with_defaults(own, {"tone": "dry", "length": 3}))
    config = TrainConfig(model=ModelConfig(path=str(model)), data=DataConfig(chat_template_kwargs={"length": 5}))

    assert load_run_tokenizer(config).chat_template == with_defaults(own, {"tone": "dry", "length": 5})
    assert config.data.chat_template_kwargs == {"tone": "dry", "length": 5}


def test_a_name_that_no_template_can_take_is_refused_before_training(load):
    with pytest.raises(ConfigError, match=r"data\.chat_template_kwargs\.messages: not a variable"):
        load(chat_template_kwargs={"messages": []})


@pytest.mark.parametrize(
    ("beside", "model", "data"),
    [
        ([], {}, {}),
        ([], {"pad_token": "eos"}, {}),
        ([], {}, {"chat_template": "plain"}),
        (["<MOOD>"], {}, {}),
        ([], {}, {"special_tokens": ["<MOOD>"]}),
        ([], {}, {"chat_template": "chat-ml"}),
        ([], {"pad_token": "<|fill|>"}, {}),
    ],
    ids=str,
)
def test_a_run_without_new_tokens_need_not_ask_the_models_own_tokenizer(tiny_model_dir, beside, model, data):
    from llmkit.config.schema import DataConfig, TrainConfig
    from llmkit.model.special_tokens import new_tokens
    from llmkit.model.tokenizer import load_original_tokenizer, load_run_tokenizer, may_add_tokens

    config = TrainConfig(
        model=ModelConfig(name="mine", path=str(tiny_model_dir), **model), data=DataConfig(path="demo", **data)
    )
    new = new_tokens(load_run_tokenizer(config, beside), load_original_tokenizer(config.model))

    assert may_add_tokens(config, beside) == bool(new)
