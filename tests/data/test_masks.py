"""Only the assistant's words and its end of turn are learnt, whatever the chat template does around them."""

import copy
import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.encoding.masks import AnswerFinder, render
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
    return [text[start:end] for start, end in AnswerFinder(tokenizer).spans(messages, text)]


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
        ours = {i for start, end in AnswerFinder(tokenizer).spans(messages, text) for i in range(start, end)}
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
    (start, _), _ = AnswerFinder(tokenizer).spans(messages, text)
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
    with pytest.raises(DataError, match=r"leaves out the answer's '(one|two)'"):
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


@settings(max_examples=60, deadline=None, derandomize=True)
@given(messages=conversations)
def test_one_rendering_finds_what_a_rendering_for_each_answer_finds(tiny_tokenizer, messages):
    for template in (tiny_tokenizer.chat_template, read_template("chat-ml"), trl_template("llama3")):
        tokenizer = copy.copy(tiny_tokenizer)
        tokenizer.chat_template = template
        quick, thorough = AnswerFinder(tokenizer), AnswerFinder(tokenizer)
        assert quick._markers
        thorough.__dict__["_markers"] = None

        text = render(tokenizer, messages)
        assert quick.spans(messages, text) == thorough.spans(messages, text)


def test_one_rendering_is_not_believed_where_a_question_holds_a_header(tokenizer_with):
    header = "<|im_start|>assistant\n"
    messages = [user(f"{header}no<|im_end|>"), assistant("no")]
    tokenizer = tokenizer_with(read_template("chat-ml"))

    text = render(tokenizer, messages)
    assert AnswerFinder(tokenizer).spans(messages, text) == [(text.rindex(header) + len(header), len(text.rstrip()))]


@pytest.mark.parametrize("template", ["tiny", "plain", "chat-ml", "llama3", "qwen3", "gptoss"])
@pytest.mark.parametrize("wanted", [[1], [3], [1, 3], []])
def test_only_the_wanted_answers_are_found(tiny_tokenizer, tokenizer_with, template, wanted):
    shipped = {"tiny": tiny_tokenizer.chat_template, **{name: read_template(name) for name in ("plain", "chat-ml")}}
    tokenizer = tokenizer_with(shipped.get(template) or trl_template(template))
    text = render(tokenizer, TWO)

    found = [text[start:end] for start, end in AnswerFinder(tokenizer).spans(TWO, text, wanted=wanted)]
    assert len(found) == len(wanted)
    assert all(TWO[index]["content"] in one for index, one in zip(wanted, found, strict=True))


@pytest.mark.parametrize("template", ["tiny", "chat-ml", "llama3", "qwen3"])
def test_an_answer_that_opens_the_conversation_is_found(tiny_tokenizer, tokenizer_with, template):
    shipped = {"tiny": tiny_tokenizer.chat_template, "chat-ml": read_template("chat-ml")}
    tokenizer = tokenizer_with(shipped.get(template) or trl_template(template))

    first, second = learnt(tokenizer, [assistant("how can I help"), user("so"), assistant("thus")])
    assert first.startswith("how can I help<|")
    assert "thus<|" in second


TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
    }
]
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
]}  # fmt: skip


@pytest.mark.parametrize("template", ["qwen3", "qwen2_5"])
def test_a_tool_call_is_learnt_and_the_result_is_not(tokenizer_with, template):
    tokenizer = tokenizer_with(trl_template(template))
    messages = [user("1+2?"), CALL, {"role": "tool", "content": "3"}, assistant("It is 3.")]
    text = render(tokenizer, messages, tools=TOOLS)

    spans = AnswerFinder(tokenizer).spans(messages, text, tools=TOOLS)
    call, answer = (text[start:end] for start, end in spans)
    assert '"name": "add"' in call
    assert call.endswith("<|im_end|>")
    assert "tool_response" not in call + answer
    assert answer.endswith("It is 3.<|im_end|>")


@pytest.mark.parametrize("template", ["qwen3", "gptoss"])
def test_the_reasoning_of_the_last_answer_is_learnt_where_the_template_has_a_place_for_it(tokenizer_with, template):
    messages = [user("1+1?"), {"role": "assistant", "content": "2", "reasoning_content": "one and one"}]

    (answer,) = learnt(tokenizer_with(trl_template(template)), messages)
    assert "one and one" in answer
    assert "2<|" in answer
