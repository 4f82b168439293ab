"""What the trainer gets: the template's own tokens, labels inside answers only, and every row accounted for."""

import copy
import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmkit.config.schema import DataConfig
from llmkit.data.prepare import IGNORED, check_rows, encode, held_out_indices, prepare_data, select
from llmkit.data.sources import Row
from llmkit.errors import DataError


def chat(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]


def split_of(tokenizer, *conversations, max_length=2048, **settings):
    rows = [Row({}, "chats.jsonl", number) for number in range(1, len(conversations) + 1)]
    encoded = encode(rows, list(conversations), tokenizer)
    check_rows([encoded], DataConfig(**settings), max_length=max_length)
    return select(encoded, max_length=max_length)


def learnt(split, row=0) -> list[int]:
    return [label for label in split.dataset[row]["labels"] if label != IGNORED]


@pytest.fixture
def prepare(chats_file, tiny_tokenizer):
    """A function: prepare these conversations, written to a file."""

    def run(*conversations, name="chats.jsonl", max_length=2048, **settings):
        file = chats_file(*({"messages": messages} for messages in conversations), name=name)
        return prepare_data(DataConfig(path=str(file), **settings), tiny_tokenizer, max_length=max_length)

    return run


TEN = [chat(f"question {n}", f"answer {n}") for n in range(10)]


def test_tokens_are_those_of_the_chat_template(tiny_tokenizer):
    split = split_of(tiny_tokenizer, *TEN)

    expected = [tiny_tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"] for messages in TEN]
    assert split.dataset["input_ids"][:] == expected
    assert split.tokens == sum(map(len, expected))
    assert split.longest == max(map(len, expected))


def test_labels_are_the_ids_of_the_answers_and_nothing_elsewhere(tiny_tokenizer):
    split = split_of(tiny_tokenizer, chat("Who?", "Me.", "Why?", "So."))

    row = split.dataset[0]
    assert tiny_tokenizer.decode(learnt(split)) == "Me.<|end|>So.<|end|>"
    assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    assert split.supervised_tokens == len(learnt(split))


def test_more_rows_than_are_tokenized_at_once_come_out_in_order(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("llmkit.data.prepare.TOKENIZED_AT_ONCE", 3)
    split = split_of(tiny_tokenizer, *TEN)

    assert [tiny_tokenizer.decode(learnt(split, row)) for row in range(10)] == [f"answer {n}<|end|>" for n in range(10)]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(contents=st.lists(st.text(max_size=15) | st.sampled_from([" ", "\n\n", "    x"]), min_size=2, max_size=6))
def test_any_conversation_learns_exactly_its_answers_and_their_ends(tiny_tokenizer, contents):
    assume(any(content.strip() for content in contents[1::2]))
    split = split_of(tiny_tokenizer, chat(*contents))

    row = split.dataset[0]
    prompt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORED]
    questions = "".join(f"<|user|>{question}<|end|>" for question in contents[::2])
    assert tiny_tokenizer.decode(learnt(split)) == "".join(f"{answer}<|end|>" for answer in contents[1::2])
    assert tiny_tokenizer.decode(prompt).replace("<|assistant|>", "") == "<|bos|>" + questions


def test_indentation_is_learnt_where_offsets_leave_spaces_out(tiny_tokenizer):
    """Llama 3's and GPT-2's tokenizers do: a token of spaces stands for no characters there."""
    from tokenizers.processors import ByteLevel

    trimming = copy.deepcopy(tiny_tokenizer)
    trimming.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    messages = chat("Code?", "def f():\n    return  1\n")

    assert (2, 2) in trimming("a  b", return_offsets_mapping=True)["offset_mapping"]
    assert learnt(split_of(trimming, messages)) == learnt(split_of(tiny_tokenizer, messages))


@pytest.mark.parametrize("trim", [False, True])
def test_a_token_that_begins_in_the_prompt_is_not_learnt(tiny_tokenizer, trim):
    from tokenizers.processors import ByteLevel

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trim)
    split = split_of(tokenizer, chat("Capital?", "the sea"))

    glued = tokenizer.tokenize(" the")[0]
    assert len(glued) > 1, "the space and the first letter are one token"
    assert tokenizer.decode(learnt(split)) == (" the sea<|end|>")[len(glued) :]


def test_every_kind_of_end_is_known_for_generation_to_stop_at(tiny_tokenizer):
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content + '<|assistant|>' }}"
        "{% else %}{{ m.content + ('<|pad|>' if m.content == 'first' else '<|end|>') }}{% endif %}{% endfor %}"
    )
    split = split_of(tokenizer, chat("a", "first", "b", "last"))

    assert split.end_tokens == {tokenizer.pad_token_id, tokenizer.eos_token_id}


def test_rows_over_the_length_are_counted_and_what_would_help_is_said(tiny_tokenizer):
    with pytest.raises(DataError) as error:
        split_of(tiny_tokenizer, chat("hi", "ho"), chat("hi", "x" * 50), chat("hi", "x" * 90), max_length=20)
    longest = split_of(tiny_tokenizer, chat("hi", "x" * 90)).longest
    message = str(error.value)
    assert message.startswith("2 of 3 rows exceed 20 tokens (the first: chats.jsonl, row 2)")
    assert f"data.max_length={longest}" in message
    assert "data.on_overlong=drop" in message


def test_a_row_of_exactly_the_length_is_taken(tiny_tokenizer):
    longest = split_of(tiny_tokenizer, *TEN).longest

    assert len(split_of(tiny_tokenizer, *TEN, max_length=longest)) == 10


