"""The columns tell the format, and can be renamed; a row that does not fit is named with what was found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.config.schema import FORMATS as NAMES
from llmkit.data.examples import Conversation, Preference
from llmkit.data.formats.table import FORMATS, LABELS, check_format, convert, detect_format
from llmkit.data.rows import Row
from llmkit.errors import DataError

SHARED = Path(__file__).parents[2] / "../shared/data"
CHECKOUT = Path(__file__).parents[2]

CHAT = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
PAIR = {"chosen": "2", "rejected": "3"}

# One small row of each format.
ROWS = {
    "messages": {"messages": CHAT},
    "sharegpt": {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
    "prompt_completion": {"prompt": "1+1?", "completion": "2"},
    "alpaca": {"instruction": "Add.", "input": "1+1", "output": "2"},
    "question_answer": {"question": "1+1?", "answer": "2"},
    "role_markers": {"input": "<USER>1+1?</USER><ASSISTANT>2</ASSISTANT>"},
    "text": {"text": "1+1 is 2."},
    "preference_messages": {
        "prompt_messages": CHAT[:1],
        "chosen_messages": CHAT[1:],
        "rejected_messages": [{"role": "assistant", "content": "3"}],
    },
    "preference": {"prompt": "1+1?"} | PAIR,
    "preference_sharegpt": {
        "conversations": [{"from": "human", "value": "1+1?"}],
        "chosen": {"from": "gpt", "value": "2"},
        "rejected": {"from": "gpt", "value": "3"},
    },
}


def rows(*values):
    return [Row(value, "chats.jsonl", number) for number, value in enumerate(values, start=1)]


def detect(row, columns=None, *, preference=False):
    return detect_format(rows(row)[0], columns or {}, preference=preference)


def refused_detection(row, columns=None, *, preference=False) -> str:
    with pytest.raises(DataError) as error:
        detect(row, columns, preference=preference)
    return str(error.value)


def refusal(*values, layout, columns=None) -> str:
    with pytest.raises(DataError) as error:
        convert(rows(*values), layout, columns or {}, preference=FORMATS[layout].preference)
    return str(error.value)


def test_every_format_of_the_config_is_built():
    assert tuple(FORMATS) == NAMES == tuple(ROWS)


@pytest.mark.parametrize("name", NAMES)
def test_each_format_is_detected_by_its_columns(name):
    assert detect(ROWS[name] | {"id": 7, "category": "sums"}, preference=FORMATS[name].preference) == name


@pytest.mark.parametrize("name", NAMES)
def test_columns_that_are_null_are_absent(name):
    others = {column: None for layout in FORMATS.values() for column in layout.columns + layout.optional}

    assert detect(others | ROWS[name], preference=FORMATS[name].preference) == name


@pytest.mark.parametrize("name", NAMES)
def test_null_columns_change_nothing(name):
    nulls = dict.fromkeys(FORMATS[name].optional + LABELS)
    pair = rows(ROWS[name], nulls | ROWS[name])

    bare, with_nulls = convert(pair, name, {}, preference=FORMATS[name].preference)
    assert bare == with_nulls


@pytest.mark.parametrize(
    ("row", "preference", "expected"),
    [
        ({"messages": CHAT, "question": "2+2?", "answer": "4"}, False, "messages"),
        # UltraFeedback's columns serve both recipes.
        ({"prompt": "1+1?", "messages": CHAT, "chosen": CHAT, "rejected": CHAT}, False, "messages"),
        ({"prompt": "1+1?", "messages": CHAT, "chosen": CHAT, "rejected": CHAT}, True, "preference"),
        # tatsu-lab/alpaca has the whole prompt as text, too.
        (ROWS["alpaca"] | {"text": "Below is an instruction"}, False, "alpaca"),
        ({"input": "1+1", "text": "1+1 is 2"}, False, "text"),
        ({"input": " \n<USR>hi</USR>"}, False, "role_markers"),  # to be told what is wrong with it
        (ROWS["preference_sharegpt"] | {"prompt": "1+1?"}, True, "preference"),
    ],
)
def test_the_likeliest_of_several_formats_is_taken(row, preference, expected):
    assert detect(row, preference=preference) == expected


@pytest.mark.parametrize("name", NAMES)
def test_data_of_the_other_kind_names_its_recipe(name):
    preference = FORMATS[name].preference
    row = ROWS[name]

    message = refused_detection(row, preference=not preference)
    assert f"the format {name} is " in message
    assert ("recipe=dpo learns from it" if preference else "recipe=sft learns from it") in message
    with pytest.raises(DataError, match=f"data.format={name}: "):
        convert(rows(row), name, {}, preference=not preference)
    with pytest.raises(DataError, match=f"data.format={name}: "):
        check_format(rows(row)[0], name, {}, preference=not preference)


def test_unknown_columns_are_told_beside_the_known_formats():
    message = refused_detection({"id": "q1", "ask": "1+1?", "reply": "2"})

    assert message.startswith("chats.jsonl, row 1 (id q1): no known format.")
    assert "messages: messages; sharegpt: conversations; prompt_completion: prompt, completion; " in message
    assert "chosen" not in message
    assert 'Found the columns id, ask, reply. The row begins: {"id": "q1", "ask": "1+1?", "reply": "2"}' in message


@pytest.mark.parametrize("value", [3, ["<USER>hi</USER>"], "1+1?", "1 <USER>"])
def test_an_input_without_markers_is_no_format(value):
    assert "no known format" in refused_detection({"input": value})


def test_a_row_without_columns_has_none():
    assert "Found the columns none" in refused_detection({})


def test_columns_in_other_letters_are_recognised():
    message = refused_detection({"Question": "1+1?", "Answer": "2"})

    assert "Did you mean data.columns={question: Question, answer: Answer}?" in message


# Renaming


def test_foreign_columns_are_renamed_before_anything():
    columns = {"question": "Problem", "answer": "Solution", "system": "rules"}
    row = {"Problem": "1+1?", "Solution": "2", "rules": "Add."}

    assert detect(row, columns) == "question_answer"
    (example,) = convert(rows(row), "question_answer", columns, preference=False)
    assert example.messages == [{"role": "system", "content": "Add."}, *CHAT]


def test_a_renamed_column_has_no_longer_its_own_name():
    assert detect({"conversations": CHAT}, {"messages": "conversations"}) == "messages"


def test_two_columns_can_change_places():
    swapped = {"prompt": "completion", "completion": "prompt"}

    (example,) = convert(rows({"prompt": "2", "completion": "1+1?"}), "prompt_completion", swapped, preference=False)
    assert example.messages == CHAT


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"question": "Problm"}, "there is no column 'Problm'. Did you mean 'Problem'?"),
        ({"question": "Problem", "system": "rules"}, "there is no column 'rules'."),
        ({"queston": "Problem"}, "'queston' is no column of any format"),
        ({"queston": "Problem"}, "Did you mean 'question'?"),
        ({"question": "Problem", "histry": "answer"}, "Did you mean 'history'?"),
    ],
)
def test_a_wrong_entry_of_columns_is_named(columns, said):
    assert said in refused_detection({"Problem": "1+1?", "answer": "2"}, columns)


def test_a_column_of_another_format_has_no_effect_and_is_refused():
    columns = {"history": "past"}
    row = ROWS["question_answer"] | {"past": []}

    assert "'history' is no column of the format question_answer" in refused_detection(row, columns)
    assert "'history' is no column of the format question_answer" in refusal(
        row, layout="question_answer", columns=columns
    )


def test_a_format_that_is_set_is_checked_against_the_first_row():
    (row,) = rows({"Problem": "1+1?", "answer": "2"})

    check_format(row, "question_answer", {"question": "Problem"}, preference=False)
    with pytest.raises(DataError, match=r"there is no column 'Problm'\. Did you mean 'Problem'\?"):
        check_format(row, "question_answer", {"question": "Problm"}, preference=False)


def test_an_id_of_another_name_is_told_too():
    message = refusal({"uuid": "q7", "question": "1+1?"}, layout="question_answer", columns={"id": "uuid"})

    assert message.startswith("chats.jsonl, row 1 (id q7): ")
    assert '{"uuid": "q7"' in message


# What is refused


def test_a_row_that_does_not_fit_is_named_with_all_that_helps():
    message = refusal(
        ROWS["question_answer"], {"id": 5, "question": "1+1?", "answr": "2" * 300}, layout="question_answer"
    )

    assert message.startswith("chats.jsonl, row 2 (id 5): the column 'answer' is missing. Did you mean 'answr'?")
    assert "The format question_answer has the columns question, answer and may have system, tools." in message
    assert "Found the columns id, question, answr." in message
    assert message.endswith("22")
    assert len(message.partition("The row begins: ")[2]) == 200


@pytest.mark.parametrize("column", ["images", "videos", "audios"])
def test_rows_with_media_are_refused(column):
    assert "llmkit trains on text only" in refusal(ROWS["messages"] | {column: ["a.png"]}, layout="messages")
    assert convert(rows(ROWS["messages"] | {column: []}), "messages", {}, preference=False)


def test_a_template_setting_of_one_row_is_refused():
    row = ROWS["messages"] | {"chat_template_kwargs": {"enable_thinking": False}}

    assert "renders every row with data.chat_template_kwargs" in refusal(row, layout="messages")


def test_other_columns_beside_text_do_not_matter():
    row = {"text": "1+1 is 2.", "images": ["a.png"], "system": "Add.", "tools": 3}

    assert convert(rows(row), "text", {}, preference=False) == [Conversation(messages=[], text="1+1 is 2.")]


def test_neither_torch_nor_transformers_is_loaded():
    code = (
        "import sys, llmkit.data.formats.table; "
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT)

    assert done.stdout.strip() == "[]"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type", "name", "function"]), inner)
    ),
    max_leaves=8,
)


@given(st.sampled_from(NAMES), st.data())
def test_whatever_a_column_holds_the_row_is_converted_or_refused(name, data):
    layout = FORMATS[name]
    column = data.draw(st.sampled_from(layout.columns + layout.optional + LABELS))

    try:
        (example,) = convert(rows(ROWS[name] | {column: data.draw(ANYTHING)}), name, {}, preference=layout.preference)
    except DataError:
        return
    assert isinstance(example, Preference if layout.preference else Conversation)


# Real files


def real_rows(file):
    path = SHARED / file
    if not path.is_file():
        pytest.skip(f"the real data is not on this machine: {path}")
    text = path.read_text(encoding="utf-8")
    values = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    return [Row(value, file, number) for number, value in enumerate(values)]


@pytest.mark.parametrize(
    ("file", "expected", "count"),
    [
        ("llama-factory/alpaca_en_demo.json", "alpaca", 999),
        ("gsm8k/train.jsonl", "question_answer", 7473),
        ("gsm8k/test.jsonl", "question_answer", 1319),
    ],
)
def test_real_questions_convert_completely(file, expected, count):
    found = real_rows(file)

    assert detect_format(found[0], {}, preference=False) == expected
    examples = convert(found, expected, {}, preference=False)
    assert len(examples) == count
    answer = FORMATS[expected].columns[-1]
    for row, example in zip(found, examples, strict=True):
        assert [message["role"] for message in example.messages] == ["user", "assistant"]
        assert example.messages[-1]["content"] == row.values[answer]


def test_real_preferences_convert_completely():
    found = real_rows("llama-factory/dpo_en_demo.json")

    assert detect_format(found[0], {}, preference=True) == "preference_sharegpt"
    examples = convert(found, "preference_sharegpt", {}, preference=True)
    assert len(examples) == 300
    for row, example in zip(found, examples, strict=True):
        assert isinstance(example, Preference)
        assert [message["content"] for message in example.prompt] == [t["value"] for t in row.values["conversations"]]
        assert example.prompt[-1]["role"] == "user"
        assert example.chosen == [{"role": "assistant", "content": row.values["chosen"]["value"]}]
        assert example.rejected == [{"role": "assistant", "content": row.values["rejected"]["value"]}]
