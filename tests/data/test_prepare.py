"""What the trainer gets: the template's own tokens, labels inside answers only, and every row accounted for."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmkit.config.schema import DataConfig, SourceConfig
from llmkit.data.drafts import held_out_indices
from llmkit.data.encoding.batches import IGNORED, Notes
from llmkit.data.encoding.chat_text import ChatText
from llmkit.data.encoding.conversations import ConversationEncoder
from llmkit.data.examples import Conversation
from llmkit.data.prepare import prepare_data
from llmkit.data.rows import Row
from llmkit.errors import DataError


def chat(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]


def encode(tokenizer, *conversations, train_on="assistant", on_overlong="error", max_length=2048):
    """The examples that these conversations become: objects with ids, labels, learnt; and the notes."""
    rows = [Row({}, "chats.jsonl", number) for number in range(1, len(conversations) + 1)]
    given = [c if isinstance(c, Conversation) else Conversation(messages=c) for c in conversations]
    encoder = ConversationEncoder(
        ChatText(tokenizer), train_on=train_on, on_overlong=on_overlong, max_length=max_length
    )
    notes = Notes()
    examples = [
        SimpleNamespace(ids=one.ids[0].tolist(), labels=one.ids[1].tolist(), learnt=one.learnt, row=one.row.number)
        for one in encoder.encode(rows, given, notes)
    ]
    return examples, notes


def said(tokenizer, example) -> str:
    """What is learnt of an example, as text."""
    return tokenizer.decode([label for label in example.labels if label != IGNORED])


@pytest.fixture
def prepare(chats_file, tiny_tokenizer):
    """A function: prepare these conversations, written to a file."""

    def run(*conversations, name="chats.jsonl", max_length=2048, context_length=None, **settings):
        file = chats_file(*({"messages": messages} for messages in conversations), name=name)
        data = DataConfig(path=str(file), **{"validation": None, **settings})
        return prepare_data(data, tiny_tokenizer, max_length=max_length, context_length=context_length)

    return run


def messages_of(split):
    return [example.messages for example in split.examples(len(split))]


TEN = [chat(f"question {n}", f"answer {n}") for n in range(10)]


def test_tokens_are_those_of_the_chat_template(prepare, tiny_tokenizer):
    split = prepare(*TEN).train

    expected = [tiny_tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"] for messages in TEN]
    assert split.dataset["input_ids"][:] == expected
    assert split.tokens == sum(map(len, expected))
    assert split.longest == max(map(len, expected))


def test_labels_are_the_ids_of_the_answers_and_nothing_elsewhere(prepare, tiny_tokenizer):
    split = prepare(chat("Who?", "Me.", "Why?", "So.")).train

    row = split.dataset[0]
    learnt = [label for label in row["labels"] if label != IGNORED]
    assert tiny_tokenizer.decode(learnt) == "Me.<|end|>So.<|end|>"
    assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    assert split.supervised_tokens == len(learnt)


@pytest.mark.parametrize("processes", [1, 2])
def test_many_blocks_come_out_in_order_as_if_encoded_one_by_one(prepare, tiny_tokenizer, monkeypatch, processes):
    monkeypatch.setattr("llmkit.data.reading.blocks.BLOCK_ROWS", 3)
    split = prepare(*TEN, num_proc=processes).train

    assert split.dataset["input_ids"][:] == [
        tiny_tokenizer(tiny_tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)[
            "input_ids"
        ]
        for messages in TEN
    ]
    assert messages_of(split) == TEN


@settings(max_examples=50, deadline=None, derandomize=True)
@given(contents=st.lists(st.text(max_size=15) | st.sampled_from([" ", "\n\n", "    x"]), min_size=2, max_size=6))
def test_any_conversation_learns_exactly_its_answers_and_their_ends(tiny_tokenizer, contents):
    assume(any(content.strip() for content in contents[1::2]))
    (example,), _ = encode(tiny_tokenizer, chat(*contents))

    prompt = [token for token, label in zip(example.ids, example.labels, strict=True) if label == IGNORED]
    questions = "".join(f"<|user|>{question}<|end|>" for question in contents[::2])
    assert said(tiny_tokenizer, example) == "".join(f"{answer}<|end|>" for answer in contents[1::2])
    assert tiny_tokenizer.decode(prompt).replace("<|assistant|>", "") == "<|bos|>" + questions


def test_indentation_is_learnt_where_offsets_leave_spaces_out(tiny_tokenizer):
    """Llama 3's and GPT-2's tokenizers do: a token of spaces stands for no characters there."""
    from tokenizers.processors import ByteLevel

    trimming = copy.deepcopy(tiny_tokenizer)
    trimming.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    messages = chat("Code?", "def f():\n    return  1\n")

    assert (2, 2) in trimming("a  b", return_offsets_mapping=True)["offset_mapping"]
    assert encode(trimming, messages)[0][0].labels == encode(tiny_tokenizer, messages)[0][0].labels


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    contents=st.lists(st.text("ab \n\té🎉", max_size=12), min_size=2, max_size=4), trim=st.booleans(),
)  # fmt: skip
def test_the_labels_are_those_that_a_look_at_every_offset_gives(tiny_tokenizer, contents, trim):
    from tokenizers.processors import ByteLevel

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trim)
    chats = ChatText(tokenizer)
    messages = chat(*contents)
    (example,), _ = encode(tokenizer, messages)
    (text,) = chats.texts([(Row({}, "", 0), Conversation(messages=messages))])
    offsets = np.asarray(chats.encode([text])[0].offsets)

    begins = np.minimum(offsets[:, 0], np.append(0, offsets[:, 1])[: len(offsets)])
    learnt = np.zeros(len(offsets), dtype=bool)
    for start, end in chats.finder.spans(messages, text):
        learnt |= (begins >= start) & (begins < end)
    assert example.labels == np.where(learnt, example.ids, IGNORED).tolist()


@pytest.mark.parametrize("trim", [False, True])
def test_a_token_that_begins_in_the_prompt_is_not_learnt(tiny_tokenizer, trim):
    from tokenizers.processors import ByteLevel

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trim)
    (example,), _ = encode(tokenizer, chat("Capital?", "the sea"))

    glued = tokenizer.tokenize(" the")[0]
    assert len(glued) > 1, "the space and the first letter are one token"
    assert said(tokenizer, example) == (" the sea<|end|>")[len(glued) :]


def test_every_kind_of_end_is_known_for_generation_to_stop_at(tiny_tokenizer):
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content + '<|assistant|>' }}"
        "{% else %}{{ m.content + ('<|pad|>' if m.content == 'first' else '<|end|>') }}{% endif %}{% endfor %}"
    )
    _, notes = encode(tokenizer, chat("a", "first", "b", "last"))

    assert notes.end_tokens == {tokenizer.pad_token_id: 1, tokenizer.eos_token_id: 1}


THREE = chat("q1", "one", "q2", "two", "q3", "three")
AGENT = [
    *chat("q1", "one", "q2"),
    {"role": "assistant", "content": "a call"},
    {"role": "user", "content": "its result"},
    {"role": "assistant", "content": "two"},
]


@pytest.mark.parametrize(
    ("train_on", "conversation", "expected"),
    [
        ("assistant", THREE, "one<|end|>two<|end|>three<|end|>"),
        ("last", THREE, "three<|end|>"),
        ("completion", THREE, "three<|end|>"),
        ("completion", Conversation(messages=THREE, prompt_turns=3), "two<|end|>three<|end|>"),
        ("assistant", Conversation(messages=THREE, learnt=[True, False, True, True, True, False]), "two<|end|>"),
        ("last", [*THREE, {"role": "user", "content": "more?"}], "three<|end|>"),
        (
            "all",
            chat("q", "a"),
            "<|bos|><|user|>q<|end|><|assistant|>a<|end|>",
        ),
        (
            "all",
            Conversation(messages=THREE[:4], learnt=[True, False, True, True]),
            "<|bos|><|user|>q1<|end|><|assistant|><|user|>q2<|end|><|assistant|>two<|end|>",
        ),
    ],
)
def test_what_is_learnt_is_chosen(tiny_tokenizer, train_on, conversation, expected):
    (example,), _ = encode(tiny_tokenizer, conversation, train_on=train_on)

    assert said(tiny_tokenizer, example) == expected


def test_plain_text_is_learnt_whole_and_ends(tiny_tokenizer):
    (example,), _ = encode(tiny_tokenizer, Conversation(messages=[], text="Once upon a time."))

    assert tiny_tokenizer.decode(example.ids).removeprefix("<|bos|>") == "Once upon a time.<|end|>"
    assert example.labels == example.ids


def test_a_long_conversation_loses_its_oldest_turns_and_keeps_the_system_prompt(tiny_tokenizer):
    messages = [{"role": "system", "content": "sys"}, *THREE]
    (whole,), _ = encode(tiny_tokenizer, messages)
    (example,), notes = encode(tiny_tokenizer, messages, on_overlong="truncate_prompt", max_length=len(whole.ids) - 1)

    assert tiny_tokenizer.decode(example.ids).startswith("<|bos|><|system|>sys<|end|><|user|>q2")
    assert said(tiny_tokenizer, example) == "two<|end|>three<|end|>"
    assert notes.truncated == 1


@pytest.mark.parametrize("max_length", [30, 40, 60])
def test_a_long_question_loses_its_beginning_only_as_far_as_needed(tiny_tokenizer, max_length):
    question = "abcdefghij" * 20 + "?"
    (example,), notes = encode(
        tiny_tokenizer, chat(question, "answer"), on_overlong="truncate_prompt", max_length=max_length
    )

    text = tiny_tokenizer.decode(example.ids)
    assert max_length - 3 <= len(example.ids) <= max_length
    assert said(tiny_tokenizer, example) == "answer<|end|>"
    assert text.startswith("<|bos|><|user|>")
    assert question.endswith(text.partition("<|user|>")[2].partition("<|end|>")[0])
    assert notes.truncated == 1


@pytest.mark.parametrize("on_overlong", ["truncate_prompt", "split"])
def test_an_answer_that_is_too_long_alone_is_never_cut(tiny_tokenizer, on_overlong):
    (example,), notes = encode(tiny_tokenizer, chat("q", "z" * 90), on_overlong=on_overlong, max_length=20)

    assert len(example.ids) > 20
    assert said(tiny_tokenizer, example) == "z" * 90 + "<|end|>"
    assert (notes.truncated, notes.split) == (0, 0)


def test_a_long_conversation_is_split_at_turns_with_the_system_prompt_in_each_part(tiny_tokenizer):
    messages = [{"role": "system", "content": "sys"}, *THREE]
    (whole,), _ = encode(tiny_tokenizer, messages)
    parts, notes = encode(tiny_tokenizer, messages, on_overlong="split", max_length=len(whole.ids) - 1)

    assert [said(tiny_tokenizer, part) for part in parts] == ["one<|end|>two<|end|>", "three<|end|>"]
    assert all(tiny_tokenizer.decode(part.ids).startswith("<|bos|><|system|>sys<|end|><|user|>q") for part in parts)
    assert notes.split == 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    turns=st.lists(
        st.tuples(st.text("ab ", max_size=20), st.text("xy ", min_size=1, max_size=20)), min_size=1, max_size=6
    ),
    max_length=st.integers(12, 90),
    train_on=st.sampled_from(["assistant", "last"]),
)
def test_splitting_learns_every_answer_once_and_cuts_none(tiny_tokenizer, turns, max_length, train_on):
    messages = chat(*(content for turn in turns for content in turn))
    (whole,), _ = encode(tiny_tokenizer, messages, train_on=train_on)
    parts, _ = encode(tiny_tokenizer, messages, train_on=train_on, on_overlong="split", max_length=max_length)

    assert "".join(said(tiny_tokenizer, part) for part in parts) == said(tiny_tokenizer, whole)
    assert len(parts) == 1 or all(len(part.ids) <= max_length for part in parts)


def test_long_plain_text_is_split_at_the_length(tiny_tokenizer):
    text = "word " * 50
    (whole,), _ = encode(tiny_tokenizer, Conversation(messages=[], text=text))
    parts, _ = encode(tiny_tokenizer, Conversation(messages=[], text=text), on_overlong="split", max_length=16)

    assert [token for part in parts for token in part.ids] == whole.ids
    assert all(len(part.ids) == 16 for part in parts[:-1])


def test_the_last_part_of_a_plain_text_is_never_a_token_that_nothing_predicts(tiny_tokenizer):
    text = Conversation(messages=[], text="word " * 50)
    (whole,), _ = encode(tiny_tokenizer, text)
    for max_length in range(8, len(whole.ids) + 1):
        parts, _ = encode(tiny_tokenizer, text, on_overlong="split", max_length=max_length)
        assert [token for part in parts for token in part.ids] == whole.ids
        assert [part.learnt for part in parts] == [len(part.ids) - 1 for part in parts]
        assert all(1 < len(part.ids) <= max_length for part in parts)


def test_the_parts_of_a_row_share_its_number_and_equal_rows_of_two_files_do_not(chats_file, tiny_tokenizer):
    long = [message for n in range(6) for message in chat(f"question {n}", f"answer {n}")]
    for name in ("a.jsonl", "b.jsonl"):
        file = chats_file({"messages": long}, {"messages": chat("hi", "ho")}, name=name)
    data = DataConfig(path=str(file.with_name("*.jsonl")), validation=None, on_overlong="split")
    train = prepare_data(data, tiny_tokenizer, max_length=40).train

    parts = [sum("question" in row for row in train.rows["example"]) // 2, 1]
    assert parts[0] > 1
    assert train.origins.tolist() == np.repeat([0, 1, 2, 3], parts * 2).tolist()


def test_rows_over_the_length_are_counted_and_what_would_help_is_said(prepare):
    with pytest.raises(DataError) as error:
        prepare(chat("hi", "ho"), chat("hi", "x" * 50), chat("hi", "x" * 90), max_length=20)
    longest = prepare(chat("hi", "x" * 90)).train.longest
    message = str(error.value)
    assert message.startswith("2 of 3 rows exceed 20 tokens (the first: ")
    assert "chats.jsonl, row 2)" in message
    assert f"data.max_length={longest}" in message
    assert "data.on_overlong=drop" in message


def test_a_length_that_the_model_cannot_take_is_not_advised(prepare):
    with pytest.raises(DataError) as error:
        prepare(chat("hi", "x" * 90), max_length=20, context_length=50)
    assert "data.max_length=" not in str(error.value)
    assert "the model takes 50" in str(error.value)


def test_a_row_of_exactly_the_length_is_taken(prepare):
    longest = prepare(*TEN).train.longest

    assert len(prepare(*TEN, max_length=longest).train) == 10


def test_dropped_rows_are_counted_by_reason(prepare):
    kept = chat("hi", "ho")
    rows = [chat("hi", "x" * 90), kept, chat("only a question"), chat("x" * 90)]
    split = prepare(*rows, max_length=20, on_overlong="drop", on_empty="drop").train

    assert split.dropped == {"overlong": 2, "empty": 1}
    assert messages_of(split) == [kept]
    assert len(split) == len(split.dataset) == 1


def test_a_row_without_an_answer_is_named_with_its_text(prepare):
    with pytest.raises(DataError, match=r"1 of 2 rows have nothing.*row 2: .*only a question.*data\.on_empty=drop"):
        prepare(chat("hi", "ho"), chat("only a question"))


def test_dropping_every_row_leaves_nothing(prepare):
    with pytest.raises(DataError, match="all 1 rows are dropped"):
        prepare(chat("hi", "x" * 90), max_length=20, on_overlong="drop")


def test_a_row_that_the_template_refuses_is_named_with_its_reason(tiny_tokenizer):
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages if m.content == 'Sunday' %}{{ raise_exception('no chats on Sundays') }}{% endfor %}"
        + str(tokenizer.chat_template)
    )

    with pytest.raises(DataError, match=r"chats\.jsonl, row 2: the chat template refuses it: no chats on Sundays"):
        encode(tokenizer, chat("hi", "ho"), chat("Sunday", "ho"))


def test_a_row_whose_answer_cannot_be_found_is_named(tiny_tokenizer):
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.chat_template = "{{ messages | length }}"

    with pytest.raises(DataError, match=r"chats\.jsonl, row 1: the chat template"):
        encode(tokenizer, chat("hi", "ho"))


def test_a_share_is_held_out_and_the_two_parts_are_the_whole(prepare):
    data = prepare(*TEN, validation=0.3)

    assert data.validation is not None
    assert 0 < len(data.validation) < 10
    both = messages_of(data.train) + messages_of(data.validation)
    assert sorted(map(json.dumps, both)) == sorted(map(json.dumps, TEN))


def test_no_share_holds_out_nothing(prepare):
    assert prepare(*TEN).validation is None


def test_files_are_held_out_and_tested_on_as_they_are(prepare, chats_file):
    held_out = chats_file({"messages": TEN[0]}, {"messages": TEN[1]}, name="held_out.jsonl")
    test = chats_file({"messages": TEN[2]}, name="test.jsonl")
    data = prepare(*TEN, validation=str(held_out), test=str(test))

    assert len(data.train) == 10
    assert messages_of(data.validation) == TEN[:2]
    assert messages_of(data.test) == [TEN[2]]


HASHES = np.random.default_rng(0).integers(0, 2**64, 400, dtype=np.uint64)


def test_a_held_out_row_stays_held_out_when_others_come_and_go():
    held_out = set(HASHES[held_out_indices(HASHES, 0.2)])
    some = HASHES[::-2]

    assert set(some[held_out_indices(some, 0.2)]) == held_out & set(some)
    assert 50 < len(held_out) < 110


def test_a_larger_share_holds_out_the_same_rows_and_more():
    assert set(held_out_indices(HASHES, 0.1)) < set(held_out_indices(HASHES, 0.2))


def test_duplicates_are_on_the_same_side(prepare):
    data = prepare(*TEN, *TEN, validation=0.4)

    sides = [{json.dumps(messages) for messages in messages_of(split)} for split in (data.train, data.validation)]
    assert not sides[0] & sides[1]
    assert len(data.train) + len(data.validation) == 20


def test_the_parts_of_a_split_row_are_on_the_same_side(prepare):
    long = [chat(*(f"{turn} of {n}" for turn in range(8))) for n in range(12)]
    data = prepare(*long, validation=0.4, on_overlong="split", max_length=40)

    sides = [{m[0]["content"].split()[-1] for m in messages_of(split)} for split in (data.train, data.validation)]
    assert len(data.train) + len(data.validation) > 12
    assert not sides[0] & sides[1]


def test_the_smallest_share_still_holds_out_a_row():
    assert len(held_out_indices(HASHES, 1e-9)) == 1


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
    assert prepare(*other).fingerprint != prepare(*TEN).fingerprint


def test_the_fingerprint_changes_with_what_is_learnt(prepare):
    assert prepare(*TEN, validation=0.2).fingerprint != prepare(*TEN).fingerprint
    assert prepare(THREE, train_on="last").fingerprint != prepare(THREE).fingerprint


def test_the_advice_on_rows_that_are_too_long_holds_for_both_splits(prepare, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"messages": chat("q", "a " * 30)}) + "\n")
    conversations = [chat("q", "a " * 60), chat("q", "a")]

    with pytest.raises(DataError, match="2 of 3 rows exceed 20 tokens") as refused:
        prepare(*conversations, validation=str(held_out), max_length=20)

    advised = int(str(refused.value).split("data.max_length=")[1].split()[0])
    assert prepare(*conversations, validation=str(held_out), max_length=advised).train.longest == advised


def test_a_row_whose_answer_is_blank_has_nothing_to_learn(prepare):
    with pytest.raises(DataError, match="1 of 2 rows have nothing to learn from"):
        prepare(chat("q", " "), chat("q", "a"))


def test_several_sources_are_put_together_each_in_its_own_format(chats_file, tiny_tokenizer):
    chats = chats_file(*({"messages": messages} for messages in TEN), name="chats.jsonl")
    pairs = chats_file(*({"question": f"q {n}", "answer": f"a {n}"} for n in range(4)), name="pairs.jsonl")
    sources = [SourceConfig(path=str(chats), limit=3), SourceConfig(path=str(pairs), repeat=2)]
    data = prepare_data(DataConfig(datasets=sources, validation=None), tiny_tokenizer, max_length=2048)

    assert messages_of(data.train) == [*TEN[:3], *[chat(f"q {n}", f"a {n}") for n in range(4)] * 2]
    assert [source["format"] for source in data.audit["sources"]] == ["messages", "question_answer"]


def test_weights_are_shares_of_the_rows_and_no_row_comes_twice(chats_file, tiny_tokenizer):
    few = chats_file(*({"question": f"few {n}", "answer": "a"} for n in range(6)), name="few.jsonl")
    many = chats_file(*({"question": f"many {n}", "answer": "a"} for n in range(50)), name="many.jsonl")
    sources = [SourceConfig(path=str(few), weight=1), SourceConfig(path=str(many), weight=3)]
    data = prepare_data(DataConfig(datasets=sources, validation=None), tiny_tokenizer, max_length=2048)

    asked = [messages[0]["content"] for messages in messages_of(data.train)]
    assert len(set(asked)) == len(asked) == 24
    assert sum(one.startswith("few") for one in asked) == 6


def test_the_audit_counts_what_deserves_a_look(prepare, chats_file):
    held_out = chats_file({"messages": TEN[0]}, {"messages": chat("new", "one")}, name="held_out.jsonl")
    audit = prepare(*TEN, TEN[3], validation=str(held_out)).audit

    train, validation = audit["splits"]["train"], audit["splits"]["validation"]
    assert (train["rows"], train["duplicates"], validation["also_in_training"]) == (11, 1, 1)
    assert sum(train["length"]["counts"]) == 11
    assert train["longest"][0]["tokens"] == train["length"]["max"]
    assert [warning.split()[0] for warning in audit["warnings"]] == ["1", "1"]


def test_reasoning_that_the_template_leaves_out_is_counted(tiny_tokenizer):
    lost = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "hm, well"}]
    _, notes = encode(tiny_tokenizer, lost, chat("q", "a"))

    assert notes.reasoning_lost == 1


def test_a_turn_left_out_that_is_no_answer_does_not_go_with_learning_all(tiny_tokenizer):
    with pytest.raises(DataError, match=r"row 1: leaves a turn of the user out.*data\.train_on=assistant"):
        encode(tiny_tokenizer, Conversation(messages=chat("q", "a"), learnt=[False, True]), train_on="all")


def test_parts_of_a_long_text_hold_their_own_characters_only(tiny_tokenizer):
    text = "".join(f"word{n} " for n in range(200))
    rows = [Row({}, "book.jsonl", 1)]
    encoder = ConversationEncoder(ChatText(tiny_tokenizer), train_on="assistant", on_overlong="split", max_length=32)
    parts = encoder.encode(rows, [Conversation(messages=[], text=text)], Notes())

    held = [json.loads(part.example)["text"] for part in parts]
    assert text in "".join(held)
    assert max(map(len, held)) < len(text) / 10


def test_learning_all_keeps_parts_without_an_answer(tiny_tokenizer):
    messages = [*THREE, {"role": "user", "content": "more " * 8}]
    (whole,), _ = encode(tiny_tokenizer, messages, train_on="all")
    parts, _ = encode(tiny_tokenizer, messages, train_on="all", on_overlong="split", max_length=len(whole.ids) // 2 + 8)

    assert "more more" in "".join(tiny_tokenizer.decode(part.ids) for part in parts)
    assert all(part.learnt == len(part.ids) - 1 for part in parts)  # nothing predicts the first token


def test_answers_lost_with_the_beginning_of_a_row_are_counted(tiny_tokenizer):
    (whole,), _ = encode(tiny_tokenizer, THREE)
    _, notes = encode(tiny_tokenizer, THREE, on_overlong="truncate_prompt", max_length=len(whole.ids) - 1)

    assert notes.answers_lost == 1


def test_a_weighted_source_without_rows_is_named(chats_file, tiny_tokenizer):
    long = chats_file({"question": "q", "answer": "a " * 90}, name="long.jsonl")
    short = chats_file(*({"question": f"q {n}", "answer": "a"} for n in range(5)), name="short.jsonl")
    sources = [SourceConfig(path=str(long), weight=1), SourceConfig(path=str(short), weight=1)]
    data = DataConfig(datasets=sources, validation=None, on_overlong="drop")

    with pytest.raises(DataError, match=r"long\.jsonl: has a weight, but none of its rows is left"):
        prepare_data(data, tiny_tokenizer, max_length=30)


def test_no_row_comes_a_second_time_before_all_have_come_once(chats_file, tiny_tokenizer):
    few = chats_file(*({"question": f"few {n}", "answer": "a"} for n in range(30)), name="few.jsonl")
    others = chats_file(*({"question": f"other {n}", "answer": "a"} for n in range(40)), name="others.jsonl")
    sources = [SourceConfig(path=str(few), weight=1, repeat=3), SourceConfig(path=str(others), weight=1)]
    data = prepare_data(DataConfig(datasets=sources, validation=None), tiny_tokenizer, max_length=64)

    asked = [messages[0]["content"] for messages in messages_of(data.train) if "few" in messages[0]["content"]]
    assert len(asked) == 40
    assert len(set(asked)) == 30
