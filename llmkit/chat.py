"""Talk to a model: `llmkit chat [run=RUN_DIR] [url=URL] [system=TEXT] [prompt=TEXT]`."""

import functools
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from llmkit.answering import light_imports, meant, say, whole_number
from llmkit.cli import guarded, print_error
from llmkit.data.examples import Message
from llmkit.errors import EXIT_DONE, ConfigError, LlmkitError
from llmkit.serving.answers import LONGEST_REPLY, Answering, Sampling
from llmkit.words import YES_OR_NO, Words, composed, sort_words

HELP = f"""\
llmkit chat [run=RUN_DIR | sweep=DIR | model=NAME | url=URL] [KEY=VALUE ...]

Talks to a model, with the chat template and the end tokens it was trained with. Alone: the newest finished run under
runs/; through the server that llmkit serve has running for it, else in this process.

  run             a run's directory, one of its checkpoints, or s3://...; sweep: the best run of one
  model           a base model: model=NAME, model=org/name, model.path=DIR
  url             an OpenAI-compatible endpoint, http://HOST:PORT; the key is VLLM_API_KEY or OPENAI_API_KEY in the
                  environment
  name            the model's name at url, where it serves several
  prompt          answer this once, on standard output, and end; -: read it from standard input
  system          the system's turn, in front of all others
  compare         true: the base answers too, before the tuned model (in this process)
  max_new_tokens  longest answer in tokens; unset: {LONGEST_REPLY:,}, or what the context has room for
  temperature     0 (the default): the likeliest token each time

Lines that are piped in are one turn each. In the chat:
  /reset          begin anew            /save FILE  add the chat to FILE, JSON Lines to train on
  /quit, Ctrl-D   end                   Ctrl-C      end the answer; where there is none, the chat

Examples:
  llmkit chat
  llmkit chat run=runs/alpha compare=true
  llmkit chat url=http://127.0.0.1:8000 system="Answer in one sentence."
  llmkit chat prompt="What's up, who are you?"
  git diff | llmkit chat prompt=- system="Write a commit message." model=qwen3_0_6b"""

KEYS = {
    "run": "RUN_DIR",
    "sweep": "DIR",
    "url": "URL",
    "name": "NAME",
    "prompt": "TEXT",
    "system": "TEXT",
    "compare": YES_OR_NO,
    "max_new_tokens": "N",
    "temperature": "T",
}
COMMANDS = "/reset, /save FILE, /help, /quit"
# What a terminal would take for commands to itself; a model's words are not to be trusted with them.
CONTROLS: dict[int, str | None] = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)], "\N{REPLACEMENT CHARACTER}")
CONTROLS |= {ord("\n"): "\n", ord("\t"): "\t", ord("\r"): None}


def main(argv: list[str] | None = None) -> int:
    """The verb; returns the exit code."""
    return guarded(_chat, argv)


