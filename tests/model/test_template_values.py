"""`data.chat_template_kwargs`: the template takes them by itself, in training and for whoever loads the model later."""

import importlib.util
from datetime import datetime
from pathlib import Path

import pytest

from llmkit.config import adopt_findings, differences, load, save
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


@pytest.fixture
def dated(tiny_model_dir):
    """A function: the config of a run on Llama 3.2's template, or another of TRL's, and its tokenizer."""
    folder = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"

    def make(name: str = "llama3_2", **values):
        config = TrainConfig(
            model=ModelConfig(name="custom", path=str(tiny_model_dir)),
            data=DataConfig(path="demo", chat_template=str(folder / f"{name}.jinja"), chat_template_kwargs=values),
        )
        return config, lambda: load_run_tokenizer(config)

    return make


def test_todays_date_is_kept_for_the_run_in_the_templates_own_way(dated):
    config, tokenizer = dated()
    before = datetime.now()
    text = tokenizer().apply_chat_template(CHAT, tokenize=False)

    date = config.data.chat_template_kwargs["date_string"]
    assert date in {day.strftime("%d %b %Y") for day in (before, datetime.now())}
    assert f"Today Date: {date}" in text
    assert config.derived == ["data.chat_template_kwargs.date_string"]


def test_who_goes_on_another_day_has_the_date_of_the_first(dated, tmp_path):
    earlier, tokenizer = dated(shout=True)
    tokenizer()
    earlier.data.chat_template_kwargs["date_string"] = "01 Jan 2020"
    save(earlier, tmp_path)
    command, tokenizer = dated(shout=True)
    assert differences(load(tmp_path), command) == []

    adopt_findings(command, load(tmp_path))

    assert "Today Date: 01 Jan 2020" in tokenizer().apply_chat_template(CHAT, tokenize=False)
    assert command.data.chat_template_kwargs == {"shout": True, "date_string": "01 Jan 2020"}
    assert command.derived == ["data.chat_template_kwargs.date_string"]


def test_a_repeated_run_has_the_date_of_the_first(dated, compose, tmp_path):
    earlier, tokenizer = dated()
    tokenizer()
    earlier.data.chat_template_kwargs["date_string"] = "01 Jan 2020"
    save(earlier, tmp_path)

    assert compose(tmp_path / "config.yaml").data.chat_template_kwargs == {"date_string": "01 Jan 2020"}


def test_a_given_date_stays(dated):
    config, tokenizer = dated(date_string="02 Feb 2002")

    assert "Today Date: 02 Feb 2002" in tokenizer().apply_chat_template(CHAT, tokenize=False)
    assert config.derived == []


def test_another_date_than_the_runs_is_another_config(dated, tmp_path):
    earlier, tokenizer = dated()
    tokenizer()
    (line,) = differences(earlier, dated(date_string="02 Feb 2002")[0])

    assert line.startswith("data.chat_template_kwargs: ")


@pytest.mark.parametrize("name", ["llama3_1", "gptoss", "qwen3"])
def test_templates_that_take_no_date_of_today_get_none(dated, name):
    config, tokenizer = dated(name)
    tokenizer()

    assert config.data.chat_template_kwargs == {}


def test_the_date_of_the_run_is_saved_with_its_model_and_kept_by_a_run_that_starts_from_it(dated, tmp_path):
    config, tokenizer = dated()
    config.data.chat_template_kwargs = {"date_string": "01 Jan 2020"}
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    again = TrainConfig(
        model=ModelConfig(name="custom", path=str(tmp_path)), data=DataConfig(chat_template="keep-original")
    )

    assert "Today Date: 01 Jan 2020" in load_run_tokenizer(again).apply_chat_template(CHAT, tokenize=False)
    assert again.data.chat_template_kwargs == {"date_string": "01 Jan 2020"}
