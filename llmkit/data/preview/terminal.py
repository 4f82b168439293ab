"""A preview on the terminal: in colour, or with marks around what is learnt where there is none."""

import io
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from llmkit.data.audit_words import packing_in_words
from llmkit.data.preview.pieces import Gap, Piece, visible
from llmkit.data.preview.rows import Section, ShownRow
from llmkit.data.preview.tables import HISTOGRAMS, Table, audit_tables

MOST_PIECES, MOST_RUNS = 100, 12  # of a row
WIDTH_WITHOUT_TERMINAL = 160
HISTOGRAM_LINES, BAR = 10, 40

# Every style sets both colours, so that it reads on a dark terminal as on a light one. The two shades take turns:
# where they change a token ends.
STYLES = {
    "not learnt": ("#d8d8d8 on #303030", "#d8d8d8 on #454545"),
    "learnt": ("#101010 on #93d893", "#101010 on #b6ecb6"),
    "made unlikely": ("#101010 on #eba0a0", "#101010 on #f6c4c4"),
    "special, not learnt": ("bold #ffffff on #33507d", "bold #ffffff on #42669c"),
    "special, learnt": ("bold #ffffff on #1b6e1b", "bold #ffffff on #278a27"),
    "special, made unlikely": ("bold #ffffff on #952424", "bold #ffffff on #ad3636"),
}
NEW = "underline"
LEARNT_FROM, LEARNT_TO, BORDER = "⟦", "⟧", "│"


class PreviewPrinter:
    """Prints rows and the audit to `file`, by default the standard output.

    Args:
        color: unset: as the terminal is and NO_COLOR says.
    """

    def __init__(self, file: TextIO | None = None, *, color: bool | None = None):
        file = file or sys.stdout
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(errors="backslashreplace")  # data may hold what the terminal's encoding lacks
        settings: dict[str, Any] = {} if file.isatty() else {"width": WIDTH_WITHOUT_TERMINAL}
        if color is not None:
            settings |= {"force_terminal": color, "color_system": "truecolor" if color else None, "no_color": not color}
        self._console = Console(file=file, highlight=False, markup=False, emoji=False, **settings)
        self.colored = self._console.color_system is not None and not self._console.no_color

    def rows(self, rows: list[ShownRow]) -> None:
        """The legend and the rows."""
        if not rows:
            return
        pair = any(section.name for row in rows for section in row.sections)
        pieces = [part for row in rows for section in row.sections for part in section.parts]
        has_new = any(isinstance(piece, Piece) and piece.kind == "new" for piece in pieces)
        self._say(self._legend(pair=pair, has_new=has_new))
        for row in rows:
            self._say(Text())
            self._say(Text(row.title + (f"  ({row.remark})" if row.remark else ""), style="bold"))
            for section in row.sections:
                self._say(Text(f"{section.name or 'row'}: {_counts(section)}", style="dim"))
                self._say(self._section(section))

    def audit(self, audit: dict[str, Any]) -> None:
        """Tables, histograms and warnings."""
        for table in audit_tables(audit):
            self._say(Text())
            self._console.print(_rich_table(table))
        for name, split in audit["splits"].items():
            for key, words in HISTOGRAMS if name == "train" else HISTOGRAMS[:1]:  # the page has them all
                self._say(Text(f"\n{words}, {name}", style="bold"))
                for line in histogram(split[key]):
                    self._say(Text(line))
        if audit["packing"]:
            self._say(Text(f"\n{packing_in_words(audit)}"))
        if audit["warnings"]:
            self._say(Text())
        for warning in audit["warnings"]:
            self._say(Text(f"warning: {visible(warning)}", style="yellow"))

    def verdict(self, words: str, *, good: bool) -> None:
        """Whether training would start."""
        self._say(Text())
        self._say(Text(words, style="bold green" if good else "bold red"))

    def _say(self, text: Text) -> None:
        # The terminal breaks long lines itself: rich would drop spaces there.
        self._console.print(text, soft_wrap=True)

    def _legend(self, *, pair: bool, has_new: bool) -> Text:
        if not self.colored:
            words = f"{LEARNT_FROM}learnt{LEARNT_TO}  {BORDER} between tokens  ↵ line break"
            return Text(words + ("  (of a rejected answer ⟦what is made unlikely⟧)" if pair else ""))
        legend = Text()
        for name, shades in STYLES.items():
            if pair or "unlikely" not in name:
                legend.append(f" {name} ", style=shades[0]).append(" ")
        if has_new:
            legend.append(" new token ", style=f"{STYLES['special, not learnt'][0]} {NEW}").append(" ")
        return legend.append("↵ line break")

    def _section(self, section: Section) -> Text:
        return _in_color(section) if self.colored else Text(_in_marks(section))


def histogram(distribution: dict[str, Any]) -> Iterator[str]:
    """Lines `from - to ███ count`, some bins of the audit together in each."""
    edges, counts = distribution["edges"], distribution["counts"]
    together = -(-len(counts) // HISTOGRAM_LINES)
    sums = [sum(counts[i : i + together]) for i in range(0, len(counts), together)]
    firsts = edges[:-1:together]
    lasts = [*(first - 1 for first in firsts[1:]), distribution["max"]]
    width = len(f"{lasts[-1]:,}")
    for first, last, count in zip(firsts, lasts, sums, strict=True):
        bounds = f"{first:>{width},} - {last:>{width},}" if last > first else f"{first:>{2 * width + 3},}"
        bar = "█" * round(BAR * count / max(sums)) or ("▏" if count else "")
        yield f"{bounds}  {bar:<{BAR}}  {count:,}"


def _counts(section: Section) -> str:
    learnt = {"": f", {section.learnt:,} learnt", "rejected": " made unlikely"}.get(section.name, "")
    return f"{section.tokens:,} tokens{learnt}"


def _in_color(section: Section) -> Text:
    text, shade = Text(), 0
    for part in section.parts:
        if isinstance(part, Gap):
            text.append(_gap(part), style="italic")
            continue
        name = "not learnt" if not part.learnt else "made unlikely" if section.name == "rejected" else "learnt"
        style = STYLES[name if part.kind == "ordinary" else f"special, {name}"][shade]
        text.append(visible(part.text), style=f"{style} {NEW}" if part.kind == "new" else style)
        shade = 1 - shade
    return text


def _in_marks(section: Section) -> str:
    words, learnt, before = "", False, ""
    for part in section.parts:
        if isinstance(part, Gap):
            words, before = words + _gap(part), ""
            continue
        if part.learnt != learnt:
            words, learnt = words + (LEARNT_FROM if part.learnt else LEARNT_TO), part.learnt
        elif before and not before.endswith("\n"):
            words += BORDER
        before = visible(part.text)
        words += before
    return words + (LEARNT_TO if learnt else "")


def _gap(gap: Gap) -> str:
    return f" … {gap.tokens:,} tokens" + (f", {gap.learnt:,} of them learnt" if gap.learnt else "") + " … "


def _rich_table(table: Table) -> RichTable:
    shown = RichTable(title=table.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for number, heading in enumerate(table.heading):
        is_text = number < table.left
        shown.add_column(heading, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for row in table.rows:
        shown.add_row(*(Text(visible(cell)) for cell in row))
    return shown
