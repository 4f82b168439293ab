"""What a template would do unseen: another prompt at serving than in training, values that change nothing."""

import copy

import pytest

from llmkit.config.schema import DataConfig
from llmkit.data.template_check import template_warnings

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"


@pytest.fixture
def warned(tiny_tokenizer):
    """A function: the warnings for a template and its values."""

    def of(template=None, **values):
        tokenizer = copy.copy(tiny_tokenizer)
        tokenizer.chat_template = template or tokenizer.chat_template
        return template_warnings(tokenizer, DataConfig(path="demo", chat_template_kwargs=values))

    return of


def test_a_prompt_that_training_never_shows_is_told_with_both_texts(warned):
    (warning,) = warned(TURNS + "{% if add_generation_prompt %}<|assistant|>ANSWER: {% endif %}")

    assert "<|assistant|>ANSWER: " in warning
    assert "what is served is not what was learnt" in warning


def test_a_prompt_that_training_shows_is_fine(warned):
    assert warned() == []
    assert warned(TURNS + "{% if add_generation_prompt %}<|assistant|>{% endif %}") == []


def test_a_value_that_the_template_does_not_use_is_told_with_the_nearest(warned):
    template = "{{ tone }}" + TURNS + "{% if add_generation_prompt %}<|assistant|>{% endif %}"

    assert warned(template, tone="dry") == []
    (warning,) = warned(template, tones="dry")
    assert warning.startswith("data.chat_template_kwargs.tones has no effect")
    assert "'tone'" in warning


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma3", "qwen2_5", "phi3"])
def test_templates_in_use_ask_as_they_teach(warned, name):
    import importlib.util
    from pathlib import Path

    folder = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
    assert warned((folder / f"{name}.jinja").read_text(encoding="utf-8")) == []


def test_a_date_of_today_that_no_variable_sets_is_warned_of(warned):
    template = TURNS + "{{ strftime_now('%Y') }}{% if add_generation_prompt %}<|assistant|>{% endif %}"

    assert any("writes today's date into every row" in warning for warning in warned(template))


def test_a_date_that_is_set_is_fine(warned):
    template = (
        "{{ date_string if date_string is defined else strftime_now('%Y') }}"
        + TURNS
        + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )

    assert warned(template, date_string="2020") == []