def test_dropped_rows_are_counted_by_reason_and_their_messages_go_too(tiny_tokenizer):
    kept = chat("hi", "ho")
    rows = [chat("hi", "x" * 90), kept, chat("only a question"), chat("x" * 90)]
    split = split_of(tiny_tokenizer, *rows, max_length=20, on_overlong="drop", on_empty="drop")

    assert split.dropped == {"overlong": 2, "empty": 1}
    assert split.messages == [kept]
    assert len(split) == len(split.dataset) == 1


def test_a_row_without_an_answer_is_named_with_its_text(tiny_tokenizer):
    with pytest.raises(DataError, match=r"1 of 2 rows have no answer.*row 2: .*only a question.*data\.on_empty=drop"):
        split_of(tiny_tokenizer, chat("hi", "ho"), chat("only a question"))


def test_dropping_every_row_leaves_nothing(tiny_tokenizer):
    with pytest.raises(DataError, match="all 1 rows are dropped"):
        split_of(tiny_tokenizer, chat("hi", "x" * 90), max_length=20, on_overlong="drop")


def test_a_row_that_the_template_refuses_is_named_with_its_reason(tiny_tokenizer):
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no chats on Sundays') }}"

    with pytest.raises(DataError, match=r"chats\.jsonl, row 1: the chat template refuses it: no chats on Sundays"):
        split_of(tokenizer, chat("hi", "ho"))


def test_a_row_whose_answer_cannot_be_found_is_named(tiny_tokenizer):
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.chat_template = "{{ messages | length }}"

    with pytest.raises(DataError, match=r"chats\.jsonl, row 1: the chat template"):
        split_of(tokenizer, chat("hi", "ho"))


def test_a_share_is_held_out_and_the_two_parts_are_the_whole(prepare):
    data = prepare(*TEN, validation=0.3)

    assert data.validation is not None
    assert 0 < len(data.validation) < 10
    both = data.train.messages + data.validation.messages
    assert sorted(map(json.dumps, both)) == sorted(map(json.dumps, TEN))


def test_no_share_holds_out_nothing(prepare):
    assert prepare(*TEN, validation=None).validation is None


def test_a_file_is_held_out_as_it_is(prepare, chats_file):
    file = chats_file({"messages": TEN[0]}, {"messages": TEN[1]}, name="held_out.jsonl")
    data = prepare(*TEN, validation=str(file))

    assert len(data.train) == 10
    assert data.validation.messages == TEN[:2]


def test_a_held_out_row_stays_held_out_when_others_come_and_go():
    conversations = [chat(f"question {n}", "x") for n in range(400)]
    held_out = {conversations[i][0]["content"] for i in held_out_indices(conversations, 0.2)}
    some = conversations[::-2]

    assert {some[i][0]["content"] for i in held_out_indices(some, 0.2)} == held_out & {c[0]["content"] for c in some}
    assert 50 < len(held_out) < 110


def test_a_larger_share_holds_out_the_same_rows_and_more():
    conversations = [chat(f"question {n}", "x") for n in range(200)]

    assert set(held_out_indices(conversations, 0.1)) < set(held_out_indices(conversations, 0.2))


def test_duplicates_are_on_the_same_side():
    doubled = TEN + TEN
    held_out = held_out_indices(doubled, 0.4)

    assert {i % 10 for i in held_out if i < 10} == {i % 10 for i in held_out if i >= 10}


def test_the_smallest_share_still_holds_out_a_row():
    assert len(held_out_indices(TEN, 1e-9)) == 1


def test_a_share_that_takes_every_row_is_refused(prepare):
    with pytest.raises(DataError, match=r"data\.validation=0\.5 holds out all 3 rows; null"):
        prepare(TEN[0], TEN[0], TEN[0], validation=0.5)


def test_the_fingerprint_is_of_the_content_and_not_of_the_file(prepare):
    first, renamed = prepare(*TEN, validation=0.2), prepare(*TEN, name="other.jsonl", validation=0.2)

    assert first.fingerprint == renamed.fingerprint


@pytest.mark.parametrize(
    "other",
    [
        [*TEN[:9], chat("question 9", "answer 8")],
        [*TEN[:9], chat("question 8", "answer 9")],
        TEN[:9],
        [TEN[1], TEN[0], *TEN[2:]],
    ],
    ids=["an answer", "a question", "a row less", "the order"],
)
def test_the_fingerprint_changes_with(prepare, other):
    assert prepare(*other, validation=None).fingerprint != prepare(*TEN, validation=None).fingerprint


def test_the_fingerprint_changes_with_what_is_learnt(prepare, tiny_tokenizer):
    plain = prepare(*TEN, validation=None).fingerprint
    assert prepare(*TEN, validation=0.2).fingerprint != plain


def test_the_advice_on_rows_that_are_too_long_holds_for_both_splits(prepare, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"messages": chat("q", "a " * 30)}) + "\n")
    conversations = [chat("q", "a " * 60), chat("q", "a")]

    with pytest.raises(DataError, match="2 of 3 rows exceed 20 tokens") as refused:
        prepare(*conversations, validation=str(held_out), max_length=20)

    advised = int(str(refused.value).split("data.max_length=")[1].split()[0])
    assert prepare(*conversations, validation=str(held_out), max_length=advised).train.longest == advised


def test_a_row_whose_answer_is_blank_has_nothing_to_learn(prepare):
    with pytest.raises(DataError, match="1 of 2 rows have no answer to learn from"):
        prepare(chat("q", " "), chat("q", "a"), validation=None)
