"""The exceptions and exit codes every part of llmkit shares."""

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: schedulers may start the same command again, and it goes on


class LlmkitError(Exception):
    """An error whose message is written for the user: it is shown without a traceback."""

    exit_code = EXIT_FAILED


class ConfigError(LlmkitError):
    """Wrong input: says what, where, what is legal and how to fix it. Several problems are one message."""

    exit_code = EXIT_WRONG_INPUT

    def __init__(self, *problems: str):
        self.problems = list(dict.fromkeys(problems))
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return type(self), tuple(self.problems)  # else a copy in another process knows of one problem only


class DataError(ConfigError):
    """A data file or row that cannot be used: names the file, the row and the columns."""


class NonFiniteError(LlmkitError):
    """Training met a loss or gradient that is not a finite number."""


class Stopped(LlmkitError):
    """A signal asked for a stop before the first step: nothing is lost, and nothing is there to go on from."""

    exit_code = EXIT_PREEMPTED


class OutOfMemory(LlmkitError):
    """The settings ask for more memory than the device has: says which settings would fit."""

    exit_code = EXIT_WRONG_INPUT  # the same command would fail again: what helps is another setting


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest known name, or an empty string when nothing is near."""
    by_lower_case = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower_case, n=1, cutoff=0.6)
    return f" Did you mean '{by_lower_case[near[0]]}'?" if near else ""
