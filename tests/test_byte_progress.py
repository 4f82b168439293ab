"""How far a transfer is, is said where it takes long, and only there."""

import sys

import pytest

from llmkit import byte_progress
from llmkit.byte_progress import in_bytes


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (802_143, "802 kB"), (999_700, "1 MB"), (14.5e9, "14.5 GB")],
)
def test_sizes_are_said_in_a_unit_that_fits(count, words):
    assert in_bytes(count) == words


def test_what_is_soon_done_says_nothing(capsys):
    with byte_progress.byte_progress("fetching it", 100) as progress:
        progress(100)

    assert capsys.readouterr() == ("", "")


def test_what_takes_long_says_how_far_it_is_and_how_long_it_will_take(capsys, monkeypatch):
    times = iter([0.0, 5.0, 60.0, 61.0])
    monkeypatch.setattr(byte_progress.time, "monotonic", lambda: next(times))
    with byte_progress.byte_progress("fetching it", 10**9) as progress:
        for _ in range(3):
            progress(10**8)

    assert capsys.readouterr().err == "fetching it: 200 MB of 1 GB, 3.33 MB/s, 4 min left\n"


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(byte_progress, "BAR_AFTER", -1.0)
    with byte_progress.byte_progress("fetching it", 100) as progress:
        progress(40)
        progress(60)

    assert "fetching it" in capsys.readouterr().err
