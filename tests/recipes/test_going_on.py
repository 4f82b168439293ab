"""Going on with a run: from which checkpoint, with what allowed to differ, to the same end bit for bit."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmkit import rundir
from llmkit.errors import ConfigError, Stopped

EIGHT = ("training.max_steps=8", "training.logging_steps=3", "lora.lora_dropout=0.1")


@pytest.fixture(scope="module")
def straight(train):
    """Eight steps, never interrupted, with a checkpoint at the last."""
    return train(*EIGHT, "training.save_steps=8")


@pytest.fixture
def stop_when(monkeypatch):
    """Have a signal ask for a stop at the end of a step, or while the evaluation after a step is under way."""
    from llmkit.training.stopping import StopRequest
    from llmkit.training.trainer import RunMixin

    stop = StopRequest()

    def at(step: int, *, evaluating: bool):
        method = "prediction_step" if evaluating else "training_step"
        original = getattr(RunMixin, method)

        def watched(trainer, *args, **kwargs):
            if trainer.state.global_step == (step if evaluating else step - 1):  # a step is counted at its end
                stop.signal = "SIGTERM"
            return original(trainer, *args, **kwargs)

        monkeypatch.setattr(RunMixin, method, watched)
        return stop

    yield at
    monkeypatch.undo()


def same_end(run, straight) -> None:
    for name in ("adapter_model.safetensors",):
        ours, theirs = load_file(run.final / name), load_file(straight.final / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert training_values(run) == training_values(straight)


def training_values(run) -> list[dict]:
    timed = ("tokens_per_second", "eval_seconds")
    return [{key: value for key, value in record.items() if key not in timed} for record in run.metrics()]


@pytest.mark.parametrize(("step", "evaluating"), [(4, False), (5, False), (4, True), (8, True)])
def test_a_stop_inside_a_log_interval_or_an_evaluation_changes_nothing(
    train, straight, stop_when, tmp_path, step, evaluating, monkeypatch
):
    stop = stop_when(step, evaluating=evaluating)
    stopped = train(*EIGHT, run_dir=tmp_path / "run", stop=stop)
    monkeypatch.undo()

    resumed = train(*EIGHT, run_dir=tmp_path / "run")

    assert (stopped.result["status"], stopped.result["steps"]) == ("preempted", step)
    same_end(resumed, straight)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(train, straight, tmp_path, capfd):
    from llmkit.training.checkpoints import manifest

    run_dir = tmp_path / "run"
    train(*EIGHT, "training.save_steps=2", "checkpoint.keep=9", run_dir=run_dir)
    for checkpoint in manifest.committed(run_dir)[2:]:
        weights = checkpoint / "adapter_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)

    resumed = train(*EIGHT, "training.save_steps=2", "checkpoint.keep=9", run_dir=run_dir)

    said = capfd.readouterr().err
    assert "step-00000008/adapter_model.safetensors is not what was saved" in said
    assert "step-00000006/adapter_model.safetensors is not what was saved" in said
    assert (run_dir / "checkpoints" / "damaged-step-00000008").is_dir()
    same_end(resumed, straight)


def test_a_checkpoint_of_another_run_is_gone_on_from(train, straight, tmp_path):
    train(*EIGHT, "training.save_steps=3", "checkpoint.keep=9", run_dir=tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "checkpoints" / "step-00000008")

    resumed = train(*EIGHT, f"resume={tmp_path / 'one'}", run_dir=tmp_path / "other")
    earlier = train(*EIGHT, f"resume={tmp_path / 'one/checkpoints/step-00000003'}", run_dir=tmp_path / "third")

    same_end(resumed, straight)
    same_end(earlier, straight)


def test_a_checkpoint_of_another_config_is_refused_with_what_differs_unless_that_is_allowed(train, tmp_path):
    train(*EIGHT, "training.save_steps=3", run_dir=tmp_path / "one")
    words = (*EIGHT, f"resume={tmp_path / 'one'}", "training.learning_rate=1e-4", "seed=1")

    with pytest.raises(ConfigError) as refused:
        train(*words, run_dir=tmp_path / "two")
    went_on = train(*words, "resume_allow=[training.learning_rate,seed]", run_dir=tmp_path / "three")

    said = str(refused.value)
    assert "seed: 42 -> 1\n  training.learning_rate: 0.003 -> 0.0001" in said
    assert "'resume_allow=[seed,training.learning_rate]'" in said
    assert [record["step"] for record in went_on.metrics() if "loss" in record][-1] == 8


def test_resume_from_what_is_no_whole_checkpoint_names_those_that_are(train, tmp_path):
    train(*EIGHT, "training.save_steps=4", run_dir=tmp_path / "one")
    damaged = tmp_path / "one/checkpoints/step-00000008"
    (damaged / "optimizer.pt").unlink()

    with pytest.raises(ConfigError, match=r"holds no complete checkpoint.*Complete ones there: 4"):
        train(*EIGHT, f"resume={damaged}", run_dir=tmp_path / "two")


def test_a_finished_run_is_trained_further_where_that_is_allowed(train, tmp_path):
    from llmkit.launchers.prepare import finished_result

    run_dir = tmp_path / "run"
    first = train(*EIGHT, "training.save_steps=8", run_dir=run_dir)
    rundir.write_result(run_dir, **first.result)  # as the worker does
    longer = (*EIGHT[1:], "training.max_steps=10", "training.save_steps=8", "resume_allow=[training.max_steps]")

    further = train(*longer, run_dir=run_dir)
    rundir.write_result(run_dir, **further.result)

    assert first.result["steps"] == 8
    assert further.result["steps"] == 10
    assert [record["step"] for record in further.metrics() if "loss" in record] == [1, 3, 6, 8, 9, 10]
    assert finished_result(further.config, run_dir)["steps"] == 10


def test_never_starts_over_and_keeps_what_was_there(train, tmp_path, capfd):
    run_dir = tmp_path / "run"
    first = train(*EIGHT, "training.save_steps=3", run_dir=run_dir)
    weights = (run_dir / "final" / "adapter_model.safetensors").read_bytes()

    again = train(*EIGHT, "resume=never", run_dir=run_dir)

    aside = tmp_path / "run.before-1"
    assert f"is now in {aside}" in capfd.readouterr().out
    assert (aside / "final" / "adapter_model.safetensors").read_bytes() == weights
    assert (aside / "checkpoints" / "step-00000008").is_dir()
    assert training_values(again) == training_values(first)
    assert not Path(run_dir, "checkpoints", "step-00000003").exists()


def test_the_best_of_a_run_stopped_in_its_last_evaluation_is_that_of_the_whole_run(
    train, stop_when, tmp_path, monkeypatch
):
    words = (*EIGHT, "training.final=best")
    straight = train(*words)
    stop = stop_when(8, evaluating=True)
    stopped = train(*words, run_dir=tmp_path / "run", stop=stop)
    monkeypatch.undo()

    resumed = train(*words, run_dir=tmp_path / "run")

    assert stopped.result["status"] == "preempted"
    assert resumed.result["final_is"] == straight.result["final_is"] == "best"
    same_end(resumed, straight)


def test_a_stop_while_an_evaluation_is_made_up_for_loses_nothing(train, straight, stop_when, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    train(*EIGHT, run_dir=run_dir, stop=stop_when(4, evaluating=True))
    monkeypatch.undo()
    with pytest.raises(Stopped, match="in an evaluation"):
        train(*EIGHT, run_dir=run_dir, stop=stop_when(4, evaluating=True))
    monkeypatch.undo()

    same_end(train(*EIGHT, run_dir=run_dir), straight)


def test_a_stop_after_the_last_step_ends_before_what_is_measured_then(train, straight, tmp_path, monkeypatch):
    from llmkit.training.session import Session
    from llmkit.training.stopping import StopRequest

    stop, measure = StopRequest(), Session.measure_result

    def ask(session):
        session.trainer.writer.wait()
        stop.signal = "SIGTERM"
        measure(session)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "measure_result", ask)
        stopped = train(*EIGHT, run_dir=tmp_path / "run", stop=stop)

    assert stopped.result["status"] == "preempted"
    assert not stopped.final.exists()
    same_end(train(*EIGHT, run_dir=tmp_path / "run"), straight)


def test_a_run_may_be_made_shorter_than_it_has_become(train, tmp_path):
    train(*EIGHT, "training.save_steps=4", run_dir=tmp_path / "run")
    shorter = ["training.max_steps=6", "resume_allow=[training.max_steps]"]

    run = train(*EIGHT[1:], "training.save_steps=4", *shorter, run_dir=tmp_path / "run")

    assert run.result["status"] == "completed"
