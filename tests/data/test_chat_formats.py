"""Each layout of a conversation becomes the same messages; a row that does not fit says which turn and why."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from one_row import QUESTION, SYSTEM, one, refusal

ANSWER = {"role": "assistant", "content": "2"}
SUM = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("layout", "row", "expected"),
    [
        ("messages", {"messages": [SYSTEM, QUESTION, ANSWER]}, [SYSTEM, QUESTION, ANSWER]),
        ("messages", {"messages": [ANSWER, QUESTION, ANSWER]}, [ANSWER, QUESTION, ANSWER]),  # dialogue may begin so
        ("messages", {"messages": [QUESTION, ANSWER], "system": "Be brief."}, [SYSTEM, QUESTION, ANSWER]),
        ("messages", {"messages": json.dumps([QUESTION, ANSWER])}, [QUESTION, ANSWER]),  # a cell of a CSV file
        ("messages", {"messages": [{"role": "developer", "content": "Hi"}]}, [{"role": "developer", "content": "Hi"}]),
        ("prompt_completion", {"prompt": "1+1?", "completion": "2"}, [QUESTION, ANSWER]),
        ("prompt_completion", {"prompt": [SYSTEM, QUESTION], "completion": [ANSWER]}, [SYSTEM, QUESTION, ANSWER]),
        ("prompt_completion", {"prompt": [QUESTION], "completion": "2"}, [QUESTION, ANSWER]),
        ("prompt_completion", {"prompt": "1+1?", "completion": ANSWER, "system": ""}, [QUESTION, ANSWER]),
        ("alpaca", {"instruction": "1+1?", "input": "", "output": "2"}, [QUESTION, ANSWER]),
        ("alpaca", {"instruction": "", "input": "1+1?", "output": "2"}, [QUESTION, ANSWER]),
        (
            "alpaca",
            {"instruction": "Add.", "input": "1+1", "output": "2"},
            [{"role": "user", "content": "Add.\n1+1"}, ANSWER],
        ),
        (
            "alpaca",
            {"instruction": "1+1?", "output": "2", "system": "Be brief.", "history": [["Hi", "Ho"], ["A", "B"]]},
            [
                SYSTEM,
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Ho"},
                {"role": "user", "content": "A"},
                {"role": "assistant", "content": "B"},
                QUESTION,
                ANSWER,
            ],
        ),
        (
            "alpaca",
            {"instruction": "1+1?", "output": "2", "history": '[["1+1?", "2"]]'},
            [QUESTION, ANSWER, QUESTION, ANSWER],
        ),
        ("question_answer", {"question": "1+1?", "answer": "2", "system": "Be brief."}, [SYSTEM, QUESTION, ANSWER]),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "2"}]}, [ANSWER]),
        (
            "sharegpt",
            {"conversations": [{"from": "user", "value": "1+1?"}, {"from": "assistant", "value": "2"}]},
            [QUESTION, ANSWER],
        ),
        (
            "sharegpt",
            {"system": "Be brief.", "conversations": [{"from": "human", "value": "1+1?"}]},
            [SYSTEM, QUESTION],
        ),
    ],
)
def test_a_row_becomes_its_messages(layout, row, expected):
    assert one(layout, row).messages == expected


@pytest.mark.parametrize(
    ("layout", "row", "prompt_turns"),
    [
        ("messages", {"messages": [QUESTION, ANSWER]}, None),
        ("question_answer", {"question": "1+1?", "answer": "2"}, 1),
        ("question_answer", {"question": "1+1?", "answer": "2", "system": "Be brief."}, 2),
        ("prompt_completion", {"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER, QUESTION, ANSWER]}, 3),
        ("prompt_completion", {"prompt": "1+1?", "completion": "2", "system": "Be brief."}, 2),
        ("alpaca", {"instruction": "1+1?", "output": "2", "history": [["Hi", "Ho"]]}, 3),
        ("alpaca", {"instruction": "1+1?", "output": "2", "history": []}, 1),
    ],
)
def test_the_prompt_is_what_the_row_calls_so(layout, row, prompt_turns):
    assert one(layout, row).prompt_turns == prompt_turns


@pytest.mark.parametrize(
    ("layout", "row"),
    [
        ("messages", {"messages": [QUESTION]}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "1+1?"}]}),
        ("prompt_completion", {"prompt": "1+1?", "completion": "2"}),
        ("alpaca", {"instruction": "1+1?", "output": "2"}),
        ("question_answer", {"question": "1+1?", "answer": "2"}),
        ("role_markers", {"input": "<USER>1+1?</USER>"}),
    ],
)
def test_tools_are_kept_in_every_format_of_turns(layout, row):
    assert one(layout, row).tools is None
    assert one(layout, row | {"tools": [SUM]}).tools == [SUM]
    assert one(layout, row | {"tools": json.dumps([SUM])}).tools == [SUM]


def test_text_is_learnt_as_it_is():
    example = one("text", {"text": "<s>any\n"})

    assert (example.text, example.messages) == ("<s>any\n", [])


@pytest.mark.parametrize(
    ("layout", "row", "said"),
    [
        ("messages", {"text": "hi"}, "the column 'messages' is missing"),
        ("messages", {"messages": None}, "'messages' must be a list of turns, found null"),
        ("messages", {"messages": []}, "'messages' must be a list of turns, found []"),
        ("messages", {"messages": "hi"}, "'messages' must be a list of turns, found 'hi'"),
        ("messages", {"messages": '[{"role": '}, "'messages': not JSON"),
        ("messages", {"messages": ["hi"]}, "'messages', turn 0: a turn needs 'role' and 'content', found 'hi'"),
        ("messages", {"messages": [{"from": "human", "value": "hi"}]}, "data.columns={conversations: messages}"),
        ("messages", {"messages": [QUESTION], "system": 7}, "'system' must be text, found 7"),
        ("messages", {"messages": [SYSTEM, QUESTION], "system": "Be kind."}, "are both a system prompt; keep one"),
        ("prompt_completion", {"prompt": "1+1?"}, "the column 'completion' is missing"),
        (
            "prompt_completion",
            {"prompt": None, "completion": "2"},
            "'prompt' must be text or a list of turns, found null",
        ),
        (
            "prompt_completion",
            {"prompt": "1+1?", "completion": 2},
            "'completion' must be text or a list of turns, found 2",
        ),
        ("prompt_completion", {"prompt": [], "completion": "2"}, "'prompt' must be a list of turns, found []"),
        (
            "prompt_completion",
            {"prompt": [{"role": "usr", "content": ""}], "completion": "2"},
            "'prompt', turn 0: role",
        ),
        ("alpaca", {"instruction": "1+1?"}, "the column 'output' is missing"),
        ("alpaca", {"instruction": None, "output": "2"}, "'instruction' must be text, found null"),
        ("alpaca", {"instruction": "1+1?", "input": ["x"], "output": "2"}, "'input' must be text, found ['x']"),
        ("alpaca", {"instruction": "1+1?", "output": "2", "history": {"a": "b"}}, "'history' must be a list of pairs"),
        ("alpaca", {"instruction": "1+1?", "output": "2", "history": [["a"]]}, "found ['a']"),
        ("alpaca", {"instruction": "1+1?", "output": "2", "history": ["ab"]}, "found 'ab'"),
        ("alpaca", {"instruction": "1+1?", "output": "2", "history": [["a", None]]}, "found ['a', None]"),
        ("question_answer", {"question": "1+1?"}, "the column 'answer' is missing"),
        (
            "question_answer",
            {"question": "1+1?", "answer": 2},
            "'answer' must be text, found 2. Write it as text: \"2\"",
        ),
        ("question_answer", {"question": "1+1?", "answer": True}, "'answer' must be text, found True."),
        ("question_answer", {"question": None, "answer": "2"}, "'question' must be text, found null"),
        ("text", {"text": ["a" * 200]}, "'text' must be text, found ['" + "a" * 98 + "…."),
        ("text", {"text": ["a", "b"]}, "'text' must be text, found ['a', 'b']"),
        ("sharegpt", {"conversations": []}, "'conversations' must be a list of turns"),
        ("sharegpt", {"conversations": ["hi"]}, "'conversations', turn 0: a turn needs 'from' and 'value'"),
        ("sharegpt", {"conversations": [QUESTION]}, "data.columns={messages: conversations}"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "turn 0: 'value' must be text, found null"),
        ("sharegpt", {"conversations": [{"from": "huma", "value": "a"}]}, "Did you mean 'human'?"),
        ("sharegpt", {"conversations": [{"from": "bot", "value": "a"}]}, "Did you mean 'assistant'?"),
        ("sharegpt", {"conversations": [{"from": ["a"], "value": "a"}]}, "role ['a'] is not one of human, user, gpt"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "add(1, 2)"}]}, "turn 0: not JSON"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": '{"nam": "add"}'}]}, "needs a 'name'"),
    ],
)
def test_a_row_that_does_not_fit_says_where_and_why(layout, row, said):
    assert said in refusal(layout, row)


def test_sharegpt_calls_and_observations_become_calls_and_results():
    row = {
        "conversations": [
            {"from": "human", "value": "1+1? 2+2?"},
            {"from": "function_call", "value": '[{"name": "add", "arguments": {"a": 1, "b": null}}, {"name": "now"}]'},
            {"from": "observation", "value": "2"},
            {"from": "tool", "value": "noon"},
            {"from": "gpt", "value": "2"},
        ],
        "tools": json.dumps([SUM["function"]]),
    }

    example = one("sharegpt", row)
    assert example.tools == [SUM]
    assert example.messages == [
        {"role": "user", "content": "1+1? 2+2?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}},
                {"type": "function", "function": {"name": "now", "arguments": {}}},
            ],
        },
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "noon"},
        ANSWER,
    ]


def test_sharegpt_turns_can_be_left_out_of_learning():
    turns = [
        {"from": "human", "value": "a", "weight": None},
        {"from": "gpt", "value": "b", "weight": 0},
        {"from": "human", "value": "c", "weight": None},
        {"from": "gpt", "value": "d", "weight": 1},
    ]

    assert one("sharegpt", {"conversations": turns, "system": "e"}).learnt == [True, True, False, True, True]


@pytest.mark.parametrize(
    ("prompt", "completion", "learnt"),
    [
        ("1+1?", [ANSWER | {"loss_weight": 0}, QUESTION, ANSWER], [True, False, True, True]),
        ([ANSWER | {"loss_weight": 0}, QUESTION], "2", [False, True, True]),
        ([QUESTION | {"train": False}], [ANSWER | {"train": False}], [False, False]),
        ("1+1?", [ANSWER | {"loss_weight": 1}], None),
    ],
)
def test_weights_of_prompt_and_completion_stand_one_after_the_other(prompt, completion, learnt):
    assert one("prompt_completion", {"prompt": prompt, "completion": completion}).learnt == learnt


TURNS = st.lists(st.tuples(st.sampled_from(["user", "assistant", "system", "tool"]), st.text()), min_size=1)
SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}


@given(TURNS)
def test_sharegpt_and_messages_say_the_same(turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    conversations = [{"from": SHAREGPT[role], "value": content} for role, content in turns]

    assert one("messages", {"messages": messages}) == one("sharegpt", {"conversations": conversations})
    assert one("messages", {"messages": messages}).messages == messages


@given(TURNS)
def test_the_nulls_of_a_parquet_file_change_nothing(turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    nulls = dict.fromkeys(["reasoning_content", "tool_calls", "tool_call_id", "name", "loss_weight", "train", "images"])

    assert one("messages", {"messages": [message | nulls for message in messages]}).messages == messages
