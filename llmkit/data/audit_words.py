"""What the numbers of an audit mean, in words: the warnings, and what a run says of its data."""

from collections.abc import Callable
from typing import Any

WHY_DROPPED = (("overlong", "longer than data.max_length"), ("empty", "with nothing to learn from"))
# Counts of a source, in words.
WORTH_A_LOOK = (
    ("answers_lost", "answers are gone with the beginnings of rows that data.on_overlong=truncate_prompt shortened."),
    ("reasoning_lost", "rows lose the reasoning of their last answer: the chat template does not write it."),
    ("other_voices", "pairs hold turns of others in their answers, which are compared as if the model said them."),
)
MOST_WARNINGS = 5  # that a run shows; data_audit.json holds them all


def warnings_of(
    splits: dict[str, dict[str, Any]], sources: list[dict[str, Any]], *, train_on: str, unseen_tokens: list[str]
) -> list[str]:
    """What deserves a look, each in a sentence: most begin with a count or a source."""
    found = []
    for name, split in splits.items():
        if count := split["control_tokens"]:
            found.append(
                f"{count:,} of {split['rows']:,} {name} rows hold a special token in their text (the first: "
                f"{split['control_example']}), which the model is shown as the token itself: take it out of the rows, "
                "or name it in data.special_tokens if it is meant."
            )
    if unseen_tokens:
        named = ", ".join(map(repr, unseen_tokens))
        found.append(f"data.special_tokens: in no training row, so nothing is learnt of: {named}.")
    for name, split in splits.items():
        if leaked := split.get("also_in_training", 0):
            found.append(
                f"{leaked:,} of {split['rows']:,} {name} rows are in the training data too: memory is measured there."
            )
    if duplicates := splits["train"]["duplicates"]:
        found.append(f"{duplicates:,} of {splits['train']['rows']:,} training rows repeat another one.")
    for name, split in splits.items():
        reasons = [f"{split['dropped'][kind]:,} {words}" for kind, words in WHY_DROPPED if split["dropped"][kind]]
        if reasons:
            dropped = sum(split["dropped"].values())
            found.append(f"{dropped:,} of {split['rows']:,} {name} rows are dropped: {' and '.join(reasons)}.")
    for source in sources:
        for key, words in WORTH_A_LOOK:
            if source[key]:
                found.append(f"{source['name']}: {source[key]:,} {words}")
        if source["format"] == "text" and train_on != "assistant":
            found.append(
                f"{source['name']}: data.train_on={train_on} has no effect on plain text, which is learnt whole."
            )
        if source["unknown_tokens"]:
            found.append(f"{source['name']}: {source['unknown_tokens']:,} tokens are unknown to the tokenizer.")
        if missing := source["turns_without_end"]:
            found.append(
                f"{source['name']}: {missing:,} of {source['turns']:,} answers end in ordinary text, not in an "
                "end-of-turn token: the model does not learn to stop there. The chat template should close the "
                "assistant's turn."
            )
    return found


def tell(audit: dict[str, Any], *, fact: Callable[[str, str], None], warn: Callable[[str], None]) -> None:
    """Say what a run should say of its audit: one fact, and the warnings, few of them.

    Args:
        fact: takes a name and what it is, as RunConsole.fact does.
        warn: takes a warning.
    """
    fact("audit", in_a_line(audit))
    warnings = audit["warnings"]
    for warning in warnings[:MOST_WARNINGS]:
        warn(warning)
    if len(warnings) > MOST_WARNINGS:
        warn(f"{len(warnings) - MOST_WARNINGS} more are in data_audit.json.")


def in_a_line(audit: dict[str, Any]) -> str:
    """The audit's findings beside the number of rows and tokens, in a line."""
    train, sources = audit["splits"]["train"], audit["sources"]
    parts = [f"{train['duplicates']:,} training rows repeated" if train["duplicates"] else "no training row repeated"]
    held_out = [split for name, split in audit["splits"].items() if name != "train"]
    if held_out:
        leaked = sum(split["also_in_training"] for split in held_out)
        parts.append(f"{leaked:,} held-out rows also in training" if leaked else "no held-out row in training")
    for kind, words in (("truncated", "rows shortened"), ("split", "rows split")):
        if count := sum(source[kind] for source in sources):
            parts.append(f"{count:,} {words}")
    if audit["packing"]:
        parts.append(packing_in_words(audit))
    return ", ".join(parts)


def packing_in_words(audit: dict[str, Any]) -> str:
    """`packed rows: 123 of 2,048 tokens, 97.3% filled`."""
    packing = audit["packing"]
    return f"packed rows: {packing['rows']:,} of {audit['max_length']:,} tokens, {packing['filled']:.1%} filled"
