"""A preview as one HTML file that needs nothing else: no network, no scripts, dark or light as the reader likes."""

import os
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from llmkit.data.audit_words import packing_in_words
from llmkit.data.preview.pieces import Gap, Piece, visible
from llmkit.data.preview.plots import histograms_svg
from llmkit.data.preview.rows import Section, ShownRow
from llmkit.data.preview.tables import Table, audit_tables
from llmkit.errors import ConfigError

MOST_PIECES, MOST_RUNS = 2000, 60  # of a row
MARK = '<meta name="generator" content="llmkit preview">'  # by which a page of ours is known again
POLICY = "default-src 'none'; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --bar: #3f8f3f; --line: #8886; --bad: #b3261e; --odd: #8a5a00;
  --no: #0001; --no2: #0000; --yes: #b6e8b6; --yes2: #98d898; --un: #f6c6c6; --un2: #eeacac; --ink: #111;
  --sno: #3b5c8f; --syes: #1d701d; --sun: #982626; }
@media (prefers-color-scheme: dark) { :root { --bar: #6fbf6f; --bad: #ff8a80; --odd: #ffc266;
  --no: #fff2; --no2: #fff0; --yes: #245c24; --yes2: #2f712f; --un: #6d2727; --un2: #803030; --ink: #f2f2f2;
  --sno: #4a6ea8; --syes: #2f9a2f; --sun: #c04040; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .15rem .8rem .15rem 0; text-align: left; border-bottom: 1px solid var(--line); white-space: pre; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
.good { color: var(--bar); } .bad { color: var(--bad); } .odd { color: var(--odd); }
.quiet { opacity: .7; font-size: .85rem; }
.row { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0 .8rem;
  padding: .5rem .7rem; border: 1px solid var(--line); border-radius: .4rem; }
.row i { opacity: .7; }
b { font-weight: inherit; border-radius: .15rem; }
.no { background: var(--no2); } .no:nth-child(2n) { background: var(--no); }
.yes { background: var(--yes2); color: var(--ink); } .yes:nth-child(2n) { background: var(--yes); }
.un { background: var(--un2); color: var(--ink); } .un:nth-child(2n) { background: var(--un); }
b.special, b.new { color: #fff; font-weight: 600; } .new { text-decoration: underline; }
.no.special, .no.new { background: var(--sno); } .yes.special, .yes.new { background: var(--syes); }
.un.special, .un.new { background: var(--sun); }
svg { max-width: 100%; height: auto; }
"""


def write_page(path: Path, *, title: str, rows: list[ShownRow], audit: dict[str, Any], verdict: str) -> None:
    """Write the page. A reader of an earlier one sees that or this, never half of it."""
    text = "\n".join(_page(title, rows, audit, verdict)) + "\n"
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Half of a surrogate pair cannot be written; the readers of rows refuse it.
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(f"html={path}: cannot be written ({error.strerror}).") from error


def check_place(path: Path) -> None:
    """Raise ConfigError where no page can be written, and where something lies that is no page of ours."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"html={path}: {parent} is no directory that can be written to.")
    if path.is_dir():
        raise ConfigError(f"html={path}: is a directory; name a file, html={path / 'preview.html'}.")
    if path.exists() and MARK.encode() not in path.read_bytes()[:2000]:
        raise ConfigError(f"html={path}: is there already and no page of a preview; choose another name.")


def _page(title: str, rows: list[ShownRow], audit: dict[str, Any], verdict: str) -> Iterator[str]:
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    # Nothing is fetched, whatever a row may hold.
    yield f"""<meta http-equiv="Content-Security-Policy" content="{POLICY}">"""
    yield f'<meta name="viewport" content="width=device-width">\n{MARK}'
    yield f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>"
    yield f'<p class="{"bad" if audit["problems"] else "good"}">{escape(verdict)}</p>'
    yield from (f'<p class="bad">{escape(visible(problem))}</p>' for problem in audit["problems"])
    yield from (f'<p class="odd">warning: {escape(visible(warning))}</p>' for warning in audit["warnings"])
    if rows:
        yield f"<h2>Rows in tokens</h2>\n{_legend(rows)}"
    for row in rows:
        remark = f' <span class="bad">({escape(row.remark)})</span>' if row.remark else ""
        yield f"<h3>{escape(visible(row.title))}{remark}</h3>"
        for section in row.sections:
            learnt = {"": f", {section.learnt:,} learnt", "rejected": " made unlikely"}.get(section.name, "")
            yield f'<div class="quiet">{section.name} {section.tokens:,} tokens{learnt}</div>'
            yield f'<div class="row">{"".join(map(_part, section.parts, _names(section)))}</div>'
    yield "<h2>Audit</h2>"
    for table in audit_tables(audit):
        yield from _table(table)
    if audit["packing"]:
        yield f"<p>{escape(packing_in_words(audit))}</p>"
    yield histograms_svg(audit)
    yield "</body>\n</html>"


def _names(section: Section) -> Iterator[str]:
    learnt = "un" if section.name == "rejected" else "yes"
    return (learnt if isinstance(part, Piece) and part.learnt else "no" for part in section.parts)


def _part(part: Piece | Gap, name: str) -> str:
    if isinstance(part, Gap):
        learnt = f", {part.learnt:,} of them learnt" if part.learnt else ""
        return f"<i> … {part.tokens:,} tokens{learnt} … </i>"
    kind = "" if part.kind == "ordinary" else f" {part.kind}"
    numbers = " ".join(map(str, part.ids))
    return f'<b class="{name}{kind}" title="{numbers}">{escape(visible(part.text))}</b>'


def _legend(rows: list[ShownRow]) -> str:
    names = {"no": "not learnt", "yes": "learnt"}
    if any(section.name for row in rows for section in row.sections):
        names["un"] = "made unlikely"
    shown = [f'<b class="{name}">{words}</b>' for name, words in names.items()]
    shown += [f'<b class="{name} special">special, {words}</b>' for name, words in names.items()]
    shown.append('<b class="no new">new token</b>')
    more = "↵ line break; a token's number shows when the pointer rests on it"
    return f'<div class="row">{"  ".join(shown)}  {more}</div>'


def _table(table: Table) -> Iterator[str]:
    def cells(tag: str, texts: list[str]) -> str:
        return "".join(
            f"<{tag}{'' if i < table.left else ' class=n'}>{escape(visible(text))}</{tag}>"
            for i, text in enumerate(texts)
        )

    yield f"<h3>{table.title}</h3>\n<table>\n<tr>{cells('th', table.heading)}</tr>"
    yield from (f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    yield "</table>"
