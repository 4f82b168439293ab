"""What chat and evaluate share: the model that is meant, and how to reach it."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from llmkit.config import TrainConfig
from llmkit.errors import ConfigError
from llmkit.remote import reach_with
from llmkit.serving.target import Target, find_target, of_model
from llmkit.words import Words


def meant(words: Words, config: TrainConfig) -> Target:
    """The model that a command line means. Raises ConfigError if there is none."""
    reach_with(config.storage)
    if words.names("model"):
        return of_model(config.model)
    target = find_target(words.own, config)
    if "run" not in words.own and "sweep" not in words.own:
        say("newest", f"{target.home}, the newest finished run")
    return target


def say(name: str, value: str) -> None:
    """A fact, where it does not mix with answers."""
    print(f"{name:<10} {value}", file=sys.stderr, flush=True)


def hide_libraries(config: TrainConfig) -> bool:
    """Leave out libraries that this config does not use, where this process is a command and nothing else.

    Returns whether it is: elsewhere somebody might miss them.
    """
    from llmkit.worker import hide_unused_libraries

    program = Path(sys.argv[0])
    if program.name != "llmkit" and program.parent != Path(__file__).parent:
        return False
    hide_unused_libraries(config)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in ("bitsandbytes", "huggingface_hub"):  # notes that are not for users
        logging.getLogger(name).setLevel(logging.ERROR)
    return True


@contextmanager
def light_imports(config: TrainConfig) -> Iterator[None]:
    """Imports without such libraries, and without the collector walking what imports make, again and again."""
    from llmkit.worker import no_garbage_collection

    with no_garbage_collection() if hide_libraries(config) else nullcontext():
        yield


def whole_number(words: Words, key: str, *, least: int = 1) -> int | None:
    """The value of an own word, a number; None if it was not given. Raises ConfigError for anything else."""
    if (value := words.own.get(key)) is None:
        return None
    if not value.isdecimal() or int(value) < least:
        raise ConfigError(f"{key}={value}: must be a whole number, {least} or more.")
    return int(value)
