"""The audit: every number is that of the data, and what deserves a look is said."""

import copy
import json

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import pack_dataset

from llmkit.config.schema import DataConfig, SourceConfig
from llmkit.data.audit import audit, packed_rows
from llmkit.data.audit_words import MOST_WARNINGS, in_a_line, tell
from llmkit.data.drafts import draft_splits, problems_of
from llmkit.data.prepare import prepare_data


def chat(*contents):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]}


TEN = [chat(f"question {n}", f"answer {n}") for n in range(10)]


@pytest.fixture
def look(tiny_tokenizer):
    """A function: the audit of a data config, by a preview's way."""

    def run(data, *, tokenizer=tiny_tokenizer, max_length=2048, preference=False):
        drafts = draft_splits(data, tokenizer, max_length=max_length, preference=preference)
        problems = problems_of(drafts, data, context_length=None)
        return audit(drafts, tokenizer, data, problems=problems)

    return run


def test_all_keys_are_there_and_all_of_it_is_json(look, chats_file):
    found = look(DataConfig(path=str(chats_file(*TEN)), validation=0.3, packing="bfd"))

    assert json.loads(json.dumps(found)) == found
    whole = ["max_length", "preference", "splits", "packing", "sources", "unseen_tokens", "problems", "warnings"]
    assert list(found) == whole
    common = {"rows", "used", "tokens", "supervised_tokens", "overlong", "empty", "dropped", "duplicates", "longest"}
    common |= {"control_tokens", "control_example", "length", "supervised"}
    assert set(found["splits"]["train"]) == common
    assert set(found["splits"]["validation"]) == {*common, "also_in_training"}
    (source,) = found["sources"]
    assert set(source) == {
        *("name", "format", "used_for", "rows", "examples", "used", "truncated", "split"),
        *("answers_lost", "reasoning_lost", "other_voices", "unknown_tokens", "turns", "turns_without_end"),
    }


def test_tokens_are_those_of_the_prepared_rows(look, chats_file, tiny_tokenizer):
    data = DataConfig(path=str(chats_file(*TEN)), validation=0.3)
    found, prepared = look(data), prepare_data(data, tiny_tokenizer, max_length=2048)

    for name, split in (("train", prepared.train), ("validation", prepared.validation)):
        said = found["splits"][name]
        assert (said["rows"], said["tokens"], said["supervised_tokens"]) == (
            len(split),
            split.tokens,
            split.supervised_tokens,
        )
        assert said["length"]["max"] == said["longest"][0]["tokens"] == split.longest


@given(values=st.lists(st.integers(0, 5000), min_size=1, max_size=300))
def test_a_histogram_counts_every_row_once(values):
    from llmkit.data.audit import _distribution

    found = _distribution(np.array(values))

    edges, counts = found["edges"], found["counts"]
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        assert count == sum(low <= value < high for value in values)
    assert sum(counts) == len(values)
    assert len(counts) <= 20
    assert (found["min"], found["max"]) == (min(values), max(values))


def test_a_special_token_that_somebody_typed_is_counted_and_told_with_its_place(look, chats_file):
    typed = chat("what does <|end|> mean?", "It ends a turn.")
    path = chats_file(*TEN, typed, typed)
    found = look(DataConfig(path=str(path), validation=None))

    train = found["splits"]["train"]
    assert (train["control_tokens"], train["control_example"]) == (2, f"{path}, row 11: '<|end|>'")
    (warning,) = [one for one in found["warnings"] if "special token" in one]
    assert warning.startswith(f"2 of 12 train rows hold a special token in their text (the first: {path}, row 11:")


def test_special_tokens_that_are_meant_to_be_there_are_no_fault(look, chats_file, tiny_tokenizer):
    typed = chat("what does <|end|> mean?", "<MOOD> It ends a turn.")
    path = chats_file(*TEN, typed)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<MOOD>"], special_tokens=True)
    found = look(DataConfig(path=str(path), validation=None, special_tokens=["<MOOD>", "<|end|>"]), tokenizer=tokenizer)

    assert found["splits"]["train"]["control_tokens"] == 0
    assert found["unseen_tokens"] == []


def test_the_control_tokens_of_a_plain_text_are_its_own(look, chats_file):
    path = chats_file({"text": "<|user|>hi<|end|>"}, {"text": "another text"})

    assert look(DataConfig(path=str(path), validation=None))["splits"]["train"]["control_tokens"] == 0


