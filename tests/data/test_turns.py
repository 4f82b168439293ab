"""A turn keeps all that a chat template writes: reasoning, tool calls and results; and says whether it is learnt."""

import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.data.formats.table import convert
from llmkit.data.rows import Row
from llmkit.errors import DataError

QUESTION = {"role": "user", "content": "1+1?"}
ANSWER = {"role": "assistant", "content": "2"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 1}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def one(*turns, **columns):
    (example,) = convert([Row({"messages": list(turns)} | columns, "chats.jsonl", 1)], "messages", {}, preference=False)
    return example


def messages(*turns):
    return one(*turns).messages


def assistant(**keys):
    return {"role": "assistant", **keys}


def call_of(arguments, **keys):
    return {"function": {"name": "add", "arguments": arguments}, **keys}


def refusal(*turns, **columns) -> str:
    with pytest.raises(DataError) as error:
        one(*turns, **columns)
    return str(error.value)


def test_other_keys_of_a_turn_are_left_behind():
    assert messages(
        QUESTION | {"timestamp": 3}, ANSWER | {"tool_calls": [], "reasoning_content": "", "name": None}
    ) == [
        QUESTION,
        ANSWER,
    ]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept_under_one_name(key):
    assert messages(assistant(content="2", **{key: "Add."})) == [ANSWER | {"reasoning_content": "Add."}]


def test_reasoning_alone_is_a_turn():
    assert messages(assistant(content=None, reasoning="Add.")) == [assistant(content="", reasoning_content="Add.")]


@pytest.mark.parametrize(
    "turn",
    [
        assistant(content=None, tool_calls=[CALL]),
        assistant(tool_calls=[CALL]),
        assistant(content="", tool_calls=[call_of('{"a": 1, "b": 1}')]),
        assistant(content="", tool_calls=[call_of({"a": 1, "b": 1, "c": None})]),  # Parquet's null
        assistant(content="", tool_calls=[{"name": "add", "arguments": {"a": 1, "b": 1}}]),
        assistant(content="", tool_calls=json.dumps([CALL])),
        assistant(content=None, function_call={"name": "add", "arguments": '{"a": 1, "b": 1}'}),
    ],
)
def test_tool_calls_become_openai_form_with_arguments_as_a_mapping(turn):
    assert messages(QUESTION, turn) == [QUESTION, CALLING]


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_a_call_may_have_no_arguments(arguments):
    (message,) = messages(assistant(content="", tool_calls=[call_of(arguments)]))

    assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": {}}


def test_json_text_keeps_its_nulls():
    (message,) = messages(assistant(content="", tool_calls=[call_of('{"a": null}')]))

    assert message["tool_calls"][0]["function"]["arguments"] == {"a": None}


