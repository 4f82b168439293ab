"""Turn what a Python file of yours yields into checked data: `llmkit fetch data.script=my_script.py to=DIR`."""

import shlex
import sys
import time
from pathlib import Path

from llmkit.cli import guarded
from llmkit.config.data_files import TOKENS_FILE
from llmkit.data.fetching.fetch import Fetched, Progress, fetch_rows
from llmkit.errors import EXIT_DONE, ConfigError, did_you_mean

HELP = """\
llmkit fetch data.script=FILE.py to=DIR [limit=N]

Runs your Python file and writes what it yields as data to train on: DIR/train.jsonl and one file for each further
split, DIR/tokens.json if it names special tokens, DIR/manifest.json. Every row is checked as training would read it.

  data.script  your file; its code runs here, with your rights
  to           the directory to make; an earlier fetch of the same script is replaced, nothing else ever is
  limit        take only the first N rows of each split, for a trial

FILE.py:
  SPLITS = ("train", "test")       optional; one split, train, without it
  TOKENS = ["<USER>", "</USER>"]   optional; special tokens the model is to get

  def rows(split):                 or rows(), for one split
      yield {"question": "...", "answer": "..."}

Example:
  llmkit fetch data.script=my_script.py to=data/mine limit=100"""

KEYS = {"data.script": "FILE.py", "to": "DIR", "limit": "N"}
SECONDS_PER_LINE = 5.0  # between two lines of progress


def main(argv: list[str] | None = None) -> int:
    """The verb; returns the exit code."""
    return guarded(_fetch, argv)


def _fetch(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(HELP)
        return EXIT_DONE
    settings = _settings(argv)
    limit = int(settings["limit"]) if "limit" in settings else None
    fetched = fetch_rows(_path(settings["data.script"]), _path(settings["to"]), limit=limit, progress=_progress())
    _report(fetched, settings["to"])
    return EXIT_DONE


def _settings(argv: list[str]) -> dict[str, str]:
    """The words of the command line by key. Raises ConfigError with all that is wrong with them."""
    settings: dict[str, str] = {}
    problems = []
    for word in argv:
        key, equals, value = word.partition("=")
        if key not in KEYS:
            meant = did_you_mean(key, KEYS)
            if not equals and word.endswith(".py"):
                meant = f" Did you mean data.script={word}?"
            problems.append(f"{word}: fetch takes {', '.join(f'{known}=' for known in KEYS)}.{meant}")
        elif not value:
            problems.append(f"{key}: needs a value: {key}={KEYS[key]}.")
        elif key in settings:
            problems.append(f"{key} is given twice: {settings[key]} and {value}.")
        else:
            settings[key] = value
    if "limit" in settings and not (settings["limit"].isdecimal() and int(settings["limit"]) > 0):
        problems.append(f"limit={settings['limit']}: must be a whole number above 0.")
    if missing := [f"{key}={KEYS[key]}" for key in ("data.script", "to") if key not in settings]:
        problems += [f"{word} is missing; see llmkit fetch --help." for word in missing if not problems]
    if problems:
        raise ConfigError(*problems)
    return settings


def _path(value: str) -> Path:
    return Path(value).expanduser()  # shells expand a ~ at the start of a word only


def _progress() -> Progress:
    """A line on stderr every few seconds: a short fetch prints none."""
    last = time.monotonic()

    def tell(split: str, rows: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= SECONDS_PER_LINE:
            print(f"{split}: {rows:,} rows so far", file=sys.stderr, flush=True)
            last = now

    return tell


def _report(fetched: Fetched, to: str) -> None:
    """Say what was made, what is odd about it, and the command that trains on it."""
    width = max(len(split) for split in fetched.splits) + len(".jsonl")
    print(f"{to}:")
    for split, written in fetched.splits.items():
        print(f"  {split + '.jsonl':<{width}}  {written.rows:,} rows, {_size(written.bytes)}, format {written.format}")
    if fetched.tokens:
        print(
            f"  {TOKENS_FILE:<{width}}  {len(fetched.tokens)} special tokens: training finds it beside the rows and "
            "adds each to the model as one token"
        )
    sys.stdout.flush()
    for warning in fetched.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"next: llmkit train {shlex.join(_training_words(fetched, to))}")


def _training_words(fetched: Fetched, to: str) -> list[str]:
    """The settings of a training run on the fetched directory: a split named validation or test is used as that."""
    words = ["recipe=dpo"] if fetched.preference else []
    words.append(f"data.path={to}")
    if "train" not in fetched.splits:
        words.append(f"data.split={next(iter(fetched.splits))}")
    layouts = {written.format for written in fetched.splits.values()}
    if "role_markers" in layouts and {"<USER>", "<ASSISTANT>"} <= set(fetched.tokens):
        words.append("data.chat_template=role-markers")  # the one that writes these tokens
    return words + [f"data.{role}={role}" for role in ("validation", "test") if role in fetched.splits]


def _size(count: float) -> str:
    """Bytes in a unit that a reader takes in at once."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


if __name__ == "__main__":
    sys.exit(main())
