"""The demo's preference pairs: a style to prefer that no length gives away, in requests that were never trained."""

import json
import re
from pathlib import Path

import pytest

import llmkit

DEMO = Path(llmkit.__file__).parent / "data" / "demo"
REQUEST = re.compile(r"(?:Can you|Could you|Would you|Please) ([a-z ]+)[?.]")


def rows(part):
    return [json.loads(line) for line in (DEMO / f"preference_{part}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("part", "count"), [("train", 120), ("validation", 40)])
def test_every_row_is_one_request_and_two_short_answers(part, count):
    assert len(rows(part)) == count
    for row in rows(part):
        assert list(row) == ["prompt", "chosen", "rejected"]
        assert REQUEST.fullmatch(row["prompt"])
        assert row["chosen"] != row["rejected"]
        assert all(0 < len(text) <= 80 and text == text.strip() for text in row.values())


def test_no_request_is_made_twice_in_both_parts_together():
    prompts = [row["prompt"] for part in ("train", "validation") for row in rows(part)]

    assert len(prompts) == len(set(prompts))


def test_held_out_tasks_are_not_trained():
    trained, held_out = (
        {REQUEST.fullmatch(row["prompt"])[1] for row in rows(part)} for part in ("train", "validation")
    )

    assert len(held_out) == 10
    assert not trained & held_out


def test_held_out_answers_are_in_the_words_of_trained_ones():
    def styles(part, side):
        return {row[side].replace(REQUEST.fullmatch(row["prompt"])[1], "TASK") for row in rows(part)}

    for side in ("chosen", "rejected"):
        assert styles("validation", side) <= styles("train", side)
    assert not styles("train", "chosen") & styles("train", "rejected")


@pytest.mark.parametrize("part", ["train", "validation"])
def test_the_chosen_answer_is_as_often_the_longer_as_the_shorter_one(tiny_tokenizer, part):
    """A model that knows nothing finds the shorter answer likelier: it then begins at one half."""
    gaps = [len(tiny_tokenizer.encode(r["chosen"])) - len(tiny_tokenizer.encode(r["rejected"])) for r in rows(part)]

    assert sum(gap > 0 for gap in gaps) == sum(gap < 0 for gap in gaps) == len(gaps) / 2
    assert max(map(abs, gaps)) <= 5
