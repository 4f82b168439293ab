"""On a GPU packed runs compute what each computes alone, but for rounding: `launcher.verify` says so itself."""

import pytest

pytestmark = pytest.mark.gpu

WORDS = [
    *("hardware=auto", "launcher=packed", "launcher.width=4", "launcher.verify=3", "evaluation=off"),
    *("training.max_steps=10", "training.global_batch_size=2", "-m", "lora.r=4,8,16,32"),
]
CASES = {
    "fp32": ["precision=fp32"],
    "bf16 with dropout": ["precision=bf16", "lora.lora_dropout=0.1"],
    "bf16 with dropout and checkpointing": [
        "precision=bf16",
        "lora.lora_dropout=0.1",
        "training.gradient_checkpointing=true",
    ],
    "qlora with dropout": ["method=qlora", "precision=bf16", "lora.lora_dropout=0.1"],
}


@pytest.mark.parametrize("seeds", ["seed=1", "seed=1,2,3,4"], ids=["the same rows", "other rows"])
@pytest.mark.parametrize("name", CASES)
def test_packed_runs_compute_what_each_computes_alone(run_llmkit, name, seeds):
    done = run_llmkit("train", *WORDS, *CASES[name], seeds)

    assert done.returncode == 0, done.stdout + done.stderr
    runs = 4 * len(seeds.split(","))
    assert f"{runs} runs on one base, 4 at a time" in done.stdout
    assert done.stdout.count("the first 3 steps: gradients ") == runs
