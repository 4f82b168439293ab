"""Every layout of preference data becomes a prompt and two answers that begin with the assistant, and differ."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from one_row import QUESTION, SYSTEM, one, refusal

from llmkit.data.examples import Preference

GOOD = {"role": "assistant", "content": "2"}
BAD = {"role": "assistant", "content": "3"}
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def shared(turn):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"from": names[turn["role"]], "value": turn["content"]}


@pytest.mark.parametrize(
    ("layout", "row"),
    [
        ("preference", {"prompt": "1+1?", "chosen": "2", "rejected": "3"}),
        ("preference", {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]}),
        ("preference", {"prompt": [QUESTION], "chosen": "2", "rejected": BAD}),
        ("preference", {"prompt": "1+1?", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}),
        ("preference", {"prompt": [QUESTION], "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}),
        ("preference", {"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}),
        ("preference", {"prompt": None, "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}),
        (
            "preference_messages",
            {"prompt_messages": [QUESTION], "chosen_messages": [GOOD], "rejected_messages": [BAD]},
        ),
        ("preference_messages", {"chosen_messages": [QUESTION, GOOD], "rejected_messages": [QUESTION, BAD]}),
        (
            "preference_sharegpt",
            {"conversations": [shared(QUESTION)], "chosen": shared(GOOD), "rejected": shared(BAD)},
        ),
        (
            "preference_sharegpt",
            {"conversations": [shared(QUESTION)], "chosen": [shared(GOOD)], "rejected": [shared(BAD)]},
        ),
    ],
)
def test_every_layout_says_the_same(layout, row):
    assert one(layout, row) == Preference(prompt=[QUESTION], chosen=[GOOD], rejected=[BAD])
    assert one(layout, row | {"system": "Be brief.", "tools": TOOLS}) == Preference(
        prompt=[SYSTEM, QUESTION], chosen=[GOOD], rejected=[BAD], tools=TOOLS
    )


def test_a_text_prompt_may_stand_for_the_question_of_whole_conversations():
    start = [SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, QUESTION]

    example = one("preference", {"prompt": "1+1?", "chosen": [*start, GOOD], "rejected": [*start, BAD]})
    assert example == Preference(prompt=start, chosen=[GOOD], rejected=[BAD])


def test_an_answer_may_go_on_over_several_turns():
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}],
    }
    result = {"role": "tool", "content": "2"}

    example = one("preference", {"chosen": [QUESTION, call, result, GOOD], "rejected": [QUESTION, BAD]})
    assert example == Preference(prompt=[QUESTION], chosen=[call, result, GOOD], rejected=[BAD])


def test_a_prompt_may_end_with_the_assistant():
    example = one("preference", {"prompt": [QUESTION, GOOD], "chosen": "So 2.", "rejected": "So 3."})

    assert [message["role"] for message in example.prompt] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"chosen": "2", "rejected": "3"},
            "there is no column 'prompt'. Name its column (data.columns={prompt: THEIRS})",
        ),
        ({"chosen": "\n\nHuman: 1+1?\n\nAssistant: 2", "rejected": [BAD]}, "whole conversations as lists of turns"),
        ({"prompt": "1+1?", "chosen": "2"}, "the column 'rejected' is missing"),
        ({"prompt": "1+1?", "chosen": "2", "rejected": None}, "'rejected' must be text or a list of turns, found null"),
        ({"prompt": 7, "chosen": "2", "rejected": "3"}, "'prompt' must be text or a list of turns, found 7"),
        ({"prompt": "1+1?", "chosen": "2", "rejected": "2"}, "chosen and rejected are equal"),
        ({"prompt": "1+1?", "chosen": " ", "rejected": "3"}, "chosen is empty"),
        ({"prompt": "1+1?", "chosen": "2", "rejected": ""}, "rejected is empty"),
        ({"prompt": "1+1?", "chosen": [], "rejected": "3"}, "'chosen' must be a list of turns, found []"),
        ({"prompt": "", "chosen": "2", "rejected": "3"}, "the prompt is empty"),
        ({"prompt": [], "chosen": "2", "rejected": "3"}, "'prompt' must be a list of turns, found []"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no first turn in common"),
        (
            {"chosen": [QUESTION, GOOD], "rejected": [QUESTION]},
            "one of chosen and rejected is the beginning of the other",
        ),
        (
            {"chosen": [QUESTION, GOOD, QUESTION], "rejected": [QUESTION, GOOD, BAD]},
            "chosen must begin with the assistant",
        ),
        (
            {"prompt": "2+2?", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
            "chosen must begin with the assistant, or repeat the whole prompt before it; after the prompt it begins "
            "with the user: '1+1?'",
        ),
        ({"prompt": [QUESTION], "chosen": [QUESTION, GOOD], "rejected": [BAD]}, "chosen must begin with the assistant"),
        (
            {"prompt": [QUESTION], "chosen": [QUESTION, GOOD], "rejected": [QUESTION]},
            "rejected has no turn after the prompt",
        ),
        ({"prompt": [SYSTEM, QUESTION], "system": "x", "chosen": "2", "rejected": "3"}, "are both a system prompt"),
        ({"prompt": "1+1?", "chosen": [GOOD | {"train": False}], "rejected": "3"}, "a turn has the weight 0"),
        ({"prompt": "1+1?", "chosen": [GOOD | {"role": "gpt"}], "rejected": "3"}, "'chosen', turn 0: role 'gpt'"),
    ],
)
def test_a_pair_that_teaches_nothing_is_refused(row, said):
    assert said in refusal("preference", row)


@pytest.mark.parametrize(
    ("layout", "row", "said"),
    [
        ("preference_messages", {"chosen_messages": [GOOD]}, "the column 'rejected_messages' is missing"),
        (
            "preference_messages",
            {"prompt_messages": [], "chosen_messages": [GOOD], "rejected_messages": [BAD]},
            "'prompt_messages' must be a list of turns, found []",
        ),
        (
            "preference_messages",
            {"prompt_messages": [QUESTION], "chosen_messages": "2", "rejected_messages": [BAD]},
            "'chosen_messages' must be a list of turns, found '2'",
        ),
        (
            "preference_sharegpt",
            {"conversations": [shared(QUESTION)], "chosen": "2", "rejected": shared(BAD)},
            "'chosen', turn 0: a turn needs 'from' and 'value', found '2'",
        ),
        (
            "preference_sharegpt",
            {"conversations": [shared(QUESTION)], "chosen": shared(GOOD), "rejected": shared(QUESTION)},
            "rejected must begin with the assistant",
        ),
        (
            "preference_sharegpt",
            {"conversations": [], "chosen": shared(GOOD), "rejected": shared(BAD)},
            "'conversations' must be a list of turns",
        ),
    ],
)
def test_a_row_that_does_not_fit_says_where_and_why(layout, row, said):
    assert said in refusal(layout, row)


TURNS = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "assistant"]), st.text()
    ),
    max_size=4,
)
ANSWERS = st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1)


@given(TURNS, st.lists(ANSWERS, min_size=2, max_size=2, unique=True))
def test_whole_conversations_and_a_prompt_apart_say_the_same(turns, answers):
    start = [*turns, QUESTION]
    chosen, rejected = ({"role": "assistant", "content": answer} for answer in answers)

    expected = Preference(prompt=start, chosen=[chosen], rejected=[rejected])
    assert one("preference", {"prompt": start, "chosen": [chosen], "rejected": [rejected]}) == expected
    assert one("preference", {"chosen": [*start, chosen], "rejected": [*start, rejected]}) == expected
    conversations = {"conversations": [shared(turn) for turn in start]}
    assert (
        one("preference_sharegpt", conversations | {"chosen": shared(chosen), "rejected": shared(rejected)}) == expected
    )