def _chat(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(HELP)
        return EXIT_DONE
    words = sort_words(
        argv,
        verb="chat",
        own=KEYS,
        nodes=("model", "storage"),
        exclusive=[("run", "sweep", "model", "url"), ("compare", "url")],
    )
    prompt, sampling = _prompt(words), _sampling(words)
    with ExitStack() as opened:
        chat = Chat(_models(words, opened), sampling, system=words.own.get("system"))
        if prompt is not None:
            chat.answer(prompt)
        else:
            _talk(chat)
    return EXIT_DONE


def _prompt(words: Words) -> str | None:
    """What is to be answered once. Raises ConfigError for words that are none."""
    prompt = words.own.get("prompt")
    if prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n")
        if not prompt:
            raise ConfigError("prompt=-: there is nothing on standard input.")
    for key, text in (("prompt", prompt), ("system", words.own.get("system"))):
        if text is not None and not _is_text(text):
            raise ConfigError(f"{key}: not UTF-8.")
    return prompt


def _is_text(text: str) -> bool:
    """Whether it is UTF-8: Python lets other bytes of the command line and of pipes through as half characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _sampling(words: Words) -> Sampling:
    given = words.own.get("temperature", "0")
    try:
        temperature = float(given)
    except ValueError:
        temperature = -1.0
    if not 0 <= temperature <= 100:
        raise ConfigError(f"temperature={given}: must be a number, 0 or more; 0 takes the likeliest token each time.")
    return Sampling(max_new_tokens=whole_number(words, "max_new_tokens"), temperature=temperature)


def _models(words: Words, opened: ExitStack) -> dict[str, Answering]:
    """Who answers, by the name that is shown where there are several; the tuned model comes last."""
    from llmkit.serving.endpoint import Endpoint, running_server

    name, compare = words.own.get("name"), words.on("compare")
    if "url" in words.own:
        endpoint = opened.enter_context(Endpoint.at(words.own["url"], name=name))
        say("model", endpoint.where)
        return {endpoint.model: endpoint}
    if name is not None:
        raise ConfigError("name: says which model of an endpoint is meant; it goes with url=URL.")
    config = composed(words.overrides)
    target = meant(words, config)
    if not compare and (found := running_server(target)):
        endpoint = opened.enter_context(Endpoint.at(found[0], name=found[1]))
        say("model", f"{target.said}, at its running server {endpoint.url}")
        return {endpoint.model: endpoint}
    with light_imports(target.run or config):
        from llmkit.serving.in_process import load_answering, load_base

    tuned = load_answering(target, config)
    say("model", f"{target.said}, {tuned.where}")
    return {"base": load_base(target, tuned), "tuned": tuned} if compare else {target.name: tuned}


@dataclass
class Chat:
    """A conversation, with each of the models its own: all hear the same questions and answer for themselves."""

    models: dict[str, Answering]
    sampling: Sampling
    system: str | None = None
    messages: dict[str, list[Message]] = field(init=False)  # by the model's name

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        start = [{"role": "system", "content": self.system}] if self.system else []
        self.messages = {name: list(start) for name in self.models}

    def answer(self, text: str, *, stoppable: bool = False) -> None:
        """Have `text` answered on standard output.

        Args:
            stoppable: Ctrl-C ends the answers under way, and what there is of them counts.
        """
        question: Message = {"role": "user", "content": text}
        answers: dict[str, list[str]] = {}
        finished: list[str] = []
        try:
            for name, model in self.models.items():
                if len(self.models) > 1:
                    print(f"{name}:", flush=True)
                answers[name] = []
                write = functools.partial(_write, kept=answers[name])
                model.reply([*self.messages[name], question], self.sampling, write)
                finished.append(name)
                print(flush=True)
        except KeyboardInterrupt:
            if not stoppable:
                raise
            print(" (stopped)", flush=True)
        for name, pieces in answers.items():
            if pieces or name in finished:  # some models have nothing to say
                self.messages[name] += [question, {"role": "assistant", "content": "".join(pieces)}]

    def save(self, file: Path) -> None:
        """Add what was said with the last model to a file, as a line to train on. Raises ConfigError."""
        messages = list(self.messages.values())[-1]
        if not any(message["role"] == "assistant" for message in messages):
            raise ConfigError("nothing was said yet.")
        try:
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ConfigError(f"{file}: cannot be written ({error.strerror}).") from error


def _write(text: str, *, kept: list[str]) -> None:
    kept.append(text)
    print(text.translate(CONTROLS) if sys.stdout.isatty() else text, end="", flush=True)


def _talk(chat: Chat) -> None:
    """Answer line after line."""
    at_terminal = sys.stdin.isatty()
    for line in _typed_lines() if at_terminal else map(str.rstrip, sys.stdin):
        try:
            if _is_command(line):
                if line.split()[0] in ("/quit", "/exit"):
                    return
                _obey(chat, line)
            elif line.strip():
                if not _is_text(line):
                    raise ConfigError("this line is not UTF-8.")
                chat.answer(line, stoppable=at_terminal)
        except LlmkitError as error:
            if not at_terminal:
                raise
            print_error(error)


def _typed_lines() -> Iterator[str]:
    """What is typed at the terminal, with line editing, to its end."""
    import readline  # noqa: F401 - gives input() its editing

    say("commands", COMMANDS)
    shown = "> " if sys.stdout.isatty() else ""
    while True:
        try:
            line = input(shown)
        except (EOFError, KeyboardInterrupt):
            print(flush=True)
            return
        yield line


def _is_command(line: str) -> bool:
    """Whether it is a word behind a slash and not a path, which may begin a question."""
    first = line.split(maxsplit=1)[:1]
    return bool(first) and first[0].startswith("/") and first[0][1:].isalpha()


def _obey(chat: Chat, line: str) -> None:
    """Do what a command says. Raises ConfigError for one that is none."""
    command, _, rest = line.strip().partition(" ")
    match command, rest.strip():
        case "/reset", "":
            chat.reset()
            say("reset", "the chat begins anew")
        case "/save", file if file:
            chat.save(Path(file).expanduser())
            say("saved", file)
        case "/help", "":
            say("commands", COMMANDS)
        case _:
            raise ConfigError(f"{line.strip()}: the commands are {COMMANDS}.")


if __name__ == "__main__":
    sys.exit(main())
