"""Only the assistant's words and its end of turn are learnt, whatever the chat template does around them."""

import copy
import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.masks import answer_spans, render
from llmkit.data.templates import read_template
from llmkit.errors import DataError

TRL = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"  # found without importing it
DEEPSEEK_END = "<\N{FULLWIDTH VERTICAL LINE}end▁of▁sentence\N{FULLWIDTH VERTICAL LINE}>"
NOT_COMPARED = {
    **dict.fromkeys(("idefics3", "llava_next", "smolvlm"), "it takes text in parts only, as beside images"),
    "glm4moe": "TRL has answers end in the header of the next turn",
}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}
TWO = [user("first question"), assistant("answer one"), user("second question"), assistant("answer two")]


@pytest.fixture
def tokenizer_with(tiny_tokenizer):
    """A function: the tiny tokenizer with another chat template. The templates' own markers are ordinary text to it."""

    def make(template):
        tokenizer = copy.copy(tiny_tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    return make


def trl_template(name):
    return (TRL / f"{name}.jinja").read_text(encoding="utf-8")


def learnt(tokenizer, messages) -> list[str]:
    text = render(tokenizer, messages)
    return [text[start:end] for start, end in answer_spans(tokenizer, messages, text)]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("tiny", ["answer one<|end|>", "answer two<|end|>"]),
        ("plain", ["answer one<|end|>", "answer two<|end|>"]),
        ("chat-ml", ["answer one<|im_end|>", "answer two<|im_end|>"]),
        ("llama3", ["answer one<|eot_id|>", "answer two<|eot_id|>"]),
        ("gemma3", ["answer one<end_of_turn>", "answer two<end_of_turn>"]),
        ("qwen2_5", ["answer one<|im_end|>", "answer two<|im_end|>"]),
        # Rewriting templates: the last answer differs from the earlier ones, or the prompt from what follows it.
        ("qwen3", ["answer one<|im_end|>", "<think>\n\n</think>\n\nanswer two<|im_end|>"]),
        ("qwen3_5_think", ["answer one<|im_end|>", "\n</think>\n\nanswer two<|im_end|>"]),
        ("gptoss", ["<|channel|>final<|message|>answer one<|end|>", "<|channel|>final<|message|>answer two<|return|>"]),
        ("phi3", ["answer one<|end|>", "answer two<|end|>", "<|end|>"]),  # the last is the tiny tokenizer's eos
        ("deepseekv3", [f"answer one{DEEPSEEK_END}", f"answer two{DEEPSEEK_END}"]),
        ("nemotron_3_nano", ["<think></think>answer one<|im_end|>", "<think></think>answer two<|im_end|>"]),
    ],
)
def test_two_answers_are_found_with_their_ends(tiny_tokenizer, tokenizer_with, template, expected):
    shipped = {
        "tiny": tiny_tokenizer.chat_template,
        "plain": read_template("plain"),
        "chat-ml": read_template("chat-ml"),
    }
    tokenizer = tokenizer_with(shipped.get(template) or trl_template(template))

    assert learnt(tokenizer, TWO) == expected


