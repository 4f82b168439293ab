"""The cache of encoded rows: what is the same is found again, what differs in a character is made anew."""

import copy
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmkit.config.schema import DataConfig, SourceConfig
from llmkit.data.encoding import cache as encoded
from llmkit.data.encoding.cache import EncodedSource, EncodingOptions, encode_source
from llmkit.data.prepare import prepare_data
from llmkit.data.reading.sources import open_source

CHATS = [{"question": f"question {n}", "answer": f"answer {n}"} for n in range(8)]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def entries(cache: Path) -> set[str]:
    return {entry.name for entry in cache.glob("*") if entry.name != ".locks"} if cache.exists() else set()


def options(tokenizer, **changes) -> EncodingOptions:
    given = {"preference": False, "train_on": "assistant", "on_overlong": "error", "max_length": 64, "num_proc": 1}
    return EncodingOptions(tokenizer=tokenizer, **{"own_tokens": [], **given, **changes})


def encode(config: SourceConfig, options: EncodingOptions) -> EncodedSource:
    return encode_source(open_source(config), config, options)


def test_a_file_that_is_touched_copied_or_renamed_is_found_again(chats_file, tiny_tokenizer, cache):
    file = chats_file(*CHATS)
    first = encode(SourceConfig(path=str(file)), options(tiny_tokenizer))
    os.utime(file, (1, 1))
    renamed = file.rename(file.with_name("other.jsonl"))
    again = encode(SourceConfig(path=str(renamed)), options(tiny_tokenizer))

    assert len(entries(cache)) == 1
    assert again.digest == first.digest
    assert again.examples["input_ids"][:] == first.examples["input_ids"][:]


def test_the_place_of_a_row_names_the_file_of_today(chats_file, tiny_tokenizer, cache):
    file = chats_file(*CHATS)
    encode(SourceConfig(path=str(file)), options(tiny_tokenizer))
    renamed = file.rename(file.with_name("other.jsonl"))

    again = encode(SourceConfig(path=str(renamed)), options(tiny_tokenizer))
    assert again.place(3) == f"{renamed}, row 4"


def test_one_changed_character_of_the_same_size_and_time_is_encoded_anew(chats_file, tiny_tokenizer, cache):
    file = chats_file(*CHATS)
    os.utime(file, (1, 1))
    first = encode(SourceConfig(path=str(file)), options(tiny_tokenizer))
    file.write_text(file.read_text().replace("answer 7", "answer 8"))
    os.utime(file, (1, 1))
    second = encode(SourceConfig(path=str(file)), options(tiny_tokenizer))

    assert len(entries(cache)) == 2
    assert second.digest != first.digest


@pytest.mark.parametrize(
    "changes",
    [
        {"train_on": "all"},
        {"on_overlong": "split"},
        {"on_overlong": "truncate_prompt"},
    ],
)
def test_what_changes_the_tokens_is_encoded_anew(chats_file, tiny_tokenizer, cache, changes):
    source = SourceConfig(path=str(chats_file(*CHATS)))
    encode(source, options(tiny_tokenizer))
    encode(source, options(tiny_tokenizer, **changes))
    assert len(entries(cache)) == 2


def test_what_only_decides_which_rows_stay_is_not(chats_file, tiny_tokenizer, cache):
    source = SourceConfig(path=str(chats_file(*CHATS)))
    encode(source, options(tiny_tokenizer))
    encode(source, options(tiny_tokenizer, on_overlong="drop", max_length=20, num_proc=2))
    assert len(entries(cache)) == 1


def test_another_template_or_token_is_encoded_anew(chats_file, tiny_tokenizer, cache):
    source = SourceConfig(path=str(chats_file(*CHATS)))
    encode(source, options(tiny_tokenizer))
    other = copy.deepcopy(tiny_tokenizer)
    other.chat_template = "{# other #}" + other.chat_template
    encode(source, options(other))
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["question"])
    encode(source, options(other))
    assert len(entries(cache)) == 3


def test_other_code_is_encoded_anew(chats_file, tiny_tokenizer, cache, monkeypatch):
    source = SourceConfig(path=str(chats_file(*CHATS)))
    encode(source, options(tiny_tokenizer))
    monkeypatch.setattr(encoded, "_code_version", lambda: "another")
    encode(source, options(tiny_tokenizer))
    assert len(entries(cache)) == 2


def test_a_found_source_reads_and_encodes_nothing(chats_file, tiny_tokenizer, cache, monkeypatch):
    source = SourceConfig(path=str(chats_file(*CHATS)))
    first = encode(source, options(tiny_tokenizer))
    monkeypatch.setattr(encoded, "encode_blocks", None)
    assert encode(source, options(tiny_tokenizer)).digest == first.digest


def prepare_in_process(path: str, results) -> None:
    from llmkit.config.schema import ModelConfig
    from llmkit.model.loading import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(name="tiny"), "keep-original")
    results.put(prepare_data(DataConfig(path=path, num_proc=1), tokenizer, max_length=64).fingerprint)


def test_two_processes_at_once_share_one_entry(chats_file, tiny_tokenizer, cache):
    file = chats_file(*({"question": f"question {n}", "answer": "a"} for n in range(3000)))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=prepare_in_process, args=(str(file), results)) for _ in range(2)]
    for process in processes:
        process.start()
    fingerprints = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(30)

    assert len(fingerprints) == 1
    assert len(entries(cache)) == 1


def test_a_run_killed_while_it_writes_leaves_nothing_that_counts_and_no_process(chats_file, tiny_tokenizer, cache):
    file = chats_file(*({"question": f"question {n} " + "why " * 50, "answer": "a " * 50} for n in range(20_000)))
    code = f"""
from llmkit.config.schema import DataConfig, ModelConfig
from llmkit.data.prepare import prepare_data
from llmkit.model.loading import load_tokenizer
tokenizer = load_tokenizer(ModelConfig(name="tiny"), "keep-original")
prepare_data(DataConfig(path={str(file)!r}, num_proc=2), tokenizer, max_length=4096)
"""
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    written: list[Path] = []
    while not written and child.poll() is None:
        written = [one for one in cache.glob(".*/rows.arrow") if one.stat().st_size > 0]
        time.sleep(0.01)
    workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    child.send_signal(signal.SIGKILL)
    child.wait()

    assert workers
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert not [name for name in entries(cache) if not name.startswith(".")]
    whole = encode(SourceConfig(path=str(file)), options(tiny_tokenizer, num_proc=2))
    assert len(whole) == 20_000
    assert len(entries(cache)) == 1


def test_a_process_that_prepares_and_is_killed_is_explained(chats_file, tiny_tokenizer, cache, monkeypatch):
    from llmkit.data.encoding import workers
    from llmkit.errors import DataError

    file = chats_file(*({"question": f"question {n}", "answer": "a"} for n in range(3000)))
    monkeypatch.setattr(workers, "_encode", _die)
    with pytest.raises(DataError, match=r"was killed, probably for its memory; data\.num_proc=1"):
        encode(SourceConfig(path=str(file)), options(tiny_tokenizer, num_proc=2))
    assert entries(cache) == set()


def _die(block) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_broken_row_in_a_later_block_is_named_from_another_process(chats_file, tiny_tokenizer, cache):
    from llmkit.errors import DataError

    rows = [{"question": f"question {n}", "answer": "a"} for n in range(2500)]
    rows[2345]["answer"] = 7
    file = chats_file(*rows)
    with pytest.raises(DataError, match="row 2346"):
        encode(SourceConfig(path=str(file)), options(tiny_tokenizer, num_proc=2))
    assert json.loads(json.dumps(sorted(entries(cache)))) == []