def test_a_result_keeps_its_call_and_name():
    turns = [
        assistant(content="", tool_calls=[CALL | {"id": "c1"}]),
        {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
    ]

    assert messages(*turns) == turns


def test_openais_older_role_of_a_result_is_a_tool():
    assert messages({"role": "function", "name": "add", "content": "2"}) == [
        {"role": "tool", "content": "2", "name": "add"}
    ]


@pytest.mark.parametrize(
    ("given_tools", "expected"),
    [
        ([{"name": "add"}], [{"type": "function", "function": {"name": "add"}}]),
        ([{"type": "function", "name": "add", "strict": None}], [{"type": "function", "function": {"name": "add"}}]),
        ([{"function": {"name": "add"}}], [{"type": "function", "function": {"name": "add"}}]),
        (['{"name": "add"}'], [{"type": "function", "function": {"name": "add"}}]),
        (
            [{"name": "add", "parameters": '{"type": "object"}'}],
            [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
        ),
        ("[]", None),
        ("", None),
        ([], None),
    ],
)
def test_tools_become_openai_form(given_tools, expected):
    assert one(QUESTION, tools=given_tools).tools == expected


# Parts


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([{"type": "text", "text": "2"}], [ANSWER]),
        ([{"type": "text", "value": "2"}], [ANSWER]),
        ([{"type": "text", "text": "2", "value": None, "id": None}], [ANSWER]),
        ([{"type": "text", "text": "", "value": "2"}], [ANSWER]),
        ([{"type": "text", "text": "4"}, {"type": "output_text", "text": "2"}], [assistant(content="42")]),
        (
            [{"type": "reasoning", "value": "Add."}, {"type": "text", "value": "2"}],
            [assistant(content="2", reasoning_content="Add.")],
        ),
        ([{"type": "thinking", "thinking": "Add."}], [assistant(content="", reasoning_content="Add.")]),
        ([{"type": "tool_call", "value": {"name": "add", "arguments": {"a": 1, "b": 1}}}], [CALLING]),
        ([{"type": "tool_call", "text": '{"name": "add", "arguments": {"a": 1, "b": 1}}'}], [CALLING]),
        ([{"type": "tool_call", "tool_call": CALL}], [CALLING]),
        ([{"type": "tool_call", "name": "add", "arguments": '{"a": 1, "b": 1}'}], [CALLING]),
        ([{"type": "tool_call", "function": CALL["function"]}], [CALLING]),
        ([{"type": "tool_calls", "tool_calls": [CALL]}], [CALLING]),
        (
            [{"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1, "b": 1}}],
            [assistant(content="", tool_calls=[CALL | {"id": "c1"}])],
        ),
        (
            [{"type": "tool_call", "id": "c1", "value": {"name": "add", "arguments": {"a": 1, "b": 1}}}],
            [assistant(content="", tool_calls=[CALL | {"id": "c1"}])],
        ),
        ([{"type": "text", "text": ""}], [assistant(content="")]),
        ([], [assistant(content="")]),
    ],
)
def test_parts_become_one_message(parts, expected):
    assert messages(QUESTION, assistant(content=parts)) == [QUESTION, *expected]


def test_a_result_among_parts_stands_between_two_turns():
    turn = assistant(
        content=[
            {"type": "reasoning", "text": "Add."},
            {"type": "text", "text": "One moment."},
            {"type": "tool_call", "value": CALL},
            {"type": "tool_result", "value": "2", "name": "add"},
            {"type": "reasoning", "text": "So 2."},
            {"type": "text", "text": "2"},
        ],
        loss_weight=0,
    )

    example = one(QUESTION, turn, QUESTION, ANSWER)
    assert example.messages == [
        QUESTION,
        assistant(content="One moment.", reasoning_content="Add.", tool_calls=[CALL]),
        {"role": "tool", "content": "2", "name": "add"},
        assistant(content="2", reasoning_content="So 2."),
        QUESTION,
        ANSWER,
    ]
    assert example.learnt == [True, False, False, False, True, True]


@pytest.mark.parametrize(
    ("role", "part", "expected"),
    [
        ("user", {"type": "tool_result", "tool_use_id": "c1", "content": "2"}, {"tool_call_id": "c1"}),
        ("user", {"type": "tool_result", "content": [{"type": "text", "text": "2"}]}, {}),
        ("tool", {"type": "text", "text": "2"}, {}),
        ("tool", {"type": "tool_result", "value": 2, "id": "c1"}, {"tool_call_id": "c1"}),
    ],
)
def test_a_result_is_a_turn_of_the_tool(role, part, expected):
    assert messages({"role": role, "content": [part]}) == [{"role": "tool", "content": "2", **expected}]


@pytest.mark.parametrize(
    ("value", "content"),
    [({"é": 1, "x": None}, '{"é": 1}'), ([1, {"type": "text"}], '[1, {"type": "text"}]'), (0, "0")],
)
def test_a_structured_result_is_written_as_json(value, content):
    (message,) = messages({"role": "tool", "content": [{"type": "tool_result", "value": value}]})

    assert message["content"] == content


def test_arrow_and_json_say_the_same():
    turns = [
        QUESTION,
        assistant(
            content=None, tool_calls=[call_of({"a": 1}, id="c1"), {"function": {"name": "now", "arguments": {}}}]
        ),
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        assistant(content="2", tool_calls=[call_of({"b": "x"})], loss_weight=0.0),
    ]
    tools = [
        {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
        {"name": "now"},
    ]

    (row,) = pa.Table.from_pylist([{"messages": turns, "tools": tools}]).to_pylist()
    assert None in row["messages"][0].values()
    assert one(*row["messages"], tools=row["tools"]) == one(*turns, tools=tools)


# Weights


@pytest.mark.parametrize(
    ("keys", "learnt"),
    [
        ({"loss_weight": 0}, [True, False]),
        ({"loss_weight": 0.0}, [True, False]),
        ({"weight": 0}, [True, False]),
        ({"train": False}, [True, False]),
        ({"train": False, "loss_weight": 0}, [True, False]),
        ({"loss_weight": 1.0}, None),
        ({"train": True, "weight": None}, None),
    ],
)
def test_a_turn_can_be_left_out_of_learning(keys, learnt):
    assert one(QUESTION, ANSWER | keys).learnt == learnt


# Refused


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"content": "hi"}, "a turn needs 'role' and 'content', found {'content': 'hi'}"),
        ({"role": "user"}, "a turn needs 'role' and 'content', found {'role': 'user'}"),
        ({"role": "user", "content": None}, "a turn needs 'role' and 'content'"),
        (
            {"role": "usr", "content": "hi"},
            "role 'usr' is not one of system, developer, user, assistant, tool. Did you",
        ),
        ({"role": "human", "content": "hi"}, "Did you mean 'user'?"),
        ({"role": "gpt", "content": "hi"}, "Did you mean 'assistant'?"),
        ({"role": ["user"], "content": "hi"}, "role ['user'] is not one of"),
        ({"role": 1, "content": "hi", "x": 1}, "role 1 is not one of"),
        ({"role": "user", "content": 7}, "'content' must be text, found 7. Write it as text"),
        ({"role": "user", "content": {"type": "text", "text": "hi"}}, "'content' must be text, found {"),
        ({"role": "user", "content": ["hi"]}, "part 0 must be a mapping with a 'type', found 'hi'"),
        ({"role": "user", "content": [{"text": "hi"}]}, "part 0 must be a mapping with a 'type'"),
        ({"role": "user", "content": [{"type": "txt", "text": "hi"}]}, "type 'txt' is not one of text, "),
        ({"role": "user", "content": [{"type": "txt", "text": "hi"}]}, "Did you mean 'text'?"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "llmkit trains on text only"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "llmkit trains on text only"),
        ({"role": "user", "content": [{"type": "text"}]}, "'text' or 'value' must be text, found null"),
        ({"role": "user", "content": [{"type": "reasoning", "text": "hm"}]}, "a reasoning in a turn of the user"),
        ({"role": "user", "content": "hi", "name": ["a"]}, "'name' must be text, found ['a']"),
        (
            {"role": "tool", "content": "hi", "tool_call_id": 3},
            "'tool_call_id' must be text, found 3. Write it as text",
        ),
        ({"role": "user", "content": "hi", "images": ["a.png"]}, "has 'images'; llmkit trains on text only"),
        ({"role": "user", "content": "hi", "reasoning_content": "hm"}, "only the assistant reasons"),
        ({"role": "user", "content": "hi", "tool_calls": [CALL]}, "only the assistant calls tools"),
        (assistant(content="2", reasoning="a", thinking="b"), "'reasoning' and 'thinking' differ; keep one"),
        (assistant(content="2", reasoning=["a"]), "'reasoning' must be text, found ['a']"),
        (assistant(content="2", tool_call=CALL), "Did you mean 'tool_calls'"),
        (
            assistant(content="2", tool_calls=[call_of("{a: 1}")]),
            "arguments of 'add': not JSON (Expecting property name",
        ),
        (assistant(content="2", tool_calls=[call_of("[1]")]), "the arguments of 'add' must be a mapping, found [1]"),
        (assistant(content="2", tool_calls=[call_of([1])]), "the arguments of 'add' must be a mapping, found [1]"),
        (assistant(content="2", tool_calls=[{"arguments": {}}]), "a call needs a 'name' and 'arguments'"),
        (assistant(content="2", tool_calls=["add"]), "not JSON"),
        (assistant(content="2", tool_calls=[[]]), "a call needs a 'name' and 'arguments', found []"),
        (
            assistant(content="2", tool_calls=[{"name": "add", "parameters": {"a": 1}}]),
            "the call of 'add' has no 'arguments', but parameters",
        ),
        (
            assistant(content=[{"type": "reasoning", "text": "a"}], reasoning_content="b"),
            "has 'reasoning_content' and a part of reasoning",
        ),
        (
            assistant(content=[{"type": "tool_call", "value": CALL}], tool_calls=[CALL]),
            "has 'tool_calls' and parts of calls or results",
        ),
        (
            assistant(
                content=[{"type": "tool_result", "value": "2"}, {"type": "text", "text": "2"}], tool_calls=[CALL]
            ),
            "has 'tool_calls' and parts of calls or results",
        ),
        (
            assistant(content=[{"type": "tool_call", "value": CALL}, {"type": "text", "text": "2"}]),
            "part 1: text follows tool_call, but a turn is written as reasoning, text, tool calls",
        ),
        (assistant(content=[{"type": "tool_call", "value": []}]), "part 0 holds no call"),
        (assistant(content=[{"type": "tool_result"}]), "a tool_result without text"),
        (assistant(content="2", loss_weight=0.5), "'loss_weight' is 0 (not learnt) or 1 (learnt)"),
        (assistant(content="2", weight="1"), "'weight' is 0 (not learnt) or 1 (learnt)"),
        (assistant(content="2", train="no"), "'train' is true or false"),
        (assistant(content="2", train=True, loss_weight=0), "'loss_weight' and 'train' contradict each other"),
    ],
)
def test_a_broken_turn_is_named(turn, said):
    message = refusal(QUESTION, turn)

    assert message.startswith("chats.jsonl, row 1: 'messages', turn 1")
    assert said in message


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ({"name": "add"}, "'tools' must be a list of tools, or JSON text of one"),
        ("add", "'tools': not JSON"),
        ([3], "'tools', tool 0: a tool is a mapping with a function and its 'name', found 3"),
        ([{"type": "web_search"}], "a tool is a mapping with a function and its 'name'"),
        ([{"name": "add", "parameters": []}], "'parameters' must be a JSON schema, found []"),
    ],
)
def test_broken_tools_are_named(tools, said):
    assert said in refusal(QUESTION, tools=tools)


JSON = st.recursive(
    st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(st.dictionaries(st.text(), JSON))
def test_arguments_are_the_same_as_text_and_as_a_mapping(arguments):
    (as_text,) = messages(assistant(content="", tool_calls=[call_of(json.dumps(arguments))]))
    (as_mapping,) = messages(assistant(content="", tool_calls=[call_of(arguments)]))

    assert as_text == as_mapping
    assert as_mapping["tool_calls"][0]["function"]["arguments"] == arguments


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "type", "text", "value", "tool_calls", "function", "name", "arguments"]
            ),
            inner,
        )
    ),
    max_leaves=12,
)


@given(st.sampled_from(["user", "assistant", "tool"]), ANY, ANY, ANY)
def test_whatever_a_turn_holds_it_becomes_text_or_a_message_for_the_user(role, content, calls, weight):
    try:
        example = one({"role": role, "content": content, "tool_calls": calls, "loss_weight": weight})
    except DataError:
        return
    assert all(isinstance(message["content"], str) for message in example.messages)