CONVERSATIONS = {
    "one answer": TWO[:2],
    "two answers": TWO,
    "system prompt": [SYSTEM, *TWO],
    "ends with a question": TWO[:3],
    "white space around": [user("\n hi \n"), assistant(" \n hello \n\n"), user(" "), assistant("\tbye\t")],
    "any script": [user("Привет 你好"), assistant("🎉 é\u0301 \u202b\u05e9\u05dc"), user("x"), assistant("ﬁ\u00a0")],
    "empty answer": [user("hi"), assistant(""), user("hi"), assistant("")],
    "answers that the prompt holds": [
        user("Say user assistant end"),
        assistant("user"),
        user("again"),
        assistant("end"),
    ],
    "letters of a marker": [user("m"), assistant("m"), user(">"), assistant(">")],
    "thinking": [
        user("a"),
        assistant("<think>\nhm\n</think>\n\nb"),
        user("c"),
        assistant("<think>\nhm\n</think>\n\nd"),
    ],
}


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in TRL.glob("*.jinja") if (TRL / f"{p.stem}_training.jinja").exists())
)
def test_trl_marks_the_same_characters_apart_from_headers_and_line_breaks(tokenizer_with, name):
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    if name in NOT_COMPARED:
        pytest.skip(NOT_COMPARED[name])
    tokenizer, compared = tokenizer_with(trl_template(name)), 0
    for case, messages in CONVERSATIONS.items():
        try:
            text = render(tokenizer, messages)
        except TemplateError:  # it has no system prompt, say
            continue
        texts, marks = render_jinja_template(
            conversations=[messages],
            chat_template=trl_template(f"{name}_training"),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        if texts[0] != text:  # TRL changes some templates so that all turns look like the last
            continue
        compared += 1
        ours = {i for start, end in answer_spans(tokenizer, messages, text) for i in range(start, end)}
        theirs = {i for start, end in marks[0] for i in range(start, end)}
        headers = set()
        for index in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            before, prompt = render(tokenizer, messages[:index]), render(tokenizer, messages[:index], prompt=True)
            shared = next(
                (i for i, pair in enumerate(zip(prompt, text, strict=False)) if len(set(pair)) > 1), len(prompt)
            )
            headers |= set(range(len(before), shared))
        assert ours - theirs <= {i for i, c in enumerate(text) if c.isspace()}, case
        assert {i for i in theirs - ours - headers if not text[i].isspace()} == set(), case
    assert compared


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_qwen3_learns_each_answer_as_it_writes_it(tokenizer_with, case):
    tokenizer, messages = tokenizer_with(trl_template("qwen3")), CONVERSATIONS[case]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    thought, last = "hm" if case == "thinking" else "", answers[-1].rpartition("</think>")[2].lstrip("\n")
    expected = [answer.rpartition("</think>\n\n")[2] + "<|im_end|>" for answer in answers[:-1]]
    if messages[-1]["role"] == "user":
        expected.append(answers[-1] + "<|im_end|>")
    else:
        expected.append(f"<think>\n{thought}\n</think>\n\n{last}<|im_end|>")

    assert learnt(tokenizer, messages) == expected


def test_a_question_that_holds_the_answer_and_its_end_is_not_taken_for_it(tokenizer_with):
    messages = [user("Say yes<|im_end|>"), assistant("yes"), user("yes"), assistant("yes")]
    tokenizer = tokenizer_with(trl_template("qwen3"))

    text = render(tokenizer, messages)
    (start, _), _ = answer_spans(tokenizer, messages, text)
    assert text[:start].endswith("<|im_start|>assistant\n")


def test_a_template_without_an_end_of_turn_gives_the_bare_answer(tokenizer_with):
    tokenizer = tokenizer_with(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert learnt(tokenizer, TWO) == ["answer one", "answer two"]


def test_answers_that_a_template_changes_afterwards_are_refused(tokenizer_with):
    tokenizer = tokenizer_with(
        "{% for m in messages %}{{ '<' + m.role + '>' + (m.content if loop.last else m.content | upper) }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    assert learnt(tokenizer, [user("HI"), assistant("hello")]) == ["hello"]
    with pytest.raises(DataError, match=r"renders an earlier turn differently.*data\.chat_template"):
        learnt(tokenizer, TWO)


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_a_template_that_leaves_the_answers_text_out_is_refused(tokenizer_with, name):
    with pytest.raises(DataError, match="leaves out the answer's text"):
        learnt(tokenizer_with(trl_template(name)), TWO)


contents = st.text(max_size=12) | st.sampled_from(["a", "user", "\n", " x ", "yes\n\n", "<", "im_end", "assistant\n"])
conversations = st.tuples(
    st.booleans(), st.lists(st.tuples(contents, contents), min_size=1, max_size=3), st.booleans()
).map(
    lambda parts: [
        *([SYSTEM] if parts[0] else []),
        *(turn for question, answer in parts[1] for turn in (user(question), assistant(answer))),
        *([user("one more")] if parts[2] else []),
    ]
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(messages=conversations)
def test_any_conversation_learns_exactly_its_answers(tiny_tokenizer, messages):
    answers = [message["content"] for message in messages if message["role"] == "assistant"]

    def check(template, write, end):
        tokenizer = copy.copy(tiny_tokenizer)
        tokenizer.chat_template = template
        assert learnt(tokenizer, messages) == [write(answer) + end for answer in answers]

    check(tiny_tokenizer.chat_template, str, "<|end|>")
    check(read_template("plain"), str.strip, "<|end|>")
    check(read_template("chat-ml"), str, "<|im_end|>")
    check(trl_template("llama3"), str.strip, "<|eot_id|>")
