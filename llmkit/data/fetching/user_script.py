"""The user's own Python file that yields rows: run in this process, and its mistakes told in its own lines.

    SPLITS = ("train", "test")      # optional; one split, train, without it
    TOKENS = ["<USER>", "</USER>"]  # optional; or a function tokens()

    def rows(split):                # or rows(), for one split
        yield {"question": "...", "answer": "..."}

Of the file nothing but these names is looked at.
"""

import hashlib
import inspect
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llmkit.config.data_files import SHARD
from llmkit.errors import ConfigError, DataError, did_you_mean

CONTRACT = "def rows(split): yield {...}, or def rows() for one split; with SPLITS = (...) and TOKENS = [...] if wanted"
SPLIT_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
MODULE = "llmkit_fetch_script"  # not the file's own name: a script may be called datasets.py
LONGEST_REASON = 1000  # characters of an exception's message: some quote whole pages of the hub's


@dataclass(frozen=True, slots=True)
class ScriptFile:
    """The file as it was read: what is hashed is exactly what runs."""

    path: Path  # absolute: the script may change the working directory
    source: bytes

    @property
    def sha256(self) -> str:
        """The hash of its content, in hexadecimal."""
        return hashlib.sha256(self.source).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class UserScript:
    """A script that was run and defines `rows`; use it inside the block of `running`."""

    path: Path
    splits: tuple[str, ...]
    tokens: tuple[str, ...]
    function: Callable[..., Any]
    takes_split: bool
    layout: ClassVar[str] = "auto"

    def place(self, split: str) -> str:
        """How messages name a split's rows."""
        return f"{self.path.name}, split '{split}'"

    def rows(self, split: str) -> Generator[Any, None, None]:
        """What `rows` yields for the split, unchecked. Raises DataError for whatever goes wrong in the script."""
        count = 0
        with _own_lines(self.path, lambda: f"{self.place(split)}, after {count:,} rows"):
            yielded = self.function(split) if self.takes_split else self.function()
            if isinstance(yielded, str | bytes | dict) or not isinstance(yielded, Iterable):
                raise DataError(
                    f"{self.place(split)}: rows() returned {_kind(yielded)}; it must yield rows, each a dict, or "
                    "return a list of them."
                )
            # A limit ends a generator early: what it holds open is closed now, while its mistakes can be told.
            with closing(yielded) if isinstance(yielded, Generator) else nullcontext():
                for row in yielded:
                    yield row
                    count += 1


def read_script(path: Path) -> ScriptFile:
    """Read the file, and run nothing of it. Raises ConfigError if that is not possible."""
    try:
        return ScriptFile(path.absolute(), path.read_bytes())
    except OSError as error:
        raise ConfigError(f"data.script={path}: cannot be read ({error.strerror}).") from error


@contextmanager
def running(script: ScriptFile) -> Iterator[UserScript]:
    """Run the script and check what it defines; while the block lasts, its directory is where imports look first.

    Raises ConfigError for a script that defines no rows, DataError for an exception in it.
    """
    path = script.path
    module = types.ModuleType(MODULE)
    module.__file__ = str(path)
    before = sys.path.copy(), sys.dont_write_bytecode
    sys.path.insert(0, str(path.resolve().parent))
    sys.dont_write_bytecode = True  # no __pycache__ beside the user's files
    sys.modules[MODULE] = module  # dataclasses and pickle look their module up
    try:
        with _own_lines(path, lambda: f"{path.name} does not run"):
            exec(compile(script.source, str(path), "exec"), module.__dict__)
        function = _rows_function(path, module)
        takes_split = _takes_split(path, function)
        yield UserScript(
            path=path,
            splits=_splits(path, module, takes_split),
            tokens=_tokens(path, module),
            function=function,
            takes_split=takes_split,
        )
    finally:
        sys.path[:], sys.dont_write_bytecode = before
        sys.modules.pop(MODULE, None)


@contextmanager
def _own_lines(path: Path, what: Callable[[], str]) -> Iterator[None]:
    """Turn an exception of the user's code into a DataError that shows the script's own lines, innermost last."""
    try:
        yield
    except DataError:
        raise
    except (Exception, SystemExit) as error:
        raise DataError(f"{what()}: " + "\ncaused by ".join(_told(path, error))) from error