def test_a_special_token_in_one_answer_of_a_pair_is_counted(look, chats_file):
    pairs = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no<|end|>" if n else "no"} for n in range(3)]
    found = look(DataConfig(path=str(chats_file(*pairs)), validation=None), preference=True)

    assert found["splits"]["train"]["control_tokens"] == 2


def test_new_tokens_that_are_in_no_row_are_told(look, chats_file, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<MOOD>", "<TONE>"], special_tokens=True)
    path = chats_file(*TEN, chat("hi", "<MOOD> hello"))
    data = DataConfig(path=str(path), validation=None, special_tokens=["<MOOD>", "<TONE>"])
    for _ in range(2):  # encoded, and found in the cache
        found = look(data, tokenizer=tokenizer)
        assert found["unseen_tokens"] == ["<TONE>"]
        assert "data.special_tokens: in no training row, so nothing is learnt of: '<TONE>'." in found["warnings"]


def test_a_row_that_comes_again_is_a_duplicate_and_the_parts_of_one_row_are_none(look, chats_file):
    long = chat("first question", "first answer", "second question", "second answer")
    path = chats_file(*TEN, TEN[3], TEN[3], long)
    found = look(DataConfig(path=str(path), validation=None, on_overlong="split"), max_length=30)

    assert found["sources"][0]["split"] == 1
    assert found["splits"]["train"]["rows"] == found["sources"][0]["rows"] + 1
    assert found["splits"]["train"]["duplicates"] == 2
    assert found["warnings"] == ["2 of 14 training rows repeat another one."]


def test_the_same_row_in_two_files_is_a_duplicate(look, chats_file, tmp_path):
    chats_file(TEN[0], name="a.jsonl")
    chats_file(TEN[0], name="b.jsonl")

    found = look(DataConfig(path=str(tmp_path / "*.jsonl"), validation=None))
    assert found["splits"]["train"]["duplicates"] == 1


def test_held_out_rows_that_are_trained_on_are_counted(look, chats_file):
    held_out = chats_file(TEN[0], TEN[1], chat("new", "one"), name="held_out.jsonl")
    test = chats_file(TEN[9], name="test.jsonl")
    found = look(DataConfig(path=str(chats_file(*TEN)), validation=str(held_out), test=str(test)))

    assert [split.get("also_in_training") for split in found["splits"].values()] == [None, 2, 1]
    assert [warning[:18] for warning in found["warnings"]] == ["2 of 3 validation ", "1 of 1 test rows a"]


def test_a_share_held_out_is_never_trained_on_even_where_rows_repeat(look, chats_file):
    found = look(DataConfig(path=str(chats_file(*TEN, *TEN)), validation=0.4))

    assert found["splits"]["validation"]["also_in_training"] == 0
    assert sum(split["duplicates"] for split in found["splits"].values()) == 10


def test_each_source_says_how_many_of_its_rows_a_pass_takes(look, chats_file, tiny_tokenizer):
    few = chats_file(*({"question": f"few {n}", "answer": "a"} for n in range(6)), {"question": "q", "answer": " "})
    many = chats_file(*({"question": f"many {n}", "answer": "a"} for n in range(50)), name="many.jsonl")
    sources = [SourceConfig(path=str(few), weight=1, repeat=2), SourceConfig(path=str(many), weight=3)]
    data = DataConfig(datasets=sources, validation=None, on_empty="drop")
    found = look(data)

    assert [(source["rows"], source["used"]) for source in found["sources"]] == [(7, 12), (50, 36)]
    assert found["splits"]["train"]["used"] == len(prepare_data(data, tiny_tokenizer, max_length=2048).train.dataset)


def test_two_splits_of_one_directory_are_two_sources(look, chats_file, tmp_path):
    chats_file(*TEN, name="train.jsonl")
    chats_file(chat("new", "one"), name="test.jsonl")

    found = look(DataConfig(path=str(tmp_path), validation=None, test="test"))
    assert [(source["used_for"], source["rows"], source["used"]) for source in found["sources"]] == [
        (["train"], 10, 10),
        (["test"], 1, 0),
    ]


def test_what_is_dropped_is_counted_and_said(look, chats_file):
    path = chats_file(*TEN, chat("q", " "), chat("q", "word " * 50))
    data = DataConfig(path=str(path), validation=None, on_empty="drop", on_overlong="drop")
    found = look(data, max_length=40)

    train = found["splits"]["train"]
    assert (train["overlong"], train["empty"], train["rows"], train["used"]) == (1, 1, 12, 10)
    assert train["dropped"] == {"overlong": 1, "empty": 1}
    assert found["problems"] == []
    assert found["warnings"] == [
        "2 of 12 train rows are dropped: 1 longer than data.max_length and 1 with nothing to learn from."
    ]


def test_rows_that_stop_training_are_problems_and_not_dropped(look, chats_file):
    found = look(DataConfig(path=str(chats_file(*TEN, chat("q", " "))), validation=None))

    assert found["splits"]["train"]["empty"] == 1
    assert found["splits"]["train"]["dropped"] == {"overlong": 0, "empty": 0}
    assert len(found["problems"]) == 1


def test_shortened_rows_are_counted(look, chats_file):
    path = chats_file(*TEN, chat("word " * 40, "answer"))
    found = look(DataConfig(path=str(path), validation=None, on_overlong="truncate_prompt"), max_length=40)

    assert found["sources"][0]["truncated"] == 1
    assert found["splits"]["train"]["overlong"] == 0
    assert "1 rows shortened" in in_a_line(found)


def test_answers_that_end_in_ordinary_text_are_counted(look, chats_file, tiny_tokenizer):
    open_ended = copy.deepcopy(tiny_tokenizer)
    open_ended.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    data = DataConfig(path=str(chats_file(*TEN)), validation=None)

    (source,) = look(data)["sources"]
    assert (source["turns"], source["turns_without_end"]) == (10, 0)
    found = look(data, tokenizer=open_ended)
    assert (found["sources"][0]["turns"], found["sources"][0]["turns_without_end"]) == (10, 10)
    assert "10 of 10 answers end in ordinary text" in found["warnings"][0]


def test_unknown_tokens_are_counted(look, chats_file):
    words = {word: i for i, word in enumerate(["[UNK]", "[BOS]", "[EOS]", "hello", "you"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}[BOS] {{ m['content'] }} [EOS] {% endfor %}"
        "{% if add_generation_prompt %}[BOS] {% endif %}"
    )
    path = chats_file(chat("hello stranger", "hello you"), chat("hello", "who are you"))

    found = look(DataConfig(path=str(path), validation=None), tokenizer=tokenizer)
    assert found["sources"][0]["unknown_tokens"] == 3
    assert "3 tokens are unknown" in found["warnings"][0]


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=80))
@settings(max_examples=25, deadline=None)
def test_packed_rows_are_as_many_as_trl_makes(lengths):
    rows = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})

    assert packed_rows(np.array(lengths), 50) == len(pack_dataset(rows, 50, "bfd"))


