"""Runs as a table: `llmkit jobs list`, and live, `llmkit jobs watch`."""

import datetime
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llmkit.launchers.overview import OPEN, RunView

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

COLOURS = {"running": "green", "queued": "yellow", "failed": "red", "unknown": "red", "completed": "dim"}
WIDTH = 160  # characters where no terminal says how many it has


def job_table(views: Sequence[RunView]) -> "Table":
    """One row per run, those that are under way first."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("run", "launcher", "job", "state"):
        table.add_column(heading, overflow="fold")
    for heading in ("step", "loss", "tokens/s", "ETA"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("where", overflow="fold")
    for view in sorted(views, key=lambda view: view.state not in OPEN):
        # Text, since brackets in names are not marks of rich's.
        table.add_row(
            *(Text(text) for text in (str(view.run_dir), view.launcher, view.job_id)),
            Text(view.state, style=COLOURS.get(view.state, "")),
            *(Text(text) for text in _figures(view)),
            Text(" ".join(filter(None, [view.device, f"({view.detail})" if view.detail else ""]))),
        )
    return table


def console() -> "Console":
    """Where tables go."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH)


def watch(look: Callable[[], Sequence[RunView]], *, seconds: float) -> None:
    """Show how runs stand, again and again, until none is under way or Ctrl-C."""
    from rich.live import Live

    views = look()
    with Live(job_table(views), console=console(), auto_refresh=False) as live:
        while any(view.state in OPEN for view in views):
            time.sleep(seconds)
            views = look()
            live.update(job_table(views), refresh=True)


def _figures(view: RunView) -> tuple[str, str, str, str]:
    step = f"{view.step:,}{f'/{view.steps:,}' if view.steps else ''}" if view.step or view.state in OPEN else ""
    loss = f"{view.loss:.4f}" if view.loss is not None else ""
    speed = f"{view.tokens_per_second:,.0f}" if view.tokens_per_second is not None else ""
    left = str(datetime.timedelta(seconds=round(view.seconds_left))) if view.seconds_left is not None else ""
    return step, loss, speed, left
