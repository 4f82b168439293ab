"""What a pack keeps apart of runs that take turns: time of the device, words of threads, room at rungs."""

import gc
import io
import sys
import threading
import weakref
from types import SimpleNamespace

import pytest
import transformers

from llmkit.config import TrainConfig
from llmkit.config.sweeper_schema import EarlyStopConfig
from llmkit.training.checkpoints.saving import CheckpointWriter
from llmkit.training.pack import pack as packs
from llmkit.training.pack.output import Output
from llmkit.training.pack.pack import Pack, compare_in_pack, seconds_of_device, shared_or_own
from llmkit.training.pack.width import Room
from llmkit.training.rungs import record
from llmkit.training.stopping import StopRequest

HALVING = TrainConfig(early_stop=EarlyStopConfig(name="halving", metric="eval_loss"))


@pytest.fixture
def run_pack(tmp_path, monkeypatch):
    """A function that runs one stand-in per name, one after the other, and returns what each has printed."""

    def run(work, *names):
        for name in names:
            (tmp_path / name).mkdir()
        logs = {name: io.StringIO() for name in names}
        output = Output(io.StringIO())
        monkeypatch.setattr(sys, "stdout", output)
        Pack(
            [(HALVING, tmp_path / name) for name in names],
            work,
            width=1,
            stop=StopRequest(),
            output=output,
            log=lambda run_dir: logs[run_dir.name],
        ).run()
        return {name: log.getvalue() for name, log in logs.items()}

    return run


def test_a_run_has_had_the_device_while_it_worked_and_not_while_it_waited_at_a_rung(run_pack, monkeypatch):
    now, had = [0.0], {}
    monkeypatch.setattr(packs, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def work(config, run_dir, stop):
        now[0] += {"a": 0.25, "b": 0.5, "c": 1.0}[run_dir.name]
        record(run_dir, 5, {"eval_loss": float(ord(run_dir.name))})
        if compare_in_pack()(5).goes_on:
            now[0] += 2.0
        had[run_dir.name] = seconds_of_device(0.0)

    run_pack(work, "a", "b", "c")

    assert had == {"a": 2.25, "b": 0.5, "c": 1.0}


def test_what_a_thread_of_a_run_says_while_another_has_its_turn_is_in_the_log_of_the_first(run_pack):
    other_has_its_turn, sent = threading.Event(), threading.Event()

    def send(checkpoint):
        other_has_its_turn.wait(10)
        print(f"sent {checkpoint.parents[1].name}")
        sent.set()
        return set()

    def work(config, run_dir, stop):
        if run_dir.name == "a":
            CheckpointWriter(run_dir, keep=1, warn=print, committed=send).save(1, {}, {})
        else:
            other_has_its_turn.set()
            sent.wait(10)
            print("b is at work")
        record(run_dir, 5, {"eval_loss": 1.0})
        compare_in_pack()(5)

    said = run_pack(work, "a", "b")

    assert said == {"a": "sent a\n", "b": "b is at work\n"}


def test_runs_that_wait_at_a_rung_take_what_they_keep_and_not_what_a_step_takes():
    room = Room(before=10, needed=40, there=160, kept=5)

    assert room.runs == 5
    assert [room.begun(training) for training in (1, 2, 5)] == [1 + 24, 2 + 18, 5]


def test_nothing_of_a_pack_stays_in_memory_once_it_has_run(run_pack):
    """Not even what Python's collector has been told to leave alone, as a worker does after its imports."""
    seen = []

    def work(config, run_dir, stop):
        model, _ = shared_or_own(lambda: (tiny_base(), []))
        seen.append(weakref.ref(model.get_input_embeddings().weight))
        gc.freeze()
        record(run_dir, 5, {"eval_loss": 1.0})
        compare_in_pack()(5)

    try:
        run_pack(work, "a", "b")
        gc.collect()
        assert [one() for one in seen] == [None, None]
    finally:
        gc.unfreeze()


def tiny_base():
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=24, **sizes))
