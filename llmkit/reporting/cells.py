"""Texts in cells, and how figures, times and sizes are written in them."""

from dataclasses import dataclass, field

from llmkit.reporting.runs import SHARES, Figure

NOT_KNOWN = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One field: a text, and smaller lines below it."""

    text: str
    notes: list[str] = field(default_factory=list)
    link: str = ""
    colour: str = ""  # of the run that it names
    kind: str = ""  # its class in style.css: number, run, state, or words, whose line breaks and spaces are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of cells below a heading; `strong` is the number of the row to be seen first."""

    heading: list[str]
    rows: list[list[Cell]]
    caption: str = ""
    strong: int | None = None

    @property
    def are_numbers(self) -> list[bool]:
        """Of each column whether it holds numbers."""
        return [all(row[place].kind == "number" for row in self.rows) for place in range(len(self.heading))]


def in_words(name: str, figure: Figure) -> str:
    """`97.2% (95%: 85.8% to 99.5%, 36 rows)`, or `0.0777` where no interval is known."""
    if figure.low is None or figure.high is None:
        return shown(name, figure.value)
    rows = f", {figure.rows:,} rows" if figure.rows else ""
    return f"{shown(name, figure.value)} (95%: {from_to(name, figure.low, figure.high)}{rows})"


def shown(name: str, value: float) -> str:
    """A figure by itself: a share in percent, a loss with four digits behind the point."""
    return f"{value:.1%}" if name in SHARES else f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def from_to(name: str, low: float, high: float) -> str:
    """The ends of an interval of a figure."""
    return f"{shown(name, low)} to {shown(name, high)}"


def duration(seconds: float | None) -> str:
    """`12.3 s`, and from two minutes on `1:02:03`."""
    if seconds is None:
        return NOT_KNOWN
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def number(text: str) -> Cell:
    """A cell of a number."""
    return Cell(text=text, kind="number")


def words(text: str) -> Cell:
    """A cell of what a user or a model has written."""
    return Cell(text=text, kind="words")


def count(number: float | None) -> str:
    """A whole number, as `12,345`."""
    return NOT_KNOWN if number is None else f"{number:,.0f}"


def memory(size: int | None) -> str:
    """A number of bytes, as `1.5 GiB` or `4 MiB`."""
    if size is None:
        return NOT_KNOWN
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def money(amount: float | None) -> str:
    """An amount, with four digits behind the point below 1."""
    return NOT_KNOWN if amount is None else f"{amount:,.4f}" if amount < 1 else f"{amount:,.2f}"


def kind_of(text: str) -> str:
    """The kind of a cell with a value of the config."""
    try:
        float(text)
    except ValueError:
        return ""
    return "number"
