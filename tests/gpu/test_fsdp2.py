"""FSDP2 on two GPUs learns what one GPU does, and leaves an ordinary model."""

import pytest
import torch

from llmkit import rundir
from llmkit.training.metrics import read_metrics

pytestmark = pytest.mark.gpu

WORDS = ["training.max_steps=6", "training.logging_steps=1", "training.global_batch_size=16", "precision=fp32"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("engine", ["distributed=ddp", "distributed=fsdp2", "deepspeed=zero3"])
def test_two_gpus_learn_what_one_does(run_llmkit, tmp_path, method, engine):
    from transformers import AutoTokenizer

    for name, more in {"one": [], "two": ["hardware.num_processes=2", engine]}.items():
        done = run_llmkit("train", f"name={name}", f"method={method}", "evaluation=off", *WORDS, *more)
        assert done.returncode == 0, done.stderr
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))

    losses = [[record["loss"] for record in read_metrics(run) if "loss" in record] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    assert rundir.read_result(two)["engine"] == engine.partition("=")[2]
    assert AutoTokenizer.from_pretrained(two / rundir.FINAL).chat_template


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_divided_run_goes_on_from_its_checkpoint_exactly(run_llmkit, tmp_path, method):
    words = [f"method={method}", "evaluation=off", *WORDS, "hardware.num_processes=2", "distributed=fsdp2"]
    for name, more in {"whole": [], "cut": ["training.max_steps=3", "training.save_steps=3"]}.items():
        done = run_llmkit("train", f"name={name}", *words, *more)
        assert done.returncode == 0, done.stderr
    done = run_llmkit(
        "resume", tmp_path / "runs/cut", "training.max_steps=6", "resume_allow=[training.max_steps,training.save_steps]"
    )
    assert done.returncode == 0, done.stderr

    whole, cut = ([r["loss"] for r in read_metrics(tmp_path / "runs" / n) if "loss" in r] for n in ("whole", "cut"))
    assert cut[3:] == whole[3:]