def _told(path: Path, error: BaseException | None) -> Iterator[str]:
    """The exception and what it was raised from, each with the script's own lines: libraries wrap what matters."""
    while error is not None:
        reason = _unset_variable(error) or "".join(traceback.format_exception_only(error)).strip()
        if len(reason) > LONGEST_REASON:
            reason = reason[:LONGEST_REASON] + " ..."
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        yield "\n".join([reason, *(f"  {path}:{frame.lineno}, in {frame.name}: {frame.line}" for frame in frames)])
        error = error.__cause__


def _unset_variable(error: BaseException) -> str:
    """Words for the KeyError of `os.environ[...]`, which shows the bare name; empty for any other exception."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_by = frames[-1].f_globals.get("__name__") if frames else None
    if isinstance(error, KeyError) and raised_by == os.__name__:
        return f"the environment variable {error.args[0]} is not set"
    return ""


def _rows_function(path: Path, module: types.ModuleType) -> Callable[..., Any]:
    rows = getattr(module, "rows", None)
    if rows is None:
        near = did_you_mean("rows", [name for name in vars(module) if not name.startswith("_")])
        raise ConfigError(f"{path}: defines no rows.{near} A script is {CONTRACT}.")
    if not inspect.isroutine(rows):
        raise ConfigError(f"{path}: rows is {_kind(rows)}, not a function. A script is {CONTRACT}.")
    return rows


def _takes_split(path: Path, rows: Callable[..., Any]) -> bool:
    """Whether `rows` is to be called with the split's name: it has a `split`, or one argument it cannot do without."""
    arguments = inspect.signature(rows).parameters
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [one for one in arguments.values() if one.default is one.empty and one.kind not in optional]
    if len(needed) > 1 or any(one.kind == one.KEYWORD_ONLY for one in needed):
        names = ", ".join(one.name for one in needed)
        raise ConfigError(f"{path}: rows needs the arguments {names}, and is given a split at most: {CONTRACT}.")
    return bool(needed) or next(iter(arguments), None) == "split"


def _splits(path: Path, module: types.ModuleType, takes_split: bool) -> tuple[str, ...]:
    named = getattr(module, "SPLITS", ("train",))
    splits = (named,) if isinstance(named, str) else named
    if not isinstance(splits, list | tuple) or not splits:
        raise ConfigError(f"{path}: SPLITS is {named!r}; it must list the names of splits: ('train', 'test').")
    for split in splits:
        if not isinstance(split, str) or not SPLIT_NAME.fullmatch(split) or SHARD.fullmatch(split):
            raise ConfigError(
                f"{path}: SPLITS names {split!r}, and {split}.jsonl would not be read as a split of that name; use "
                "letters, digits, dots, _ and -, and no number after a -."
            )
    if len({split.lower() for split in splits}) < len(splits):
        raise ConfigError(f"{path}: SPLITS names a split twice: {', '.join(splits)}.")
    if not takes_split and len(splits) > 1:
        raise ConfigError(
            f"{path}: SPLITS names {len(splits)} splits, but rows takes no argument that says which; write "
            "def rows(split): ..."
        )
    return tuple(splits)


def _tokens(path: Path, module: types.ModuleType) -> tuple[str, ...]:
    """The special tokens of `TOKENS` or `tokens()`; none without either."""
    given, function = getattr(module, "TOKENS", None), getattr(module, "tokens", None)
    if callable(function):
        if given is not None:
            raise ConfigError(f"{path}: defines both TOKENS and tokens(); keep one.")
        with _own_lines(path, lambda: f"{path.name}, tokens()"):
            given = function()
            given = list(given) if inspect.isgenerator(given) else given
    if given is None:
        return ()
    if not isinstance(given, list | tuple):
        raise ConfigError(f"{path}: tokens are a list of texts, TOKENS = ['<USER>', '</USER>']; found {given!r}.")
    for token in given:
        if not isinstance(token, str) or not token or token != token.strip():
            raise ConfigError(f"{path}: its tokens hold {token!r}; a token is text without spaces around it.")
    if len(set(given)) < len(given):
        twice = next(token for token in given if given.count(token) > 1)
        raise ConfigError(f"{path}: its tokens hold {twice!r} twice.")
    return tuple(given)


def _kind(value: Any) -> str:
    return "nothing (None)" if value is None else f"a {type(value).__name__}"
