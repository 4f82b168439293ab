"""Pairs in tokens: one prompt, and two completions that each end in a supervised end of turn."""

import copy

import pytest

from llmkit.config.schema import DataConfig
from llmkit.data.prepare import prepare_data
from llmkit.errors import DataError


@pytest.fixture
def prepare(chats_file, tiny_tokenizer):
    """A function: prepare these pairs, written to a file."""

    def run(*pairs, tokenizer=tiny_tokenizer, max_length=2048, **settings):
        rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs]
        data = DataConfig(path=str(chats_file(*rows)), **{"validation": None, **settings})
        return prepare_data(data, tokenizer, max_length=max_length, preference=True)

    return run


PAIRS = [(f"question {n}?", f"right {n}", f"quite wrong {n}") for n in range(10)]


def test_prompt_and_completions_are_what_the_template_writes(prepare, tiny_tokenizer):
    row = prepare(PAIRS[0]).train.dataset[0]

    assert tiny_tokenizer.decode(row["prompt_ids"]) == "<|bos|><|user|>question 0?<|end|><|assistant|>"
    assert tiny_tokenizer.decode(row["chosen_ids"]) == "right 0<|end|>"
    assert tiny_tokenizer.decode(row["rejected_ids"]) == "quite wrong 0<|end|>"


def test_the_ids_are_those_that_trl_prepares(prepare, tiny_tokenizer, tiny_model_dir, tmp_path):
    """TRL's own preparation of the same conversations; the tiny template writes nothing after the end of a turn."""
    import datasets
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    def messages(role, content):
        return [{"role": role, "content": content}]

    rows = [
        {"prompt": messages("user", p), "chosen": messages("assistant", c), "rejected": messages("assistant", r)}
        for p, c, r in PAIRS
    ]
    arguments = DPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_length=None)
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=copy.deepcopy(tiny_tokenizer),
    )
    ours = prepare(*PAIRS).train.dataset
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ours[column][:] == trainer.train_dataset[column][:]


def test_a_token_that_spans_prompt_and_completion_belongs_to_the_completions(prepare, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    row = prepare(("Which?", "the sea", "xyz"), tokenizer=tokenizer).train.dataset[0]

    prompt, chosen, rejected = (tokenizer.decode(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected"))
    assert prompt + chosen == "user: Which?assistant: the sea<|end|>"
    assert prompt + rejected == "user: Which?assistant: xyz<|end|>"
    assert prompt == "user: Which?assistant:"


def test_length_is_of_the_prompt_and_the_longer_completion(prepare):
    split = prepare(PAIRS[0]).train
    row = split.dataset[0]

    assert split.longest == len(row["prompt_ids"]) + len(row["rejected_ids"])
    assert split.supervised_tokens == len(row["chosen_ids"]) + len(row["rejected_ids"])
    with pytest.raises(DataError, match=rf"1 of 1 rows exceed {split.longest - 1} tokens"):
        prepare(PAIRS[0], max_length=split.longest - 1)


@pytest.mark.parametrize("max_length", [30, 45])
def test_a_long_prompt_is_shortened_from_the_front_for_both_sides(prepare, tiny_tokenizer, max_length):
    question = "abcdefghij" * 20 + "?"
    data = prepare((question, "yes", "no no no"), on_overlong="truncate_prompt", max_length=max_length)
    row = data.train.dataset[0]

    assert max_length - 3 <= len(row["prompt_ids"]) + len(row["rejected_ids"]) <= max_length
    asked = tiny_tokenizer.decode(row["prompt_ids"]).removeprefix("<|bos|><|user|>").partition("<|end|>")[0]
    assert question.endswith(asked)
    assert tiny_tokenizer.decode(row["rejected_ids"]) == "no no no<|end|>"
    assert data.audit["sources"][0]["truncated"] == 1


def test_the_demo_has_a_preference_part_with_pairs_held_out(tiny_tokenizer):
    data = prepare_data(DataConfig(path="demo", validation="demo"), tiny_tokenizer, max_length=2048, preference=True)

    assert len(data.train) >= 100
    assert len(data.validation) >= 30
    assert data.audit["splits"]["validation"]["also_in_training"] == 0


def test_pairs_of_one_prompt_are_on_the_same_side(prepare):
    pairs = [(f"question {n}?", f"right {n} {k}", f"wrong {n} {k}") for n in range(20) for k in range(4)]
    data = prepare(*pairs, validation=0.3)

    sides = [
        {pair.prompt[0]["content"] for pair in split.examples(len(split))} for split in (data.train, data.validation)
    ]
    assert len(data.validation) % 4 == 0
    assert not sides[0] & sides[1]


def test_turns_of_others_in_an_answer_are_told(prepare):
    turns = [("assistant", "a"), ("user", "b"), ("assistant", "c")]
    answer = [{"role": role, "content": content} for role, content in turns]
    audit = prepare(([{"role": "user", "content": "q"}], answer, [{"role": "assistant", "content": "d"}])).audit

    assert any("turns of others" in warning for warning in audit["warnings"])
