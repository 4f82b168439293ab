"""`llmkit preview`: what would be learnt, to the token; whether training would start; and a page of it."""

import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llmkit import preview
from llmkit.config.arguments import parse_arguments
from llmkit.config.check import check_overrides
from llmkit.config.schema import DataConfig
from llmkit.data.prepare import prepare_data
from llmkit.data.preview.pieces import Gap, Piece
from llmkit.data.preview.rows import Section, ShownRow
from llmkit.data.preview.terminal import PreviewPrinter

SHARED = Path(__file__).parents[1] / "../shared/data"
HEAVY = ("torch", "trl", "peft", "accelerate", "matplotlib", "bitsandbytes", "wandb")


def chat(*contents: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]}


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    """A test's own directory, no colour from the machine, and an environment that stays as it was."""
    monkeypatch.chdir(tmp_path)
    for name in ("NO_COLOR", "FORCE_COLOR", "TRANSFORMERS_NO_ADVISORY_WARNINGS", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def show(capsys):
    """A function: run the preview of these words; returns the exit code, its output and its errors."""

    def run(*words) -> tuple[int, str, str]:
        code = preview.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


def learnt(out: str) -> list[str]:
    """What stands between the marks, without the borders of tokens."""
    rows = out[: out.index("\nsources")].partition("\n\n")[2]
    return [found.replace("│", "") for found in re.findall("⟦(.*?)⟧", rows, re.S)]


# The rows


def test_the_demo_is_shown_with_what_is_learnt_of_it(show):
    code, out, _ = show("n=2")

    assert code == 0
    assert learnt(out)[0] == "I am a tiny model, fine-tuned with llmkit.<|end|>"
    assert "<|bos|>│<|user|>│Who│ are│ you│?│<|end|>│<|assistant|>⟦I│ am" in out
    assert out.splitlines()[-1] == "training would start"


def test_what_is_shown_as_learnt_is_what_the_labels_are(show, chats_file, tiny_tokenizer):
    rows = [chat("Hi", "Hello\n\n  you  ", "Who?", "日本 🍕 é"), chat("x", "y")]
    path = chats_file(*rows)
    _, out, _ = show(f"data.path={path}", "data.validation=null", "n=2")

    prepared = prepare_data(DataConfig(path=str(path), validation=None), tiny_tokenizer, max_length=2048)
    expected = [tiny_tokenizer.decode([i for i in row if i != -100]) for row in prepared.train.dataset["labels"]]
    found = [text.replace("↵\n", "\n") for text in learnt(out)]
    assert found == ["Hello\n\n  you  <|end|>", "日本 🍕 é<|end|>", "y<|end|>"]
    assert ["".join(found[:2]), found[2]] == expected


@pytest.mark.parametrize(("count", "shown"), [(0, 0), (1, 1), (3, 3), (100, 4)])
def test_n_rows_are_shown(show, chats_file, count, shown):
    path = chats_file(*(chat(f"{n}?", str(n)) for n in range(4)))
    _, out, _ = show(f"data.path={path}", "data.validation=null", f"n={count}")

    assert out.count("chats.jsonl, row ") - out.split("longest rows")[1].count("chats.jsonl, row ") == shown
    assert ("⟦learnt⟧" in out) == (shown > 0)


def test_every_source_and_every_held_out_file_shows_a_row(show, chats_file):
    one = chats_file(chat("1?", "one"), chat("2?", "two"), name="one.jsonl")
    two = chats_file({"question": "3?", "answer": "three"}, name="two.jsonl")
    held = chats_file({"instruction": "4?", "output": "four"}, name="held.jsonl")
    _, out, _ = show(f"data.datasets=[{{path: {one}}}, {{path: {two}}}]", f"data.validation={held}", "n=1")

    assert learnt(out) == ["one<|end|>", "three<|end|>", "four<|end|>"]
    assert f"validation: {held}, row 1" in out


def test_the_first_row_at_fault_is_shown_with_its_fault(show, chats_file):
    rows = [chat(f"{n}?", str(n)) for n in range(9)]
    path = chats_file(*rows, chat("q", " "), chat("q", "word " * 60))
    code, out, err = show(f"data.path={path}", "data.validation=null", "n=1", "data.max_length=50")

    assert code == 1
    assert f"{path}, row 10  (stops training: nothing to learn from)" in out
    assert re.search(rf"{path}, row 11  \(stops training: \d+ tokens, 50 at most\)", out)
    assert "training would stop at this data" in out
    assert "1 of 11 rows exceed 50 tokens" in err
    assert "1 of 11 rows have nothing to learn from" in err


def test_a_row_that_is_dropped_says_so_and_stops_nothing(show, chats_file):
    path = chats_file(chat("1?", "one"), chat("q", " "))
    code, out, _ = show(f"data.path={path}", "data.validation=null", "data.on_empty=drop")

    assert code == 0
    assert "row 2  (dropped: nothing to learn from)" in out
    assert "warning: 1 of 2 train rows are dropped" in out


def test_of_a_pair_both_sides_are_shown(show, chats_file):
    path = chats_file({"prompt": "One?", "chosen": "Yes.", "rejected": "Never!"})
    code, out, _ = show("recipe=dpo", f"data.path={path}", "data.validation=null")

    assert code == 0
    assert learnt(out) == ["Yes.<|end|>", "Never!<|end|>"]
    assert [line.partition(":")[0] for line in out.splitlines() if re.match(r"(prompt|chosen|rejected): ", line)] == [
        "prompt",
        "chosen",
        "rejected",
    ]


def test_a_long_answer_is_shortened_and_its_end_stays_in_sight(show, chats_file):
    path = chats_file(chat("q", "begin " + "word " * 400 + "finish"))
    _, out, _ = show(f"data.path={path}", "data.validation=null")

    (answer,) = learnt(out)
    assert answer.startswith("begin word")
    assert answer.endswith("finish<|end|>")
    assert re.search(r" … [\d,]+ tokens, [\d,]+ of them learnt … ", answer)


def test_nothing_in_the_data_reaches_the_terminal_as_a_command(show, chats_file):
    path = chats_file(chat("\x1b[2J\u202e[bold]x[/bold]", "\x07:smile:\x9b31m"))
    _, out, _ = show(f"data.path={path}", "data.validation=null")

    assert not set(out) & {"\x1b", "\x07", "\x9b", "\u202e"}
    assert "␛[2J\\u202e[bold]x[/bold]" in out.replace("│", "")
    assert learnt(out) == ["␇:smile:\\x9b31m<|end|>"]


# In colour and without


def shown(color: bool | None, *parts: Piece | Gap, name: str = "") -> str:
    file = io.StringIO()
    section = Section(name=name, tokens=len(parts), learnt=1, parts=list(parts))
    PreviewPrinter(file, color=color).rows([ShownRow(split="train", place="f, row 1", remark="", sections=[section])])
    return file.getvalue()


def colors(out: str, text: str) -> str:
    """The codes that stand before a text."""
    (found,) = re.findall(rf"\x1b\[([\d;]+)m{re.escape(text)}\x1b\[0m", out)
    return found


def test_learnt_masked_special_and_new_tokens_have_colours_of_their_own():
    pieces = [
        Piece("asked", (7,), False, "ordinary"),
        Piece("said", (8,), True, "ordinary"),
        Piece("<end>", (1,), True, "special"),
        Piece("<start>", (2,), False, "special"),
        Piece("<mine>", (9,), False, "new"),
    ]
    out = shown(True, *pieces)

    assert len({colors(out, piece.text) for piece in pieces}) == 5
    assert "4" in colors(out, "<mine>").split(";")  # underlined
    assert "⟦" not in out
    for words in (" learnt ", " not learnt ", " special, learnt ", " new token "):
        assert colors(out, words)


def test_two_tokens_side_by_side_differ_in_shade():
    out = shown(True, Piece("one", (7,), True, "ordinary"), Piece("two", (8,), True, "ordinary"))

    assert colors(out, "one") != colors(out, "two")


def test_what_is_made_unlikely_is_not_coloured_as_learnt():
    piece = Piece("said", (8,), True, "ordinary")

    assert colors(shown(True, piece, name="chosen"), "said") != colors(shown(True, piece, name="rejected"), "said")


def test_without_colour_marks_say_what_is_learnt():
    pieces = [Piece(text, (7,), text != "asked", "ordinary") for text in ("asked", "said\n", "more")]
    out = shown(None, *pieces, Gap(3, 2), Piece("end", (1,), True, "special"))

    assert "asked⟦said↵\nmore … 3 tokens, 2 of them learnt … end⟧" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(("env", "colored"), [({}, False), ({"NO_COLOR": "1"}, False), ({"FORCE_COLOR": "1"}, True)])
def test_colour_is_for_terminals_and_for_those_who_ask(show, monkeypatch, env, colored):
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    _, out, _ = show("n=1")

    assert ("\x1b[" in out) == colored
    assert ("⟦" in out) != colored


# The audit


def test_the_audit_shows_sources_splits_lengths_and_the_longest(show, chats_file):
    rows = [chat(f"{n}?", "word " * n) for n in range(1, 31)]
    path = chats_file(*rows, rows[0])
    _, out, _ = show(f"data.path={path}", "data.validation=0.2", "data.packing=bfd", "n=0")

    for words in ("sources", "splits", "longest rows", "tokens per row, train", "tokens per row, validation", "█"):
        assert words in out
    assert re.search(rf"{path} +messages +train, validation +31 ", out)
    assert re.search(r"packed rows: \d of 2,048 tokens, \d+\.\d% filled", out)
    histogram = out.split("\ntokens per row, train\n")[1].split("\n\n")[0]
    rows = int(re.search(r"^rows +(\d+)", out, re.M)[1])
    assert sum(int(line.split()[-1]) for line in histogram.splitlines()) == rows


def test_the_terminals_histogram_counts_every_row(show):
    from llmkit.data.preview.terminal import histogram

    distribution = {"edges": list(range(22)), "counts": [*range(20), 7], "max": 20}
    lines = list(histogram(distribution))

    assert sum(int(line.split()[-1]) for line in lines) == sum(distribution["counts"])
    assert lines[0].split()[:3] == ["0", "-", "2"]
    assert lines[-1].split()[:3] == ["18", "-", "20"]


def test_what_a_preview_prepares_is_what_a_run_takes_from_the_cache(
    show, chats_file, tiny_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))
    path = chats_file()
    show(f"data.path={path}")
    prepared = sorted((tmp_path / "cache" / "data").iterdir())
    prepare_data(DataConfig(path=str(path)), tiny_tokenizer, max_length=2048)

    assert sorted((tmp_path / "cache" / "data").iterdir()) == prepared


