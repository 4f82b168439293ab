"""Every known layout becomes messages; a row that has another is named with what was expected and what was found."""

import pytest

from llmkit.data.formats import detect_format, to_messages
from llmkit.data.sources import Row
from llmkit.errors import DataError

QUESTION = {"role": "user", "content": "1+1?"}
ANSWER = {"role": "assistant", "content": "2"}


def rows(*values):
    return [Row(value, "chats.jsonl", number) for number, value in enumerate(values, start=1)]


def refusal(*values, layout="auto") -> str:
    with pytest.raises(DataError) as error:
        to_messages(rows(*values), layout)
    return str(error.value)


def test_messages_keep_their_turns_and_leave_other_keys_behind():
    row = {"messages": [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER | {"id": 7}], "source": "here"}

    assert to_messages(rows(row), "auto") == [[{"role": "system", "content": "Be brief."}, QUESTION, ANSWER]]


def test_a_question_and_its_answer_are_two_turns():
    assert to_messages(rows({"question": "1+1?", "answer": "2"}), "auto") == [[QUESTION, ANSWER]]


def test_the_layout_is_that_of_the_first_row():
    assert detect_format(rows({"id": 1, "messages": []})[0]) == "messages"
    assert detect_format(rows({"answer": "", "question": ""})[0]) == "question_answer"


def test_a_layout_that_is_asked_for_is_not_guessed():
    both = {"messages": [QUESTION, ANSWER], "question": "2+2?", "answer": "4"}

    assert to_messages(rows(both), "question_answer")[0][1]["content"] == "4"


def test_unknown_columns_are_told_beside_the_known_layouts():
    message = refusal({"instruction": "1+1?", "output": "2"})

    assert message.startswith("chats.jsonl, row 1: ")
    assert "'instruction', 'output'" in message
    assert "messages: messages; question_answer: question, answer" in message


def test_a_row_without_columns_has_none():
    assert "Found the columns none" in refusal({})


@pytest.mark.parametrize(
    ("layout", "row", "said"),
    [
        ("messages", {"text": "hi"}, "expected the column 'messages', found 'text'"),
        ("messages", {"messages": None}, "'messages' must be a list of turns, found None"),
        ("messages", {"messages": {"role": "user"}}, "'messages' must be a list of turns"),
        ("messages", {"messages": []}, "'messages' must be a list of turns"),
        ("messages", {"messages": ["hi"]}, "a turn needs 'role' and 'content', found 'hi'"),
        ("messages", {"messages": [{"from": "human", "value": "hi"}]}, "a turn needs 'role' and 'content'"),
        ("messages", {"messages": [{"role": "tool", "content": "hi"}]}, "role 'tool' is not one of system, user"),
        ("messages", {"messages": [{"role": "user", "content": ["hi"]}]}, "'content' must be text, found ['hi']"),
        ("messages", {"messages": [QUESTION, ANSWER | {"tool_calls": [{}]}]}, "a turn has 'tool_calls'"),
        ("messages", {"messages": [QUESTION, ANSWER | {"reasoning_content": "1+1"}]}, "'reasoning_content'"),
        ("messages", {"messages": [ANSWER, QUESTION, ANSWER]}, "begins with a user or system turn"),
        ("question_answer", {"question": "1+1?"}, "expected the column 'answer', found 'question'"),
        ("question_answer", {"question": "1+1?", "answer": 2}, "'answer' must be text, found 2"),
        ("question_answer", {"question": None, "answer": "2"}, "'question' must be text, found None"),
    ],
)
def test_a_row_that_does_not_fit_is_named(layout, row, said):
    good = {"messages": [QUESTION, ANSWER]} if layout == "messages" else {"question": "1+1?", "answer": "2"}
    message = refusal(good, row, layout=layout)

    assert message.startswith("chats.jsonl, row 2: ")
    assert said in message


def test_keys_of_a_turn_that_hold_nothing_are_no_loss():
    row = {"messages": [QUESTION, ANSWER | {"tool_calls": None, "reasoning_content": ""}]}

    assert to_messages(rows(row), "auto") == [[QUESTION, ANSWER]]
