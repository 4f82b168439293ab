"""Every layout of a row becomes one internal form; docs/data.md shows each of them.

`detect_format` or `check_format` looks at the first row of a source, once; `convert` takes blocks of its rows, in any
process.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from llmkit.data.examples import Example
from llmkit.data.formats import chat
from llmkit.data.formats import preference as pairs
from llmkit.data.formats.columns import Misfit, Values, shown
from llmkit.data.formats.role_markers import begins_with_marker, from_role_markers
from llmkit.data.rows import Row
from llmkit.errors import DataError, did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A layout: the columns it must have and may have, and how such a row becomes an example."""

    columns: tuple[str, ...]
    optional: tuple[str, ...] = ("system", "tools")
    read: Callable[[Values], Example]  # raises Misfit
    preference: bool = False
    likely: Callable[[Values], bool] = lambda values: True  # where the columns alone could mean another format

    def fits(self, values: Values) -> bool:
        """Whether a row of these columns is likely to be meant so."""
        return all(values.get(column) is not None for column in self.columns) and self.likely(values)


def _holds(*columns: str) -> Callable[[Values], bool]:
    return lambda values: all(values.get(column) is not None for column in columns)


# Detection takes the first that fits.
FORMATS = {
    "messages": Format(columns=("messages",), read=chat.from_messages),
    "sharegpt": Format(
        columns=("conversations",),
        read=chat.from_sharegpt,
        likely=lambda values: not _holds("chosen", "rejected")(values),
    ),
    "prompt_completion": Format(columns=("prompt", "completion"), read=chat.from_prompt_completion),
    "alpaca": Format(
        columns=("instruction", "output"), optional=("input", "history", "system", "tools"), read=chat.from_alpaca
    ),
    "question_answer": Format(columns=("question", "answer"), read=chat.from_question_answer),
    "role_markers": Format(columns=("input",), read=from_role_markers, likely=begins_with_marker),
    "text": Format(columns=("text",), optional=(), read=chat.from_text),
    "preference_messages": Format(
        columns=("chosen_messages", "rejected_messages"),
        optional=("prompt_messages", "system", "tools"),
        read=pairs.from_preference_messages,
        preference=True,
    ),
    "preference": Format(
        columns=("chosen", "rejected"),
        optional=("prompt", "system", "tools"),
        read=pairs.from_preference,
        preference=True,
        likely=lambda values: _holds("prompt")(values) or not _holds("conversations")(values),
    ),
    "preference_sharegpt": Format(
        columns=("conversations", "chosen", "rejected"), read=pairs.from_preference_sharegpt, preference=True
    ),
}
# Every row may have these: `id` is named in messages, `dataset` says where a row came from.
LABELS = ("id", "dataset")
# Left unread, these would change what is learnt without a word.
UNREAD = {
    "images": "llmkit trains on text only",
    "audios": "llmkit trains on text only",
    "videos": "llmkit trains on text only",
    "chat_template_kwargs": "llmkit renders every row with data.chat_template_kwargs; split the rows into several runs",
}


def detect_format(row: Row, columns: Mapping[str, str], *, preference: bool) -> str:
    """The format that fits the columns of `row`, once `columns` ({OURS: THEIRS}) has renamed them.

    Only the formats of preference data are tried where `preference` is true, else only the others. Raises DataError if
    none fits, and for an entry of `columns` that has no place in the row or in the format.
    """
    values = _renamed(row.values, columns)
    kind = {name: layout for name, layout in FORMATS.items() if layout.preference == preference}
    found = next((name for name, layout in kind.items() if layout.fits(values)), None)
    if found is not None:
        check_format(row, found, columns, preference=preference)
        return found
    _check_theirs(row, columns)
    _check_ours(columns, {column for layout in kind.values() for column in _known(layout)}, "any format")
    other = next((name for name, layout in FORMATS.items() if layout.fits(values)), None)
    if other is not None:
        raise DataError(f"{row.place()}: {_wrong_kind(other, preference=preference)} {_found(row, values)}")
    known = "; ".join(f"{name}: {', '.join(layout.columns)}" for name, layout in kind.items())
    raise DataError(
        f"{row.place()}: no known format.{_renaming(values, kind)} Rename columns with data.columns={{OURS: THEIRS}}. "
        f"Expected the columns of one of these formats: {known}. {_found(row, values)}"
    )


