"""Show what a run would learn, token by token, and audit its data: `llmkit preview [FILE.yaml] [KEY=VALUE ...]`.

Composes the config as `llmkit train` does and prepares the data as a run would, cache included; loads no weights.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from llmkit import __version__
from llmkit.cli import guarded, print_error
from llmkit.config import resolve, validate, warnings
from llmkit.config.arguments import parse_arguments
from llmkit.config.compose import run_composed
from llmkit.data.progress import now_and_then
from llmkit.errors import EXIT_DONE, EXIT_FAILED, ConfigError, DataError
from llmkit.launchers.light_imports import light_imports
from llmkit.launchers.start import HYDRA_PLUGINS

HELP = """\
llmkit preview [FILE.yaml] [KEY=VALUE ...] [n=N] [--html [FILE.html]]

Shows the rows of your data exactly as training takes them, token by token: what is learnt and what is not. Then the
audit: rows, repeats, lengths, what is dropped or cut, leaks into the held-out rows. Loads no weights; what it prepares
is kept for the run. Takes everything that llmkit train takes, but no sweep.

  n=N          rows to show, 5 unless you say otherwise; 0: the audit alone
  --html FILE  write it all, with plots, to one HTML page too; without a name (FILE.html, or html=FILE): preview.html

Exit code: 0 training would start; 1 it would stop at this data; 2 the command is wrong.

Examples:
  llmkit preview data.path=chats.jsonl model=qwen3_0_6b
  llmkit preview recipe=dpo data.path=pairs.jsonl model=qwen3_0_6b n=2 --html pairs.html
  llmkit preview runs/alpha/config.yaml"""

DEFAULT_ROWS, DEFAULT_PAGE = 5, "preview.html"
SECONDS_PER_LINE = 5.0  # between two lines of progress


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked for beside the config."""

    rows: int
    page: Path | None


def main(argv: list[str] | None = None) -> int:
    """The verb; returns the exit code."""
    return guarded(_preview, argv)


def _preview(argv: list[str]) -> int:
    wanted, words = _own_words(argv)
    arguments = parse_arguments(words)
    if {"-h", "--help"} & set(arguments.switches):
        print(HELP)
        return EXIT_DONE
    if "--version" in arguments.switches:
        print(__version__)
        return EXIT_DONE
    if arguments.multirun:
        sweeps = next((word for word in words if word.startswith("sweeper=")), "-m")
        raise ConfigError(f"{sweeps}: a preview shows one config; leave it out, and choose one of the values.")
    composed: list[DictConfig] = []
    run_composed("train", composed.append, arguments, HYDRA_PLUGINS)
    return max((_show(config, wanted) for config in composed), default=EXIT_DONE)


def _own_words(argv: list[str]) -> tuple[Wanted, list[str]]:
    """What is meant for the preview itself, and the words that `llmkit train` takes. Raises ConfigError."""
    rows, page = str(DEFAULT_ROWS), None
    words, left = [], list(argv)
    while left:
        word = left.pop(0)
        key, equals, value = word.partition("=")
        if key == "n" and equals:
            rows = value
        elif key in ("--html", "html") and (equals or key == "--html"):
            if not equals and left and left[0].endswith((".html", ".htm")):
                value = left.pop(0)
            page = value or DEFAULT_PAGE
        else:
            words.append(word)
    if not rows.isdecimal():
        raise ConfigError(f"n={rows}: must be a whole number, the rows to show.")
    # Shells expand a ~ at the start of a word only.
    return Wanted(rows=int(rows), page=Path(page).expanduser() if page else None), words


def _show(composed: DictConfig, wanted: Wanted) -> int:
    config = resolve(composed)
    validate(config)
    for warning in warnings(config):
        print(f"warning: {warning}", file=sys.stderr)
    os.environ.update(config.hardware.env)
    with light_imports(config):
        from llmkit.data.preview import page, report, terminal
    if wanted.page:
        page.check_place(wanted.page)
    try:
        inputs = report.run_inputs(config)
        found = report.look(config, inputs, progress=now_and_then(_say, seconds=SECONDS_PER_LINE))
    except DataError as error:
        print_error(error)  # of a row that cannot be used: there is no audit without it
        return EXIT_FAILED
    printer = terminal.PreviewPrinter()
    printer.rows(found.rows(wanted.rows, terminal.MOST_PIECES, terminal.MOST_RUNS))
    printer.audit(found.audit)
    problems: list[str] = found.audit["problems"]
    verdict = "training would stop at this data" if problems else "training would start"
    printer.verdict(verdict, good=not problems)
    if wanted.page:
        shown = found.rows(wanted.rows, page.MOST_PIECES, page.MOST_RUNS)
        title = f"{report.data_name(config.data)} for {config.model.name}"
        page.write_page(wanted.page, title=title, rows=shown, audit=found.audit, verdict=verdict)
        print(f"page: {wanted.page}")
    if problems:
        sys.stdout.flush()
        print_error(ConfigError(*problems))
        return EXIT_FAILED
    return EXIT_DONE


def _say(line: str) -> None:
    print(f"preparing {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
