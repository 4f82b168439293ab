"""An audit as tables, the same for the terminal and the page."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

HISTOGRAMS = (("length", "tokens per row"), ("supervised", "learnt tokens per row"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Texts in columns; those behind the first `left` columns are numbers."""

    title: str
    heading: list[str]
    rows: list[list[str]]
    left: int


def audit_tables(audit: dict[str, Any]) -> Iterator[Table]:
    """Sources, splits and longest rows; columns and lines that would hold nothing but zeros are left out."""
    yield _sources(audit["sources"])
    yield _splits(audit)
    longest = [
        [name, row["place"], f"{row['tokens']:,}"]
        for name, split in audit["splits"].items()
        for row in split["longest"]
    ]
    yield Table(title="longest rows", heading=["split", "row", "tokens"], rows=longest, left=2)


def _sources(sources: list[dict[str, Any]]) -> Table:
    columns = {
        "rows": "rows",
        "examples": "examples",
        "used": "trained on",
        "truncated": "shortened",
        "split": "split",
        "unknown_tokens": "unknown tokens",
        "turns": "answers",
        "turns_without_end": "without end of turn",
    }
    always = ("rows", "used", "turns")
    differ = any(source["rows"] != source["examples"] for source in sources)
    shown = [
        key
        for key in columns
        if key in always or (key == "examples" and differ) or (key != "examples" and any(s[key] for s in sources))
    ]
    rows = [
        [source["name"], source["format"], ", ".join(source["used_for"]), *(_count(source, key) for key in shown)]
        for source in sources
    ]
    heading = ["source", "format", "used for", *(columns[key] for key in shown)]
    return Table(title="sources", heading=heading, rows=rows, left=3)


def _count(source: dict[str, Any], key: str) -> str:
    return "-" if key == "used" and "train" not in source["used_for"] else f"{source[key]:,}"


def _splits(audit: dict[str, Any]) -> Table:
    splits = list(audit["splits"].values())
    rows = [
        ["rows", *(f"{split['rows']:,}" for split in splits)],
        ["  too long", *(f"{split['overlong']:,}" for split in splits)],
        ["  nothing to learn from", *(f"{split['empty']:,}" for split in splits)],
        ["  dropped", *(f"{sum(split['dropped'].values()):,}" for split in splits)],
        ["  repeat another row", *(f"{split['duplicates']:,}" for split in splits)],
        [
            "  also in training",
            *(f"{split['also_in_training']:,}" if "also_in_training" in split else "" for split in splits),
        ],
        ["used", *(f"{split['used']:,}" for split in splits)],
        ["tokens", *(f"{split['tokens']:,}" for split in splits)],
        ["  learnt", *(_learnt(split, audit["preference"]) for split in splits)],
    ]
    for key, words in HISTOGRAMS:
        rows.append([f"{words}: median", *(f"{split[key]['median']:,}" for split in splits)])
        for name in ("min", "p95", "max"):
            rows.append([f"  {name}", *(f"{split[key][name]:,}" for split in splits)])
    kept = [row for row in rows if not row[0].startswith("  ") or set(row[1:]) - {"0", ""} or row[0] == "  min"]
    return Table(title="splits", heading=["", *audit["splits"]], rows=kept, left=1)


def _learnt(split: dict[str, Any], preference: bool) -> str:
    """Of a pair both answers are counted, of its length one: a share would mislead."""
    share = "" if preference or not split["tokens"] else f" ({split['supervised_tokens'] / split['tokens']:.0%})"
    return f"{split['supervised_tokens']:,}{share}"
