"""The shipped demo set: valid rows, and a held-out part that asks for trained facts in phrasings trained for others."""

import json
import re
from pathlib import Path

import pytest

import llmkit

DEMO = Path(llmkit.__file__).parent / "data" / "demo"

# What is asked, and of whom: every question of the held-out part matches exactly one of these.
PHRASINGS = {
    "capital": [
        r"What is the capital of (.+)\?",
        r"Which city is the capital of (.+)\?",
        r"Name the capital city of (.+)\.",
        r"The capital of (.+) is which city\?",
        r"Tell me the capital of (.+), please\.",
    ],
    "symbol": [
        r"What is the chemical symbol of (.+)\?",
        r"Which symbol stands for (.+)\?",
        r"Write the chemical symbol for (.+)\.",
        r"Tell me the symbol of (.+), please\.",
    ],
}


def rows(part: str) -> list[dict]:
    return [json.loads(line) for line in (DEMO / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def pairs(part: str) -> list[tuple[str, str]]:
    """The part as (question, answer) pairs."""
    return [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows(part)]


def ask(question: str) -> tuple[str, str, str] | None:
    """The question as (relation, subject, phrasing), or None if it is not about a capital or a symbol."""
    for relation, patterns in PHRASINGS.items():
        for pattern in patterns:
            if match := re.fullmatch(pattern, question):
                return relation, match[1], pattern
    return None


@pytest.mark.parametrize(("part", "smallest", "largest"), [("train", 120, 160), ("validation", 30, 40)])
def test_every_row_is_one_question_and_one_short_answer(part, smallest, largest):
    assert smallest <= len(rows(part)) <= largest
    for row in rows(part):
        assert list(row) == ["messages"]
        assert [list(turn) for turn in row["messages"]] == [["role", "content"]] * 2
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        for turn in row["messages"]:
            assert 0 < len(turn["content"]) <= 80
            assert turn["content"] == turn["content"].strip()


def test_no_question_is_asked_twice_in_both_parts_together():
    questions = [question.casefold() for part in ("train", "validation") for question, _ in pairs(part)]
    assert len(questions) == len(set(questions))


def test_every_held_out_fact_is_trained_with_the_same_answer():
    trained = {(*asked[:2], answer) for question, answer in pairs("train") if (asked := ask(question))}
    for question, answer in pairs("validation"):
        asked = ask(question)
        assert asked is not None, question
        assert (*asked[:2], answer) in trained


def test_every_held_out_phrasing_is_trained_for_other_facts_but_not_for_this_one():
    trained = [asked for question, _ in pairs("train") if (asked := ask(question))]
    for question, _ in pairs("validation"):
        relation, subject, phrasing = ask(question) or ("", "", "")
        assert (relation, subject, phrasing) not in trained
        assert any(other[2] == phrasing for other in trained)


def test_each_fact_has_one_answer_everywhere():
    answers: dict[tuple[str, str], set[str]] = {}
    for part in ("train", "validation"):
        for question, answer in pairs(part):
            if asked := ask(question):
                answers.setdefault(asked[:2], set()).add(answer)
    assert len(answers) == 36
    assert all(len(found) == 1 for found in answers.values())


def test_the_demo_model_can_say_who_it_is():
    assert "llmkit" in dict(pairs("train"))["Who are you?"]