def test_the_packing_of_many_rows_is_that_of_the_prepared_data(look, chats_file, tiny_tokenizer):
    rng = np.random.default_rng(0)
    rows = [chat(f"question {n}", "word " * int(rng.integers(1, 28))) for n in range(1300)]
    data = DataConfig(path=str(chats_file(*rows)), validation=0.1, packing="bfd", num_proc=1)
    prepared = prepare_data(data, tiny_tokenizer, max_length=100)

    packing = look(data, max_length=100)["packing"]
    assert packing["rows"] == len(prepared.train.dataset)
    assert packing["filled"] == round(prepared.train.tokens / (packing["rows"] * 100), 4)


def test_pairs_count_both_answers_as_learnt(look, chats_file, tiny_tokenizer):
    path = chats_file({"prompt": "one?", "chosen": "yes", "rejected": "no, never"})
    data = DataConfig(path=str(path), validation=None)
    found = look(data, preference=True)
    row = prepare_data(data, tiny_tokenizer, max_length=2048, preference=True).train.dataset[0]

    assert found["preference"] is True
    train = found["splits"]["train"]
    assert train["supervised_tokens"] == len(row["chosen_ids"]) + len(row["rejected_ids"])
    assert train["tokens"] == len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def test_a_run_says_one_fact_and_few_warnings(look, chats_file):
    found = look(DataConfig(path=str(chats_file(*TEN)), validation=0.3))
    facts, said = [], []
    tell(found | {"warnings": [str(n) for n in range(9)]}, fact=lambda *pair: facts.append(pair), warn=said.append)

    assert facts == [("audit", "no training row repeated, no held-out row in training")]
    assert said == ["0", "1", "2", "3", "4", "4 more are in data_audit.json."]
    assert MOST_WARNINGS == 5
