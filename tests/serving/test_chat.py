"""`llmkit chat` in this process: it answers as it was trained to; and how it feels at a terminal."""

import contextlib
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import talking
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmkit import chat
from llmkit.config import TrainConfig
from llmkit.config.schema import ModelConfig
from llmkit.data.examples import Conversation, Message
from llmkit.errors import ConfigError
from llmkit.serving.answers import AnswerError, Sampling
from llmkit.serving.in_process import InProcess, load_answering, load_base
from llmkit.serving.streaming import PieceStreamer
from llmkit.serving.target import of_model, of_run

talking_run = talking.talking_run  # a fixture
CHECKOUT = Path(__file__).parents[2]
QUESTIONS = ["Who are you?", "What is the capital of Brazil?", "Tell me the symbol of oxygen, please.", "日本 🎉 é?"]


@pytest.fixture(scope="module")
def tuned(talking_run: Path) -> InProcess:
    return load_answering(of_run(talking_run), TrainConfig())


def asked(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def reply(model: InProcess, messages: list[Message], **settings: float) -> str:
    pieces: list[str] = []
    model.reply(messages, Sampling(**{"max_new_tokens": 24} | settings), pieces.append)
    return "".join(pieces)


def answer(model: InProcess, text: str) -> str:
    """The same from a batch, without bytes at its end that a limit has cut a character in."""
    conversation = Conversation(messages=[*asked(text), {"role": "assistant", "content": ""}])
    return model.answer([conversation], max_new_tokens=24, told=lambda count: None)[0].answer.rstrip(
        "\N{REPLACEMENT CHARACTER}"
    )


# --- what is answered ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_is_streamed_is_what_is_generated_at_once(tuned, question):
    assert reply(tuned, asked(question)) == answer(tuned, question)


@pytest.mark.parametrize(
    ("base", "method", "settings"),
    [
        ("untied", "full", {}),
        ("untied", "freeze", {}),
        ("untied", "qlora", {}),
        ("tied", "lora", {"chat_template": "chat-ml"}),
        ("untied", "full", {"chat_template": "chat-ml"}),
    ],
    ids=lambda value: str(value),
)
def test_every_kind_of_run_answers_and_its_base_beside_it(make_run, base, method, settings):
    target = of_run(make_run(base, method, change=0.2, **settings))
    model = load_answering(target, TrainConfig())
    before = load_base(target, model)

    answers = [[reply(one, asked(question)) for question in QUESTIONS] for one in (before, model)]

    assert answers[1] == [answer(model, question) for question in QUESTIONS]
    assert answers[0] != answers[1]
    assert model.loaded.tokenizer.chat_template == before.loaded.tokenizer.chat_template


def test_the_base_of_an_adapter_is_the_model_it_was_trained_on(tuned, talking_run):
    target = of_run(talking_run)
    alone = load_answering(target, TrainConfig())
    alone.loaded.model.unload()

    assert [reply(load_base(target, tuned), asked(question)) for question in QUESTIONS] == [
        reply(alone, asked(question)) for question in QUESTIONS
    ]


def test_a_directory_without_a_run_has_no_base_to_compare_with(tiny_model_dir):
    target = of_model(ModelConfig(path=str(tiny_model_dir)))
    model = load_answering(target, TrainConfig())

    with pytest.raises(ConfigError, match="there is no base to compare it with"):
        load_base(target, model)


def test_a_base_model_is_asked_with_the_template_that_its_config_names(tiny_model_dir):
    target = of_model(ModelConfig(path=str(tiny_model_dir), chat_template="plain"))

    model = load_answering(target, TrainConfig())

    assert "user" in model.loaded.tokenizer.apply_chat_template(asked("?"), tokenize=False).lower()


def test_characters_are_written_whole(tiny_tokenizer):
    text = "naïve 日本語 🎉👩‍🔬 ﷽ end"
    written: list[str] = []
    streamer = PieceStreamer(tiny_tokenizer, written.append)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    tokens = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    for token in tokens:
        streamer.put(torch.tensor([token]))
    streamer.end()

    assert "".join(written) == tiny_tokenizer.decode(tokens, skip_special_tokens=True)
    assert text in "".join(written)
    assert len(tokens) > len(written) > 3  # characters of several tokens, and still piece by piece


def test_a_temperature_draws_and_zero_does_not(tuned):
    torch.manual_seed(0)
    drawn = {reply(tuned, asked("Who are you?"), temperature=2.0) for _ in range(4)}
    likeliest = {reply(tuned, asked("Who are you?")) for _ in range(2)}

    assert len(drawn) > 1
    assert len(likeliest) == 1


def test_a_conversation_that_fills_the_context_is_refused(tuned, monkeypatch):
    monkeypatch.setattr(tuned.loaded.model.config, "max_position_embeddings", 16)

    with pytest.raises(AnswerError, match="tokens and the model takes 16"):
        reply(tuned, asked("one two three four five six seven eight nine ten eleven twelve"))


def test_what_the_template_refuses_is_said(tuned, monkeypatch):
    template = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(tuned.loaded.tokenizer, "chat_template", template)

    with pytest.raises(AnswerError, match="chat template does not take this conversation: roles must alternate"):
        reply(tuned, asked("?"))


# --- the conversation ----------------------------------------------------------------------------------------------


def test_history_and_system_prompt_are_heard_and_a_reset_forgets(tuned, capsys):
    talk = chat.Chat({"tuned": tuned}, Sampling(max_new_tokens=4), system="Be brief.")
    talk.answer("one")
    talk.answer("two")

    messages = talk.messages["tuned"]
    said = capsys.readouterr().out
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert said == "".join(f"{message['content']}\n" for message in messages if message["role"] == "assistant")
    talk.reset()
    assert talk.messages["tuned"] == [{"role": "system", "content": "Be brief."}]


def test_a_saved_chat_can_be_trained_on(tuned, tmp_path, run_llmkit, capsys):
    talk = chat.Chat({"tuned": tuned}, Sampling(max_new_tokens=8))
    file = tmp_path / "mine.jsonl"
    for question in QUESTIONS[:2]:
        talk.answer(question)
        talk.save(file)

    rows = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    previewed = run_llmkit("preview", f"data.path={file}", "data.validation=null", "n=0")

    assert [len(messages) for messages in rows] == [2, 4]
    assert rows[1] == talk.messages["tuned"]
    assert "training would start" in previewed.stdout, previewed.stderr


def test_nothing_is_saved_of_a_chat_that_has_not_begun(tuned, tmp_path):
    with pytest.raises(ConfigError, match="nothing was said yet"):
        chat.Chat({"tuned": tuned}, Sampling()).save(tmp_path / "mine.jsonl")

    assert not (tmp_path / "mine.jsonl").exists()


# --- the command ---------------------------------------------------------------------------------------------------


def test_a_prompt_is_answered_on_standard_output_and_nothing_else_is(run_llmkit, tuned, talking_run):
    done = run_llmkit("chat", f"run={talking_run}", "prompt=What's up, who are you?", "max_new_tokens=24")

    assert done.stdout == reply(tuned, asked("What's up, who are you?")) + "\n"
    assert (done.returncode, done.stderr) == (0, f"model      run={talking_run}, in this process, on cpu\n")


def test_the_newest_finished_run_answers_what_is_piped_in(tuned, talking_run):
    lines = ["Who are you?", "", "/usr/bin is what?", "/reset", "Who are you?"]
    done = subprocess.run(
        [sys.executable, "-m", "llmkit", "chat", "max_new_tokens=24"],
        cwd=talking_run.parents[1],
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=True,
    )

    first = "I am a tiny model, fine-tuned with llmkit."
    history = [*asked("Who are you?"), {"role": "assistant", "content": first}, *asked("/usr/bin is what?")]
    assert done.stdout == f"{first}\n{reply(tuned, history)}\n{first}\n"
    assert f"newest     {talking_run}, the newest finished run" in done.stderr


@given(st.text(min_size=1).filter(lambda text: text != "-"))
def test_a_prompt_arrives_as_it_was_typed(text):
    words = chat.sort_words([f"prompt={text}"], verb="chat", own=chat.KEYS)

    assert chat._prompt(words) == text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["temprature=1"], "Did you mean 'temperature'?"),
        (["temperature=warm"], "temperature=warm: must be a number"),
        (["temperature=nan"], "temperature=nan: must be a number"),
        (["max_new_tokens=0"], "max_new_tokens=0: must be a whole number, 1 or more"),
        (["url=localhost:8000", "prompt=x"], "url=localhost:8000: an address is http://HOST:PORT"),
        (["url=http://127.0.0.1:1", "run=runs/a"], "run and url: one of them at a time"),
        (["url=http://127.0.0.1:1", "compare=true"], "compare and url: one of them at a time"),
        (["name=a", "prompt=x"], "name: says which model of an endpoint"),
        (["prompt=\udcff"], "prompt: not UTF-8"),
        (["prompt="], "prompt: needs a value: prompt=TEXT"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "replace").decode(),
)
def test_wrong_words_end_in_a_message(words, said, capsys):
    assert chat.main(words) == 2
    assert said in capsys.readouterr().err


