"""A text with inline markers becomes turns, to the letter; a marker that is wrong is shown where it stands."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.data.formats.role_markers import MARKERS
from llmkit.data.formats.table import convert
from llmkit.data.rows import Row
from llmkit.errors import DataError


def one(text, **columns):
    (example,) = convert([Row({"input": text} | columns, "d.jsonl", 1)], "role_markers", {}, preference=False)
    return example


def turns(text):
    return [(message["role"], message["content"]) for message in one(text).messages]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<ASSISTANT>Hi!</ASSISTANT><USER>Ho.</USER>", [("assistant", "Hi!"), ("user", "Ho.")]),
        ("\n <user>a</USER>\t\n<Gpt>b</gpt>\n", [("user", "a"), ("assistant", "b")]),
        ("<USER> a \n</USER>", [("user", " a \n")]),
        ("<BOT></BOT>", [("assistant", "")]),
        ("<SYSTEM>s</SYSTEM><TOOL>t</TOOL>", [("system", "s"), ("tool", "t")]),
        (
            "<USER>1 < 2, <b>bold</b>, <NAME>, </p> and a\nline</USER>",
            [("user", "1 < 2, <b>bold</b>, <NAME>, </p> and a\nline")],
        ),
    ],
)
def test_marked_text_becomes_turns(text, expected):
    assert turns(text) == expected


def test_a_system_prompt_may_stand_in_its_own_column():
    assert one("<USER>a</USER>", system="s").messages[0] == {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'input' holds no turn"),
        (" \n", "'input' holds no turn"),
        ("Hello there", "only a marker such as <USER> may begin a turn (character 1: 'Hello there')"),
        ("<USER>a</USER> and <BOT>b</BOT>", "may begin a turn (character 16: 'and <BOT>b</BOT>')"),
        ("</USER>", "only a marker such as <USER> may begin a turn (character 1: '</USER>')"),
        ("<USER>a", "<USER> (character 1: '<USER>a') is not closed."),
        ("<USER>a<BOT>b</BOT>", "<USER> (character 1: '<USER>a<BOT>b</BOT>') is not closed before <BOT> (character 8:"),
        ("<USER>a</BOT>", "is not closed before </BOT> (character 8: '</BOT>')"),
        ("<USER>a</HUMAN>", "is not closed before </HUMAN>"),
        ("<USER>a<user>b</user></USER>", "is not closed before <user>"),
        ("<USR>a</USR>", "marker <USR> is not one of USER, HUMAN, ASSISTANT"),
        ("<USR>a</USR>", "Did you mean 'USER'?"),
        (
            "<USER>a</USER>\n<Asistant>b</Asistant>",
            "(character 16: '<Asistant>b</Asistant>'). Did you mean 'ASSISTANT'?",
        ),
        (["<USER>a</USER>"], "'input' must be text"),
    ],
)
def test_a_wrong_marker_is_shown_where_it_stands(text, said):
    with pytest.raises(DataError) as error:
        one(text)

    assert said in str(error.value)


CONTENT = st.text().filter(lambda text: not any(f"{name}>" in text.lower() for name in MARKERS))


@given(st.lists(st.tuples(st.sampled_from(sorted(MARKERS)), CONTENT, st.sampled_from(["", " ", "\n\n"])), min_size=1))
def test_what_is_written_is_read_again(written):
    text = "".join(f"<{name.upper()}>{content}</{name.upper()}>{space}" for name, content, space in written)

    assert turns(text) == [(MARKERS[name], content) for name, content, _ in written]
