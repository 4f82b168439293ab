"""`llmkit VERB ...` is `python -m llmkit.VERB ...`; and what the verbs share: one way in and one way out.

A user's mistake ends in one message and exit code 2; a traceback is for our own bugs.
"""

import importlib
import os
import sys
from collections.abc import Callable

from llmkit.errors import EXIT_DONE, EXIT_WRONG_INPUT, ConfigError, LlmkitError, did_you_mean

EXIT_INTERRUPTED = 130  # as a shell reports SIGINT

VERBS = {
    "train": "fine-tune a model, or sweep (-m)",
    "resume": "go on with a run that was interrupted",
    "serve": "start vLLM on what was trained",
    "chat": "talk to a model, tuned and base side by side if you like",
    "evaluate": "measure a model on rows, or on tasks of lm-evaluation-harness",
    "preview": "show what a run would learn, token by token, and audit its data",
    "fetch": "bring a model or data to a directory or a bucket, verified",
    "export": "merge a model, copy its run, or publish it",
    "jobs": "look at runs, follow, cancel and collect them, wherever they run",
    "report": "make a page of runs and sweeps: figures, curves, answers, cost",
    "doctor": "show what this machine has and what is missing",
}


def main(argv: list[str] | None = None) -> int:
    """The `llmkit` command."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("llmkit VERB ...   (llmkit VERB --help says more)\n")
        print("\n".join(f"  {verb:<10}{purpose}" for verb, purpose in VERBS.items()))
        return EXIT_DONE
    if argv[0] in ("-V", "--version", "version"):
        from llmkit import __version__

        print(__version__)
        return EXIT_DONE
    if argv[0] not in VERBS:
        near = did_you_mean(argv[0], VERBS)
        print_error(ConfigError(f"llmkit {argv[0]}: no such verb.{near} Verbs: {', '.join(VERBS)}."))
        return EXIT_WRONG_INPUT
    return importlib.import_module(f"llmkit.{argv[0]}").main(argv[1:])


def guarded(verb: Callable[[list[str]], int], argv: list[str] | None) -> int:
    """Run a verb; turn what it raises for the user into a message and an exit code."""
    try:
        code = verb(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # here, where a reader that has left is known for what it is
        return code
    except LlmkitError as error:
        print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader (head, less) has left
        return EXIT_DONE


def print_error(error: LlmkitError) -> None:
    """Show an error's message on stderr; several problems as a list."""
    problems = error.problems if isinstance(error, ConfigError) else [str(error)]
    if len(problems) == 1:
        print(f"error: {problems[0]}", file=sys.stderr)
    else:
        print(f"{len(problems)} errors:", *(f"  - {problem}" for problem in problems), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