# --- a terminal ----------------------------------------------------------------------------------------------------


class Terminal:
    """`llmkit chat WORDS` with a terminal of its own."""

    def __init__(self, *words: str, cwd: Path):
        self.process, self.master = self._start(words, cwd)
        self.shown = ""

    @staticmethod
    def _start(words: tuple[str, ...], cwd: Path) -> tuple[subprocess.Popen[bytes], int]:
        master, slave = pty.openpty()
        process = subprocess.Popen(
            # setsid --ctty: Ctrl-C on this terminal reaches the chat, as in a shell
            ["setsid", "--ctty", "--wait", sys.executable, "-m", "llmkit", "chat", *words],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(CHECKOUT), "TERM": "dumb", "INPUTRC": os.devnull},
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        return process, master

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, pattern: str, *, seconds: float = 120) -> str:
        """What is shown up to and with a match of the pattern, from where the last one ended."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            readable, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert readable, f"no {pattern!r} in {self.shown!r}"
            self._read()
        shown, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return shown

    def exit_code(self, again: str = "") -> int:
        """Wait for the end; where nothing happens for a while `again` is typed, as a user would."""
        with contextlib.suppress(OSError):  # how Linux says that the other side is closed
            while True:
                while again and not select.select([self.master], [], [], 5)[0]:
                    self.type(again)
                self._read()
        return self.process.wait(60)

    def _read(self) -> None:
        data = os.read(self.master, 1)
        while True:  # to the end of a character
            try:
                self.shown = (self.shown + data.decode()).replace("\r\n", "\n")
                return
            except UnicodeDecodeError:
                data += os.read(self.master, 1)


@pytest.fixture
def terminal(talking_run: Path) -> Iterator[type[Terminal]]:
    started = []

    def start(*words: str) -> Terminal:
        started.append(Terminal(*words, cwd=talking_run.parents[1]))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
        os.close(one.master)


def test_a_talk_at_a_terminal(terminal, tuned, tmp_path):
    session = terminal("max_new_tokens=24")
    session.until("commands   /reset, /save FILE, /help, /quit\n> ")
    first = "I am a tiny model, fine-tuned with llmkit."

    session.type("Who are yew\x7f\x7fou?\n")  # with a correction
    assert session.until(r"\n> ").endswith(f"\n{first}\n> ")
    session.type(f"/save {tmp_path / 'mine.jsonl'}\n")
    session.until(r"saved .*\n> ")
    session.type("/sing\n")
    session.until(re.escape("error: /sing: the commands are /reset, /save FILE, /help, /quit.\n> "))
    session.type("\x04")

    assert session.exit_code() == 0
    assert json.loads((tmp_path / "mine.jsonl").read_text()) == {
        "messages": [*asked("Who are you?"), {"role": "assistant", "content": first}]
    }


def test_ctrl_c_ends_the_answer_and_a_second_one_the_chat(terminal):
    session = terminal("model=tiny", "max_new_tokens=16000")  # which knows nothing and talks on and on
    session.until("> ")

    session.type("Who are you?\n")
    session.until(r"\n.{40}")
    session.type("\x03")
    session.until(r"\(stopped\)\n> ")
    session.type("/reset\n")
    session.until(r"the chat begins anew\n> ")
    session.type("\x03")

    # Python's input() does not see a signal that comes in the instant before it waits for a key.
    assert session.exit_code(again="\x03") == 0