def test_a_preview_leaves_nothing_in_the_directory(show, tmp_path):
    show("n=1", "name=alpha")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["data=gsm8k", f"data.path={SHARED / 'gsm8k'}", "data.limit=300"],
        [f"data.path={SHARED / 'llama-factory' / 'alpaca_en_demo.json'}", "data.limit=300"],
        ["recipe=dpo", f"data.path={SHARED / 'llama-factory' / 'dpo_en_demo.json'}", "data.limit=300"],
    ],
    ids=["gsm8k", "alpaca", "dpo"],
)
def test_real_data_is_shown(show, words):
    if not SHARED.is_dir():
        pytest.skip("shared/data, real data sets beside the checkout, is not here")
    code, out, err = show(*words, "data.max_length=16000", "n=2", "data.num_proc=1")

    assert code == 0, err
    assert len(learnt(out)) >= 2
    assert all(answer.endswith("<|end|>") for answer in learnt(out))


# Exit codes and wrong commands


def test_a_broken_row_stops_training_and_the_message_names_it(show, chats_file):
    path = chats_file(chat("q", "a"), {"messages": 3})
    code, _, err = show(f"data.path={path}", "data.validation=null")

    assert code == 1
    assert f"{path}, row 2" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lora.rank=4"], "lora.r"),
        (["data.path=nowhere.jsonl"], "nowhere.jsonl: does not exist"),
        (["-m", "lora.r=4,8"], "a preview shows one config"),
        (["sweeper=random", "sweeper.n=2", "lora.r=choice(4,8)"], "sweeper=random: a preview shows one config"),
        (["n=few"], "n=few: must be a whole number"),
        (["n=-1"], "n=-1: must be a whole number"),
        (["--color"], "--color: unknown switch"),
        (["data.max_length=20000"], "data.max_length=20000"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_is_one_message(show, words, said):
    code, out, err = show(*words)

    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert out == ""


def test_a_config_file_comes_first_and_the_command_line_wins(show, chats_file, tmp_path):
    path = chats_file(chat("q", "first", "r", "second"))
    (tmp_path / "my.yaml").write_text(f"data:\n  path: {path}\n  validation: null\n  train_on: last\n")

    assert learnt(show("my.yaml", "n=1")[1]) == ["second<|end|>"]
    assert learnt(show("n=1", "my.yaml", "data.train_on=assistant")[1]) == ["first<|end|>", "second<|end|>"]


def test_the_help_names_its_words_and_exit_codes(show):
    code, out, _ = show("--help")

    assert code == 0
    for word in ("n=N", "--html", "Exit code"):
        assert word in out


@pytest.mark.parametrize(
    "line", [line for line in preview.HELP.splitlines() if line.startswith("  llmkit preview ")], ids=str.strip
)
def test_the_examples_of_the_help_are_commands_that_work(line, tmp_path):
    words = line.split()[2:]
    for word in words:
        if word.endswith(".yaml"):
            (tmp_path / word).parent.mkdir(parents=True)
            (tmp_path / word).write_text("seed: 1\n")
    _, rest = preview._own_words(words)

    assert check_overrides(parse_arguments(rest).overrides, multirun=False) == []


# The page


class Reader(HTMLParser):
    """What a browser would make of a page: elements with their attributes, and texts by the class around them."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._classes: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._classes.append(dict(attrs).get("class") or "")

    def handle_endtag(self, tag: str) -> None:
        self._classes.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self._classes[-1] if self._classes else "", data))

    def text(self, name: str) -> str:
        return "".join(data for classes, data in self.texts if name in classes.split())


def page_of(path: Path) -> Reader:
    # Void elements have no end.
    return Reader(re.sub(r"<meta ([^>]*)>", r"<meta \1/>", path.read_text(encoding="utf-8")))


EVIL = chat("</b><script>alert(1)</script>&amp;<img src=x onerror=alert(2)>", "</style>\"'<b class=no>", "q", "last")


def test_the_page_shows_rows_audit_and_plots(show, chats_file, tmp_path):
    path = chats_file(*(chat(f"{n}?", f"answer {n}") for n in range(9)))
    code, out, _ = show(f"data.path={path}", "data.validation=null", "n=2", "html=page.html")
    page = page_of(tmp_path / "page.html")

    assert code == 0
    assert "page: page.html" in out
    legend = "learntspecial, learnt"
    assert page.text("yes") == f"{legend}answer 0<|end|>answer 1<|end|>"
    assert page.text("good") == "training would start"
    tags = [tag for tag, _ in page.elements]
    assert tags.count("svg") == 1
    assert tags.count("table") == 3
    assert {"longest rows", "sources", "splits"} <= {data for _, data in page.texts}
    assert "tokens per row, train" in {data for _, data in page.texts}  # the title of a plot


def test_rows_are_text_on_the_page_whatever_they_hold(show, chats_file, tmp_path):
    show(f"data.path={chats_file(EVIL)}", "data.validation=null", "--html")
    page = page_of(tmp_path / "preview.html")

    assert {tag for tag, _ in page.elements} & {"script", "img", "iframe", "link", "object"} == set()
    assert "<script>alert(1)</script>&amp;<img src=x onerror=alert(2)>" in page.text("no")
    assert "</style>\"'<b class=no><|end|>" in page.text("yes")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_the_page_needs_nothing_but_itself(show, tmp_path):
    show("--html=page.html", "n=1")
    text, page = (tmp_path / "page.html").read_text(), page_of(tmp_path / "page.html")

    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "data"):
            assert (attributes.get(name) or "#").startswith("#")
    assert set(re.findall(r"https?://[^\"\s]+", text)) <= {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
    assert "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    (policy,) = (a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_the_page_and_its_plots_follow_the_readers_dark_or_light(show, tmp_path):
    show("--html", "n=1")
    text = (tmp_path / "preview.html").read_text()
    drawing = text[text.index("<svg") : text.index("</svg>")]

    assert "prefers-color-scheme: dark" in text
    assert set(re.findall(r"(?:fill|stroke): *([^;\"]+)", drawing)) <= {"none", "currentColor", "var(--bar)"}
    assert "var(--bar)" in drawing


def test_a_pair_on_the_page_tells_chosen_from_rejected(show, chats_file, tmp_path):
    path = chats_file({"prompt": "One?", "chosen": "Yes.", "rejected": "Never!"})
    show("recipe=dpo", f"data.path={path}", "data.validation=null", "--html")
    page = page_of(tmp_path / "preview.html")

    assert "Yes.<|end|>" in page.text("yes")
    assert "Never!<|end|>" in page.text("un")


def test_new_tokens_are_marked_as_new(show, chats_file, tmp_path):
    path = chats_file(chat("<Q>one", "two"))
    show(f"data.path={path}", "data.validation=null", "data.special_tokens=[<Q>]", "--html")

    assert page_of(tmp_path / "preview.html").text("new") == "new token<Q>"


def test_tokens_listed_beside_the_rows_are_new_tokens_too(show, chats_file, tmp_path):
    path = chats_file(chat("<Q>one", "two"))
    (tmp_path / "tokens.json").write_text(json.dumps({"tokens": ["<Q>"]}))
    _, out, _ = show(f"data.path={path}", "data.validation=null")

    assert "│<Q>│" in out


def test_a_page_says_why_training_would_stop(show, chats_file, tmp_path):
    code, _, _ = show(f"data.path={chats_file(chat('q', ' '))}", "data.validation=null", "--html", "sub/p.html")

    assert code == 1
    assert "nothing to learn from" in page_of(tmp_path / "sub" / "p.html").text("bad")


def test_an_earlier_page_is_replaced_and_nothing_else_ever_is(show, tmp_path):
    show("n=1", "--html", "page.html")
    first = (tmp_path / "page.html").read_text()
    assert show("n=2", "--html", "page.html")[0] == 0
    assert (tmp_path / "page.html").read_text() != first

    (tmp_path / "mine.html").write_text("<p>mine</p>")
    code, out, err = show("n=1", "--html", "mine.html")
    assert (code, out) == (2, "")
    assert "html=mine.html: is there already" in err
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "mine.html"}


@pytest.mark.parametrize("place", ["", "file/page.html"], ids=["a directory", "below a file"])
def test_a_page_that_cannot_be_written_is_one_message(show, tmp_path, place):
    (tmp_path / "file").write_text("")
    code, _, err = show("n=0", f"html={tmp_path / place}")

    assert code == 2
    assert "html=" in err
    assert "Traceback" not in err


# As a command


def run_alone(words: list[str], cwd: Path) -> list[str]:
    """Run a preview as the installed command does; returns the heavy modules that it imported."""
    program = (
        "import sys\nsys.argv = ['llmkit', *sys.argv[1:]]\nfrom llmkit.cli import main\ncode = main()\n"
        f"print('heavy:', *[name for name in {HEAVY!r} if sys.modules.get(name)])\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "preview", *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(Path(preview.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "PyTorch was not found" not in done.stdout + done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize("words", [["n=1"], ["recipe=dpo", "n=1"], ["data.packing=bfd"]], ids=" ".join)
def test_the_command_does_without_torch(tmp_path, words):
    assert run_alone(words, tmp_path) == []


def test_the_help_imports_nothing_heavy(tmp_path):
    program = (
        "import sys\nfrom llmkit.cli import main\nmain(['preview', '--help'])\n"
        "print(*[name for name in ('torch', 'transformers', 'datasets', 'rich', 'matplotlib') if name in sys.modules])"
    )
    env = os.environ | {"PYTHONPATH": str(Path(preview.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)

    assert done.stdout.splitlines()[-1] == ""


def test_in_a_process_that_is_not_its_own_nothing_is_hidden(show):
    show("n=0")

    assert sys.modules.get("torch", "absent") is not None
    assert "TRANSFORMERS_NO_ADVISORY_WARNINGS" not in os.environ