def check_format(row: Row, layout: str, columns: Mapping[str, str], *, preference: bool) -> None:
    """Refuse a `layout` of the wrong kind, and `columns` that do not fit it or the first `row`. Raises DataError."""
    _check_layout(layout, columns, preference=preference)
    _check_theirs(row, columns)


def convert(rows: list[Row], layout: str, columns: Mapping[str, str], *, preference: bool) -> list[Example]:
    """Each row as an example; `layout` is the name of a format, never `auto`.

    Raises DataError with file, row, id, expected and found columns and the row's first characters.
    """
    _check_layout(layout, columns, preference=preference)
    read, unread = FORMATS[layout].read, frozenset(UNREAD if layout != "text" else ())
    examples = []
    for row in rows:
        values = _renamed(row.values, columns) if columns else row.values
        try:
            if not unread.isdisjoint(values):
                _check_unread(values)
            examples.append(read(values))
        except Misfit as misfit:
            raise DataError(_complaint(row, values, layout, str(misfit))) from misfit
    return examples


def _renamed(values: Values, columns: Mapping[str, str]) -> Values:
    theirs = set(columns.values())
    kept = {name: value for name, value in values.items() if name not in theirs}
    return kept | {ours: values[name] for ours, name in columns.items() if name in values}


def _known(layout: Format) -> tuple[str, ...]:
    return layout.columns + layout.optional + LABELS


def _check_layout(name: str, columns: Mapping[str, str], *, preference: bool) -> None:
    if FORMATS[name].preference != preference:
        raise DataError(f"data.format={name}: {_wrong_kind(name, preference=preference)}")
    _check_ours(columns, _known(FORMATS[name]), f"the format {name}")


def _check_ours(columns: Mapping[str, str], known: Iterable[str], of: str) -> None:
    for ours in columns:
        if ours not in known:
            legal = ", ".join(sorted(known))
            raise DataError(
                f"data.columns: '{ours}' is no column of {of} (those are {legal}).{did_you_mean(ours, known)} "
                "Write data.columns={OURS: THEIRS}."
            )


def _check_theirs(row: Row, columns: Mapping[str, str]) -> None:
    for ours, theirs in columns.items():
        if theirs not in row.values:
            raise DataError(
                f"{row.place()}: data.columns={{{ours}: {theirs}}}, but there is no column '{theirs}'."
                f"{did_you_mean(theirs, map(str, row.values))} The first row must have it, if only as null. "
                f"{_found(row, row.values)}"
            )


def _check_unread(values: Values) -> None:
    for column, reason in UNREAD.items():
        if values.get(column):
            raise Misfit(f"has the column '{column}' ({shown(values[column])}), but {reason}.")


def _wrong_kind(name: str, *, preference: bool) -> str:
    if preference:
        return f"the format {name} is not preference data, which recipe=dpo needs; recipe=sft learns from it."
    return f"the format {name} is preference data; recipe=dpo learns from it."


def _renaming(values: Values, kind: Mapping[str, Format]) -> str:
    """Advice where only the case of the letters is another."""
    by_lower_case = {str(name).lower(): name for name in values}
    for layout in kind.values():
        if by_lower_case.keys() >= set(layout.columns) and not set(layout.columns) <= set(values):
            entries = ", ".join(f"{name}: {by_lower_case[name]}" for name in layout.columns)
            return f" Did you mean data.columns={{{entries}}}?"
    return ""


def _complaint(row: Row, values: Values, layout: str, problem: str) -> str:
    known = FORMATS[layout]
    maybe = f" and may have {', '.join(known.optional)}" if known.optional else ""
    place = Row(dict(values), row.source, row.number).place()  # the id, whatever it is called in the file
    expected = f"The format {layout} has the columns {', '.join(known.columns)}{maybe}."
    return f"{place}: {problem} {expected} {_found(row, values)}"


def _found(row: Row, values: Values) -> str:
    return f"Found the columns {', '.join(map(str, values)) or 'none'}. The row begins: {row.excerpt()}"
