"""`data.chat_template_kwargs`: the template takes them by itself, in training and for whoever loads the model later."""

from pathlib import Path

import pytest

from llmkit.config.schema import DataConfig, ModelConfig, TrainConfig
from llmkit.model.tokenizer import load_run_tokenizer

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
OWN = "{{ bos_token }}{% if shout %}{{ messages[0].content | upper }}{% else %}{{ messages[0].content }}{% endif %}"


@pytest.fixture
def tokenizer_of(tiny_model_dir, tmp_path):
    """A function: the tokenizer of a run with these values, from the tiny model or from a directory."""
    (tmp_path / "own.jinja").write_text(OWN)

    def load(directory: Path = tiny_model_dir, *, template: str = str(tmp_path / "own.jinja"), **values):
        config = TrainConfig(
            model=ModelConfig(name="custom", path=str(directory)),
            data=DataConfig(path="demo", chat_template=template, chat_template_kwargs=values),
        )
        return load_run_tokenizer(config)

    return load


def test_the_template_renders_with_the_values_of_the_run_without_being_told(tokenizer_of, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tokenizer_of(shout=True)
    tokenizer.save_pretrained(tmp_path / "final")
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "final")):
        assert one.apply_chat_template(CHAT, tokenize=False) == "<|bos|>HI"
        assert one.apply_chat_template(CHAT, tokenize=False, shout=False) == "<|bos|>Hi"


def test_a_template_without_values_is_saved_to_the_letter(tokenizer_of, tmp_path):
    tokenizer_of().save_pretrained(tmp_path / "final")
    assert (tmp_path / "final" / "chat_template.jinja").read_text() == OWN


def test_a_run_that_starts_from_another_has_its_values_once(tokenizer_of, tmp_path):
    for before, after in (("", "one"), ("one", "two")):
        tokenizer = tokenizer_of(tmp_path / "one", template="keep-original") if before else tokenizer_of(shout=True)
        tokenizer.save_pretrained(tmp_path / after)
        (tmp_path / after / "config.json").write_text('{"model_type": "mistral"}')
    one, two = ((tmp_path / name / "chat_template.jinja").read_text() for name in ("one", "two"))
    assert one == two


def test_a_run_that_starts_from_another_may_change_its_values(tokenizer_of, tmp_path):
    tokenizer_of(shout=True).save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "config.json").write_text('{"model_type": "mistral"}')
    changed = tokenizer_of(tmp_path / "one", template="keep-original", shout=False)
    assert changed.apply_chat_template(CHAT, tokenize=False) == "<|bos|>Hi"


def test_the_values_reach_the_tokens_that_are_trained_on(tokenizer_of, chats_file):
    from llmkit.data.prepare import prepare_data

    template = chats_file("").with_suffix(".jinja")
    template.write_text(
        "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}"
        "{{ m.content | upper if shout else m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    data = DataConfig(path=str(chats_file({"question": "why", "answer": "SO"})), validation=None)
    decoded = []
    for values in ({}, {"shout": True}):
        tokenizer = tokenizer_of(template=str(template), **values)
        row = prepare_data(data, tokenizer, max_length=64).train.dataset[0]
        decoded.append(tokenizer.decode(row["input_ids"]))
    assert decoded == ["<|user|>why<|end|><|assistant|>SO<|end|>", "<|user|>WHY<|end|><|assistant|>SO<|end|>"]
