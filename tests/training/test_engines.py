"""Two processes for real (gloo on the CPU), under each engine, beside one process on the same global batches."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from llmkit import rundir
from llmkit.training.checkpoints import manifest
from llmkit.training.metrics import read_metrics

pytestmark = pytest.mark.slow

STEPS = 6
WORDS = [
    f"training.max_steps={STEPS}",
    "training.logging_steps=1",
    "training.global_batch_size=16",
    "training.per_device_train_batch_size=4",
    "precision=fp32",
    "hardware=cpu",
    "evaluation=off",
]
TWO = "hardware.num_processes=2"
ENGINES = {
    "ddp": [TWO],
    "zero1": [TWO, "deepspeed=zero1"],
    "zero2": [TWO, "deepspeed=zero2"],
    "zero3": [TWO, "deepspeed=zero3"],
}
RUNS = {
    "sft, lora": ["method=lora"],
    "sft, full": ["method=full"],
    "dpo, lora": ["recipe=dpo", "method=lora"],
    "dpo, full": ["recipe=dpo", "method=full"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_llmkit_in):
    """A function: the directory of a finished run of these words, trained once."""
    directory = tmp_path_factory.mktemp("engines")
    made = {}

    def train(*words: str):
        if words not in made:
            name = f"run-{len(made)}"
            done = run_llmkit_in(directory, "train", f"name={name}", *WORDS, *words)
            assert done.returncode == 0, done.stdout + done.stderr
            made[words] = directory / "runs" / name
        return made[words]

    return train


def losses(run_dir):
    return [record["loss"] for record in read_metrics(run_dir) if "loss" in record]


def eval_losses(run_dir):
    return [record["eval_loss"] for record in read_metrics(run_dir) if "eval_loss" in record]


def weights(run_dir):
    (file,) = (run_dir / rundir.FINAL).glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_two_processes_learn_what_one_does(engine, run, trained):
    alone, together = trained(*RUNS[run]), trained(*RUNS[run], *ENGINES[engine])

    assert rundir.read_result(together)["engine"] == engine
    assert len(losses(together)) == STEPS
    assert losses(together) == pytest.approx(losses(alone), abs=1e-4)
    assert eval_losses(together) == pytest.approx(eval_losses(alone), abs=1e-4)
    ours, theirs = weights(together), weights(alone)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-4, rtol=0)


def test_what_zero3_has_trained_is_an_ordinary_model(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = trained(*RUNS["sft, full"], *ENGINES["zero3"]) / rundir.FINAL

    model, info = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not any(info.values())
    ids = AutoTokenizer.from_pretrained(final)("What is the capital of Brazil?", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()


@pytest.fixture(scope="module")
def saved(trained):
    """A function: a finished run of an engine that saved a checkpoint in the middle."""
    return lambda engine: trained("training.save_steps=3", "lora.lora_dropout=0.1", *ENGINES[engine])


def cut_short(run_dir, place, *, step=3):
    """A copy of the run as if it had been killed after a step."""
    shutil.copytree(run_dir, place / "runs" / "again")
    copy = place / "runs" / "again"
    for checkpoint in manifest.committed(copy):
        if manifest.step_of(checkpoint) != step:
            shutil.rmtree(checkpoint)
    (copy / rundir.RESULT).unlink()
    shutil.rmtree(copy / rundir.FINAL)
    return copy


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_goes_on_from_a_checkpoint_as_if_nothing_had_been(engine, saved, tmp_path, run_llmkit):
    whole = saved(engine)
    run = cut_short(whole, tmp_path)

    done = run_llmkit("resume", run)

    assert done.returncode == 0, done.stderr
    assert "goes on from step 3" in done.stdout
    assert losses(run) == losses(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(run)[name], tensor)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_a_run_killed_behind_its_last_step_only_delivers(engine, saved, tmp_path, run_llmkit):
    whole = saved(engine)
    run = cut_short(whole, tmp_path, step=STEPS)

    done = run_llmkit("resume", run)

    assert done.returncode == 0, done.stderr
    assert "step 1/" not in done.stdout
    assert rundir.read_result(run)["engine"] == engine
    assert losses(run) == losses(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(run)[name], tensor)


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_another_number_of_processes_is_refused_before_anything_starts(engine, saved, tmp_path, run_llmkit):
    run = cut_short(saved(engine), tmp_path)
    before = (run / rundir.CONFIG).read_bytes()

    done = run_llmkit("resume", run, "hardware.num_processes=1")

    assert done.returncode == 2
    assert "hardware.num_processes: 2 -> 1" in done.stderr
    assert (run / rundir.CONFIG).read_bytes() == before


def test_deepspeeds_checkpoints_are_for_their_number_of_processes_whatever_is_allowed(saved, tmp_path, run_llmkit):
    run = cut_short(saved("zero2"), tmp_path)

    done = run_llmkit("resume", run, TWO.replace("2", "1"), "resume_allow=[hardware.num_processes]")

    assert done.returncode == 2
    assert "saved by 2 processes" in done.stderr
    assert "init_from=" in done.stderr


def test_the_result_counts_all_processes(trained):
    result = rundir.read_result(trained(*RUNS["sft, lora"], *ENGINES["ddp"]))

    assert result["device_seconds"] == pytest.approx(2 * result["seconds"], abs=0.02)
    assert result["tokens"] == rundir.read_result(trained(*RUNS["sft, lora"]))["tokens"]


def test_files_of_the_run_are_written_by_one_process_and_the_others_keep_logs(trained):
    run_dir = trained(*RUNS["sft, lora"], *ENGINES["ddp"])

    steps = [record["step"] for record in read_metrics(run_dir) if "loss" in record]
    assert steps == list(range(1, STEPS + 1))
    assert "step 1/6" in (run_dir / rundir.RANKS / "rank-1.log").read_text()
    assert not (run_dir / rundir.RANKS / "rank-0.log").exists()
