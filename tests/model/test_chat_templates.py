"""What the shipped templates write beyond plain turns, and the values a saved template takes by default."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError, meta

from llmkit.data.templates import read_template, shipped_templates, split_defaults, with_defaults
from llmkit.errors import ConfigError

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "title": "é <>"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}


@pytest.fixture
def write(tiny_tokenizer):
    """A function: template, messages, keywords -> the text."""

    def render(name, *messages, **keywords):
        return tiny_tokenizer.apply_chat_template(
            list(messages), chat_template=read_template(name), tokenize=False, **keywords
        )

    return render


def turn(role, content, **more):
    return {"role": role, "content": content} | more


def test_role_markers_write_turns_as_their_rows_have_them(write):
    chat = [turn("system", "Be brief."), turn("user", " 1+1?\n"), turn("assistant", "2")]

    assert (
        write("role-markers", *chat) == "<|bos|><SYSTEM>Be brief.</SYSTEM><USER> 1+1?\n</USER><ASSISTANT>2</ASSISTANT>"
    )
    assert write("role-markers", *chat[:2], add_generation_prompt=True).endswith("</USER><ASSISTANT>")


def test_chat_ml_writes_calls_and_results(write):
    text = write(
        "chat-ml",
        turn("user", "1+1?"),
        turn("assistant", "Let me see.", tool_calls=[CALL, {"function": {"name": "now"}}]),
        turn("tool", "2", tool_call_id="1"),
        turn("assistant", "2"),
    )

    assert text == (
        "<|bos|><|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\nLet me see.\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n"
    )


@pytest.mark.parametrize("content", [None, ""])
def test_chat_ml_writes_calls_without_words_and_reasoning(write, content):
    text = write("chat-ml", turn("assistant", content, reasoning_content="Hm.", tool_calls=[CALL]))

    assert text.startswith("<|bos|><|im_start|>assistant\n<think>\nHm.\n</think>\n\n<tool_call>\n")


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_chat_ml_lists_tools_once_in_the_first_system_turn(write, system):
    first = [turn("system", system)] if system else []
    text = write("chat-ml", *first, turn("user", "Hi"), tools=[TOOL])

    head, user = text.split("<|im_end|>\n", 1)
    assert head.startswith(f"<|bos|><|im_start|>system\n{system}")
    assert f"<tools>\n{json.dumps(TOOL, ensure_ascii=False)}\n</tools>" in head
    assert user == "<|im_start|>user\nHi<|im_end|>\n"


def test_chat_ml_writes_no_second_start_for_a_tokenizer_that_begins_with_its_marker(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})

    template = read_template("chat-ml")
    text = tokenizer.apply_chat_template([turn("user", "Hi")], chat_template=template, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n"


@pytest.mark.parametrize("template", shipped_templates())
@pytest.mark.parametrize(
    "unfit",
    [
        {"messages": [turn("user", [{"type": "text", "text": "Hi"}])]},
        {"messages": [turn("judge", "Hi")]},
        {"messages": [turn("user", "Hi", tool_calls=[CALL])]},
    ],
    ids=["parts", "role", "calls of the user"],
)
def test_no_shipped_template_leaves_anything_out(write, template, unfit):
    with pytest.raises(TemplateError):
        write(template, *unfit["messages"])


@pytest.mark.parametrize("template", ["plain", "role-markers"])
@pytest.mark.parametrize(
    ("messages", "keywords"),
    [
        ([turn("user", "Hi")], {"tools": [TOOL]}),
        ([turn("assistant", "", tool_calls=[CALL])], {}),
        ([turn("assistant", "Hi", reasoning_content="Hm.")], {}),
    ],
    ids=["tools", "calls", "reasoning"],
)
def test_simple_templates_refuse_what_chat_ml_writes(write, template, messages, keywords):
    with pytest.raises(TemplateError, match="chat-ml can"):
        write(template, *messages, **keywords)
    write("chat-ml", *messages, **keywords)


@pytest.mark.parametrize("template", shipped_templates())
def test_shipped_templates_mark_answers_with_their_ends(tiny_tokenizer, template):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    from llmkit.model.tokenizer import set_chat_template

    set_chat_template(tokenizer, template)
    encoded = tokenizer.apply_chat_template(
        [turn("user", "1+1?"), turn("assistant", "It is 2."), turn("user", "2+2?"), turn("assistant", "4")],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    learnt = [i for i, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    end = {"chat-ml": "<|im_end|>", "plain": "<|end|>", "role-markers": "</ASSISTANT>"}[template]
    assert tokenizer.decode(learnt) == f"It is 2.{end}4{end}"


VALUES = {
    "enable_thinking": False,
    "tone": 'dry "quoted" \\ #} %} {{ é😀\n',
    "steps": [1, -2.5e-7, None],
    "more": {"x": True},
}


@pytest.mark.parametrize(
    "template",
    [
        "{{ enable_thinking }}|{{ tone }}|{{ steps }}|{{ more }}",
        "\n  {% if enable_thinking %}yes{% else %}no{% endif %}\n x",
        "  {{ tone }}",
        "{%- macro m() %}{{ enable_thinking }}{% endmacro %}{{ m() }}",
        "{% for m in messages %}{% if enable_thinking is defined and not enable_thinking %}no{% endif %}{% endfor %}",
    ],
)
def test_a_saved_template_writes_as_with_its_values_given(tiny_tokenizer, template):
    saved = with_defaults(template, VALUES)

    def render(text, **keywords):
        return tiny_tokenizer.apply_chat_template([turn("user", "Hi")], chat_template=text, tokenize=False, **keywords)

    assert render(saved) == render(template, **VALUES)
    other = VALUES | {"enable_thinking": True, "tone": "warm"}
    assert render(saved, enable_thinking=True, tone="warm") == render(template, **other)
    assert split_defaults(saved) == (template, VALUES)


def test_servers_see_that_the_variables_can_be_given():
    """vLLM passes on only those of a request's chat_template_kwargs that the template leaves undeclared."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    saved = with_defaults("{{ messages }}", VALUES)
    assert set(VALUES) <= meta.find_undeclared_variables(ImmutableSandboxedEnvironment().parse(saved))


def test_defaults_are_replaced_and_not_stacked():
    once = with_defaults("{{ tone }}", {"tone": "dry"})

    assert with_defaults(once, {"tone": "dry"}) == once
    assert with_defaults(once, {"tone": "warm"}) == with_defaults("{{ tone }}", {"tone": "warm"})
    assert with_defaults(once, {}) == "{{ tone }}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(value=JSON, template=st.text(alphabet="a {}%#-\n", max_size=6).filter(lambda text: "{" not in text))
def test_any_json_value_survives(value, template):
    from transformers.utils.chat_template_utils import _compile_jinja_template

    saved = with_defaults(template + "{{ a | tojson }}", {"a": value})
    assert split_defaults(saved) == (template + "{{ a | tojson }}", {"a": value})
    rendered = _compile_jinja_template(saved).render()
    assert rendered == _compile_jinja_template(template + "{{ a | tojson }}").render(a=value)


@pytest.mark.parametrize("name", ["messages", "tools", "not a name", "1st", "for", "add_generation_prompt", ""])
def test_names_that_are_no_variables_are_refused(name):
    with pytest.raises(ConfigError, match="not a variable that a chat template can be given"):
        with_defaults("x", {name: 1})


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, {"a": float("inf")}])
def test_values_that_are_not_json_are_refused(value):
    with pytest.raises(ConfigError, match=r"data\.chat_template_kwargs: .* is not JSON"):
        with_defaults("x", {"a": value})
