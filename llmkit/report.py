"""A page about runs and sweeps: `llmkit report RUN|SWEEP ... [to=FILE.html]`."""

import sys
from pathlib import Path

from llmkit import rundir
from llmkit.cli import guarded
from llmkit.errors import EXIT_DONE, ConfigError
from llmkit.launchers.overview import directory_named
from llmkit.remote import is_remote
from llmkit.reporting.collection import read_report
from llmkit.reporting.page import check_place, write_page

HELP = """\
llmkit report RUN|SWEEP ... [to=FILE.html]

Writes one HTML page that needs nothing else: leaderboard, curves, the objective against each swept key, answers of base
and winners side by side, data audit, cost, what differs between the configs, and the commands to go on with. It is made
at the end of every sweep, and can be made at any time while runs are under way.

  RUN, SWEEP  directories, or their names below runs/
  to          where the page goes; else report.html: of one run or sweep in its directory, of several here

Examples:
  llmkit report runs/ranks
  llmkit report alpha beta to=both.html"""

OWN = "to"


def main(argv: list[str] | None = None) -> int:
    """The verb; returns the exit code."""
    return guarded(_report, argv)


def _report(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(HELP)
        return EXIT_DONE
    names, to = _sorted(argv)
    places = [directory_named(name) for name in names]
    page = to or (places[0] if len(places) == 1 else Path()) / rundir.REPORT
    check_place(page)
    report = read_report(places)
    write_page(report, page)
    print(f"report: {page}" if len(places) == 1 or to else f"report: {page.absolute()}")
    return EXIT_DONE


def _sorted(argv: list[str]) -> tuple[list[str], Path | None]:
    """The runs and sweeps that are named, and where the page goes. Raises ConfigError for any other word."""
    problems, names, to = [], [], None
    for word in argv:
        key, equals, value = word.partition("=")
        if word.startswith("-"):
            problems.append(f"{word}: unknown switch; see llmkit report --help.")
        elif is_remote(value if key == OWN else word):
            problems.append(f"{word}: reports are made of directories and written to files of this machine.")
        elif key == OWN and equals:
            if not value or to is not None:
                problems.append("to=FILE.html: needs a file, once.")
            to = Path(value).expanduser()
        elif equals and "/" not in key and not Path(word).exists():
            problems.append(f"{word}: llmkit report takes runs, sweeps and to=FILE.html.")
        else:
            names.append(word)
    if not names and not problems:
        problems.append("which run or sweep? llmkit report RUN|SWEEP ...; llmkit jobs lists the runs.")
    if problems:
        raise ConfigError(*problems)
    return names, to


if __name__ == "__main__":
    sys.exit(main())
