"""What a finished run leaves behind, as the contract of the run directory has it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llmkit.config import load
from llmkit.errors import ConfigError, NonFiniteError

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's deprecations inside real training runs


@pytest.fixture(scope="module")
def finished(train):
    return train("evaluation=default", "training.max_steps=12", "training.eval_steps=4", "training.logging_steps=2")


def test_result_holds_every_figure_of_the_contract(finished):
    result = finished.result

    assert result["status"] == "completed"
    assert result["error"] is None
    assert result["steps"] == 12
    assert result["objective"] == result["eval_loss"] < result["base"]["eval_loss"]
    assert result["peak_memory_bytes"] > 10**7
    assert result["device_seconds"] == result["seconds"] > 0
    assert result["cost"] is None
    assert result["final_is"] == "last"
    assert result["method"] == "lora"
    assert len(result["dataset_fingerprint"]) == 32
    assert result["versions"]["trl"]
    assert (finished.run_dir / result["model_dir"] / "adapter_model.safetensors").exists()


def test_metrics_have_one_record_per_log_event_with_the_contracts_names(finished):
    records = finished.metrics()

    training = [record for record in records if "loss" in record]
    assert [record["step"] for record in training] == [1, 2, 4, 6, 8, 10, 12]
    for record in training:
        assert {"epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"} <= record.keys()
    evaluations = [record for record in records if "eval_loss" in record]
    assert [record["step"] for record in evaluations] == [0, 4, 8, 12]
    assert evaluations[-1]["eval_loss"] == finished.result["eval_loss"]


def test_tokens_count_every_token_trained_on_and_no_padding(finished):
    from llmkit.data.prepare import prepare_data
    from llmkit.model.loading import load_tokenizer

    data = prepare_data(finished.config.data, load_tokenizer(finished.config.model, "keep-original"), max_length=64)

    passes = 12 * 16 / len(data.train)
    assert finished.result["tokens"] == pytest.approx(data.train.tokens * passes, rel=0.05)


def test_config_is_complete_repeatable_and_says_what_was_filled_in(finished):
    config = load(finished.run_dir)

    assert config.precision.name == "fp32"
    assert config.hardware.device == "cpu"
    assert config.data.max_length == 2048
    assert config.lora.lora_alpha == 16
    assert {"precision.name", "hardware.device", "data.max_length", "lora.lora_alpha"} <= set(config.derived)


def test_final_carries_tokenizer_template_generation_config_and_card(finished):
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(finished.final)
    assert (finished.final / "chat_template.jinja").read_text() == tokenizer.chat_template
    assert tokenizer.convert_tokens_to_ids("<|end|>") in GenerationConfig.from_pretrained(finished.final).eos_token_id
    card = (finished.final / "README.md").read_text()
    assert finished.result["base_model"] in card
    assert "AutoPeftModelForCausalLM" in card


def test_samples_and_plot_are_kept(finished):
    samples = [json.loads(line) for line in (finished.run_dir / "samples.jsonl").read_text().splitlines()]

    assert [sample["step"] for sample in samples] == [step for step in (0, 4, 8, 12) for _ in range(3)]
    assert samples[0]["expected"]
    assert (finished.run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_final_best_holds_the_weights_of_the_best_evaluation(train, tmp_path):
    # A rate this high is best at its first evaluation and worse from then on.
    overrides = [
        "training.learning_rate=0.02",
        "training.lr_scheduler_type=constant",
        "training.eval_steps=5",
        "seed=1",
    ]
    best = train(*overrides, "training.max_steps=40", "training.final=best")
    last = train(*overrides, "training.max_steps=40", "training.final=last")

    losses = {r["step"]: r["eval_loss"] for r in best.metrics() if "eval_loss" in r}
    assert best.result["final_is"] == "best"
    assert best.result["final_step"] == min(losses, key=losses.__getitem__)
    assert best.result["eval_loss"] == pytest.approx(min(losses.values()), rel=1e-4)
    assert best.result["eval_loss"] < last.result["eval_loss"]
    weights = load_file(best.final / "adapter_model.safetensors")
    other = load_file(last.final / "adapter_model.safetensors")
    assert any(not torch.equal(weights[name], other[name]) for name in weights)
    assert not list(best.run_dir.glob(".best*"))


def test_a_price_makes_a_cost(train):
    run = train("hardware=cpu", "hardware.price_per_hour=3600")

    assert run.result["cost"] == pytest.approx(run.result["seconds"], abs=0.006)  # which is rounded to hundredths


def test_without_held_out_rows_the_objective_is_the_training_loss(train):
    run = train("data.validation=null")

    assert run.result["eval_loss"] is None
    assert run.result["objective"] == run.result["train_loss"]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(train):
    first, again, other = train("seed=3"), train("seed=3"), train("seed=4")

    def weights(run):
        return load_file(run.final / "adapter_model.safetensors")

    assert all(torch.equal(weights(first)[name], tensor) for name, tensor in weights(again).items())
    assert any(not torch.equal(weights(first)[name], tensor) for name, tensor in weights(other).items())


def test_accumulating_small_batches_equals_one_large_batch(train):
    one = train("training.per_device_train_batch_size=16", "training.gradient_accumulation_steps=1")
    many = train("training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=16")

    for left, right in zip(one.metrics(), many.metrics(), strict=True):
        for key in {"loss", "grad_norm", "eval_loss"} & left.keys():
            assert left[key] == pytest.approx(right[key], rel=1e-4), (left["step"], key)


def test_the_evaluation_loss_is_the_mean_over_tokens_whatever_the_batch_size(train):
    losses = [
        train(f"training.per_device_eval_batch_size={size}", "training.max_steps=1").result["eval_loss"]
        for size in (1, 7, 64)
    ]

    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_gradient_checkpointing_changes_nothing_but_memory(train):
    plain = train("method=full")
    saving = train("method=full", "training.gradient_checkpointing=true")

    assert saving.result["train_loss"] == pytest.approx(plain.result["train_loss"], rel=1e-5)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.float32), ("bf16_pure", torch.bfloat16)])
def test_bfloat16_trains_weights_in_the_dtype_it_promises(train, precision, dtype):
    run = train("method=full", f"precision={precision}")

    weights = load_file(run.final / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}


def test_a_precision_the_device_lacks_is_refused_with_the_alternatives(train):
    with pytest.raises(ConfigError, match=r"precision=fp16.*fp32.*bf16.*auto"):
        train("precision=fp16")


def test_training_stops_at_the_first_non_finite_value_and_keeps_the_batch(train, tmp_path):
    run_dir = tmp_path / "run"

    with pytest.raises(NonFiniteError, match=r"step \d+.*not a finite number.*learning_rate"):
        train("method=full", "training.learning_rate=1e37", "training.max_steps=20", run_dir=run_dir)

    kept = json.loads((run_dir / "nonfinite_batch.json").read_text())
    assert kept["step"] > 1
    assert len(kept["batches"][0]["texts"]) == 16
    assert "<|user|>" in kept["batches"][0]["texts"][0]
    assert not (run_dir / "final").exists()


def test_a_stop_asked_for_when_the_last_step_is_done_loses_nothing(train, monkeypatch):
    from llmkit.training.session import Session
    from llmkit.training.stopping import StopRequest

    stop = StopRequest()
    train_all = Session.train

    def train_then_ask(session):
        train_all(session)
        stop.signal = "SIGTERM"

    monkeypatch.setattr(Session, "train", train_then_ask)
    run = train(stop=stop)

    assert run.result["status"] == "completed"
    assert (run.final / "adapter_model.safetensors").exists()


def test_the_training_loss_is_the_mean_over_all_steps(train):
    every = train("training.max_steps=7", "training.logging_steps=1")
    some = train("training.max_steps=7", "training.logging_steps=5")

    losses = [record["loss"] for record in every.metrics() if "loss" in record]
    assert every.result["train_loss"] == pytest.approx(sum(losses) / 7)
    assert [record["step"] for record in some.metrics() if "loss" in record] == [1, 5, 7]
    assert some.result["train_loss"] == pytest.approx(every.result["train_loss"], rel=1e-5)


@pytest.mark.parametrize("final", ["last", "best"])
def test_the_interval_of_the_held_out_loss_is_that_of_the_same_rows_as_a_test(train, chats_file, final):
    rows = chats_file(*({"question": f"{n}?", "answer": str(n) * (1 + n % 7)} for n in range(20)))
    words = [f"data.validation={rows}", f"data.test={rows}", f"training.final={final}", "training.max_steps=4"]
    result = train(*words, "training.eval_steps=2").result

    tested = result["test"]["loss"]
    assert result["eval_loss"] == pytest.approx(tested["value"], rel=1e-5)
    assert result["eval_loss_interval"] == pytest.approx([tested["low"], tested["high"]], rel=1e-5)


def test_a_stopped_run_saves_its_step_and_the_same_config_goes_on_from_it(train, tmp_path, monkeypatch):
    from llmkit.training.callbacks import Saving
    from llmkit.training.stopping import StopRequest

    stop, end_of_step = StopRequest(), Saving.on_step_end

    def ask_at_step_3(callback, args, state, control, **more):
        stop.signal = "SIGINT" if state.global_step == 3 else None
        end_of_step(callback, args, state, control, **more)

    run_dir = tmp_path / "run"
    steps = ["training.max_steps=8", "training.logging_steps=1", "lora.lora_dropout=0.1"]
    with monkeypatch.context() as patch:
        patch.setattr(Saving, "on_step_end", ask_at_step_3)
        stopped = train(*steps, run_dir=run_dir, stop=stop)
    assert stopped.result["steps"] == 3
    assert stopped.result["status"] == "preempted"
    assert (run_dir / "checkpoints" / f"step-{stopped.result['steps']:08d}" / "MANIFEST.json").exists()
    assert not (run_dir / "final").exists()

    resumed = train(*steps, run_dir=run_dir)
    straight = train(*steps)

    assert resumed.result["status"] == "completed"
    assert [r["step"] for r in resumed.metrics() if "loss" in r] == list(range(1, 9))
    for key in ("train_loss", "eval_loss", "tokens"):
        assert resumed.result[key] == straight.result[key], key
    ours, theirs = (load_file(run.final / "adapter_model.safetensors") for run in (resumed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_is_stopped_between_two_log_events_counts_the_steps_since_the_first(train, monkeypatch):
    from llmkit.training.callbacks import Saving
    from llmkit.training.stopping import StopRequest

    stop, end_of_step = StopRequest(), Saving.on_step_end

    def ask_at_step_3(callback, args, state, control, **more):
        stop.signal = "SIGINT" if state.global_step == 3 else None
        end_of_step(callback, args, state, control, **more)

    monkeypatch.setattr(Saving, "on_step_end", ask_at_step_3)
    every, some = (train("training.max_steps=8", f"training.logging_steps={n}", stop=stop) for n in (1, 5))

    assert (every.result["steps"], some.result["steps"]) == (3, 3)
    assert some.result["tokens"] == every.result["tokens"] > 0
    assert some.result["train_loss"] == pytest.approx(every.result["train_loss"], rel=1e-5)


def test_a_run_does_not_go_on_with_other_data(train, tmp_path, chats_file):
    run_dir, data = tmp_path / "run", chats_file()
    words = (f"data.path={data}", "data.validation=null", "training.max_steps=6", "training.save_steps=1")
    train(*words, run_dir=run_dir)

    data.write_text(data.read_text().replace("3+3?", "3 + 3 ="))
    with pytest.raises(ConfigError, match="the data has changed since step-00000006 was saved"):
        train(*words, run_dir=run_dir)


def test_a_disk_too_small_for_the_result_is_refused_before_training(train, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))

    with pytest.raises(ConfigError, match="the trained weights need 0 MiB and the disk has 0 MiB free"):
        train()


def test_answers_are_generated_in_the_precision_of_training(train):
    run = train("method=freeze", "precision=bf16", "data.validation=null", "evaluation.examples=2")

    assert run.result["train_exact_match"] == 0.0


def test_a_model_too_large_for_the_device_is_warned_of_before_it_is_loaded(train, capsys):
    from llmkit.errors import OutOfMemory

    with pytest.raises(OutOfMemory, match="does not fit into CPU"):
        train("hardware=cpu", "hardware.memory_gib=0.001")
    assert "the weights of tiny need 0 GiB" in capsys.readouterr().err


@pytest.mark.parametrize("words", [(), ("training.final=best", "training.lr_scheduler_type=constant")])
def test_a_run_killed_after_its_last_step_takes_no_other(train, tmp_path, monkeypatch, words):
    from llmkit.training.session import Session

    words = (*words, "training.save_steps=2", "training.eval_steps=1", "training.learning_rate=3e-2")
    whole = train(*words)

    def killed(session: Session) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Session, "deliver", killed)
        with pytest.raises(KeyboardInterrupt):
            train(*words, run_dir=tmp_path / "run")
    again = train(*words, run_dir=tmp_path / "run")

    assert again.result["steps"] == whole.result["steps"] == 4
    assert [r["step"] for r in again.metrics() if "loss" in r] == [r["step"] for r in whole.metrics() if "loss" in r]
    for key in ("eval_loss", "train_loss", "final_is"):
        assert again.result[key] == whole.result[key]
