"""The longest batches run first: what they find, what they advise, and that they leave no trace."""

import copy
import os
import random
import re
import resource
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from recipe_trainers import make_trainer, random_pairs, random_rows, trained_weights

from llmkit import config as configuration
from llmkit.errors import EXIT_WRONG_INPUT, OutOfMemory
from llmkit.failure import explained
from llmkit.training import memory
from llmkit.training.advice import is_out_of_memory, reason, smaller_batches, untried_changes
from llmkit.training.console import RunConsole
from llmkit.training.longest_batch import LongestBatches, example_lengths, longest_rows, row_lengths
from llmkit.training.trial import run_trial

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's deprecations inside real training runs

SHORT = ["model=tiny", "data=demo", "hardware=cpu", "training.max_steps=3", "training.logging_steps=1"]
LENGTHS = [30, 12, 50, 7, 22, 41, 9, 33, 18, 27, 5, 14]
BATCH = re.compile(r"training\.per_device_train_batch_size=(\d+) training\.gradient_accumulation_steps=(\d+)")


def traces(trainer):
    """Everything a step of training could change: random states, modes, gradients, the trainer's own numbers."""
    model = trainer.model
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "modes": [module.training for module in model.modules()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "model": (model.forward, model.is_gradient_checkpointing),
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "state": copy.deepcopy(vars(trainer.state)),
        "metrics": copy.deepcopy(trainer._metrics),
        "tokens": trainer._total_train_tokens,
        "batches": list(trainer._batches_of_step),
        "evaluated": trainer._evaluated.tolist(),
        "attributes": set(vars(trainer)),
    }


@pytest.mark.parametrize(
    ("recipe", "checkpointing"), [("sft", "true"), ("sft", "false"), ("dpo", "true"), ("dpo", "false")]
)
def test_a_run_after_a_trial_is_bit_identical_to_one_without(compose, tmp_path, recipe, checkpointing):
    words = [f"recipe={recipe}", *SHORT, "lora.lora_dropout=0.3", f"training.gradient_checkpointing={checkpointing}"]
    words += ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"]
    if recipe == "sft":
        rows, held_out, changes = random_rows(LENGTHS), random_rows([20, 35, 11], seed=1), {}
    else:
        rows = random_pairs([(length, length // 2 + 1, length // 3 + 1) for length in LENGTHS])
        held_out, changes = random_pairs([(20, 3, 8), (7, 5, 2)], seed=1), {"disable_dropout": False}
    weights, logs = [], []
    for trial in (False, True):
        config = compose(*words)
        trainer = make_trainer(config, tmp_path / "run", rows, held_out, **changes)
        if trial:
            before = traces(trainer)
            run_trial(trainer, config, RunConsole())
            assert traces(trainer) == before
        trainer.evaluate()
        start = trained_weights(trainer)
        trainer.train()
        weights.append(trained_weights(trainer))
        timed = re.compile("time|per_second")
        logs.append([{k: v for k, v in r.items() if not timed.search(k)} for r in trainer.state.log_history])

    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert logs[0] == logs[1]
    assert any(not torch.equal(start[name], weights[0][name]) for name in start)  # it has trained at all


def test_the_trial_runs_the_longest_rows_of_both_sets_and_states_their_peak(compose, tmp_path, capsys):
    config = compose(*SHORT, "training.per_device_train_batch_size=2", "training.per_device_eval_batch_size=3")
    rows, held_out = random_rows([30, 12, 64, 7, 50]), random_rows([20, 35, 11, 90], seed=1)

    train, evaluation = run_trial(make_trainer(config, tmp_path, rows, held_out), config, RunConsole())

    assert (train.rows, train.tokens, evaluation.rows, evaluation.tokens) == (2, 64, 3, 90)
    said = capsys.readouterr().out
    assert "trial      longest training batch (2 x 64 tokens): peak" in said
    assert "trial      longest evaluation batch (3 x 90 tokens): peak" in said
    assert 0.1 * memory.GIB < train.peak < train.needed < 4 * memory.GIB


def test_row_lengths_follow_a_selection_and_count_the_longer_side_of_a_pair():
    rows = random_rows([3, 9, 1, 7])

    assert row_lengths(rows).tolist() == [3, 9, 1, 7]
    assert row_lengths(rows.select([3, 1])).tolist() == [7, 9]
    assert row_lengths(datasets.concatenate_datasets([rows, rows.select([2])])).tolist() == [3, 9, 1, 7, 1]
    assert row_lengths(random_pairs([(2, 1, 2), (1, 3, 1)])).tolist() == [4, 4]


def test_rows_are_cut_as_a_shorter_max_length_would_make_them(compose, tmp_path):
    packed = random_rows([10, 4]).add_column("seq_lengths", [[6, 4], [4]])
    trainer = make_trainer(compose(*SHORT), tmp_path / "run", packed)

    (row,) = longest_rows(trainer, packed, 1, 7)

    assert (row_lengths(packed).tolist(), example_lengths(packed).tolist()) == ([10, 4], [6, 4, 4])
    assert (len(row["input_ids"]), len(row["labels"]), row["seq_lengths"]) == (7, 7, [6, 1])
    (row,) = longest_rows(trainer, packed, 1, 10)
    assert (len(row["input_ids"]), row["seq_lengths"]) == (10, [6, 4])


def test_pairs_are_cut_in_total(compose, tmp_path):
    pairs = random_pairs([(20, 5, 9), (3, 1, 1)])
    trainer = make_trainer(compose("recipe=dpo", *SHORT), tmp_path / "run", pairs)

    (row,) = longest_rows(trainer, pairs, 1, 12)
    (other,) = longest_rows(trainer, pairs, 1, 5)

    assert (len(row["prompt_ids"]), len(row["chosen_ids"]), len(row["rejected_ids"])) == (3, 5, 9)
    assert (len(other["prompt_ids"]), len(other["chosen_ids"]), len(other["rejected_ids"])) == (1, 4, 4)


def test_a_limit_below_the_peak_is_refused_with_what_fits(compose, tmp_path):
    """With hardware.memory_gib between the peaks of a large and a small batch, only a smaller one can be the advice."""
    words = [*SHORT, "training.per_device_train_batch_size=16", "training.gradient_accumulation_steps=1"]
    rows = random_rows([300] * 16, seed=2)
    config = compose(*words)
    batches = LongestBatches(make_trainer(config, tmp_path, rows), config)
    large, small = batches.train(batches.asked), batches.train(batches.with_micro_batch(1))
    words.append(f"hardware.memory_gib={(large.needed + small.needed) / 2 / memory.GIB}")
    config = compose(*words)

    with pytest.raises(OutOfMemory, match=r"the longest training batch \(16 x 300 tokens\) does not fit") as caught:
        run_trial(make_trainer(config, tmp_path, rows), config, RunConsole())

    message = str(caught.value)
    found = BATCH.search(message)
    assert int(found[1]) * int(found[2]) == 16
    assert int(found[1]) < 16
    assert message.index("method=qlora") < message.index("data.max_length="), "every row would be cut"


def test_an_evaluation_batch_over_the_limit_is_explained_apart(compose, tmp_path):
    words = [*SHORT, "training.per_device_train_batch_size=1", "training.per_device_eval_batch_size=64"]
    rows, held_out = random_rows([400, 300]), random_rows([500] * 64, seed=1)
    config = compose(*words)
    batches = LongestBatches(make_trainer(config, tmp_path, rows, held_out), config)
    train, evaluation = batches.run(batches.asked)
    words.append(f"hardware.memory_gib={(train.needed + evaluation.needed) / 2 / memory.GIB}")
    config = compose(*words)

    with pytest.raises(OutOfMemory, match=r"the longest evaluation batch \(64 x 500 tokens\) does not fit") as caught:
        run_trial(make_trainer(config, tmp_path, rows, held_out), config, RunConsole())

    found = re.search(r"^  training.per_device_eval_batch_size=(\d+)$", str(caught.value), re.MULTILINE)
    assert int(found[1]) < 64


def test_what_no_batch_size_helps_is_left_to_shorter_rows_and_costlier_changes(compose, tmp_path):
    config = compose(*SHORT, "training.per_device_train_batch_size=2", "hardware.memory_gib=0.1")
    rows = random_rows([40] * 9 + [64])

    with pytest.raises(OutOfMemory) as caught:
        run_trial(make_trainer(config, tmp_path, rows), config, RunConsole())

    message = str(caught.value)
    assert "One row at a time with gradient checkpointing does not fit either" in message
    assert "tried just now" not in message
    assert "method=qlora" in message


WITH_LITTLE_MEMORY = """
import resource, sys, warnings
from pathlib import Path

warnings.simplefilter("ignore")
from recipe_trainers import make_trainer, random_rows
from llmkit.config import load
from llmkit.errors import OutOfMemory
from llmkit.training.console import RunConsole
from llmkit.host_memory import sizes_in
from llmkit.training.trial import run_trial

run_dir, room, train_rows, eval_rows = Path(sys.argv[1]), *map(int, sys.argv[2:])
config = load(run_dir)
trainer = make_trainer(config, run_dir, random_rows([1000] * train_rows), random_rows([1000] * eval_rows, seed=1))
in_use = sizes_in("/proc/self/status")["VmData"]
resource.setrlimit(resource.RLIMIT_DATA, (in_use + room, resource.RLIM_INFINITY))
try:
    run_trial(trainer, config, RunConsole())
except OutOfMemory as error:
    print(error)
    sys.exit(error.exit_code)
trainer.train()
print("trained")
"""


@pytest.fixture
def run_with_little_memory(compose, tmp_path):
    """A function: the trial and then training, in a process that may allocate only `room` more bytes."""

    def run(*words, room, train_rows=1, eval_rows=1):
        configuration.save(compose(*SHORT, "training.max_steps=1", *words), tmp_path)
        paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
        return subprocess.run(
            [sys.executable, "-c", WITH_LITTLE_MEMORY, *map(str, (tmp_path, room, train_rows, eval_rows))],
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


def test_a_training_batch_that_cannot_be_allocated_is_explained_and_the_advice_works(run_with_little_memory):
    asked = ["training.per_device_train_batch_size=8", "training.gradient_accumulation_steps=1"]
    others = ["training.per_device_eval_batch_size=1"]
    limits = {"room": 800 * 2**20, "train_rows": 8}

    refused = run_with_little_memory(*asked, *others, **limits)

    print(refused.stdout)
    assert refused.returncode == EXIT_WRONG_INPUT, refused.stderr
    assert "the longest training batch (8 x 1,000 tokens) does not fit into CPU" in refused.stdout
    assert "can't allocate memory" in refused.stdout
    found = BATCH.search(refused.stdout)
    assert int(found[1]) * int(found[2]) == 8
    followed = run_with_little_memory(*found[0].split(), *others, **limits)
    assert followed.stdout.endswith("trained\n"), followed.stdout + followed.stderr


def test_micro_batches_are_halved_at_the_same_number_of_examples_per_step():
    assert list(smaller_batches(16, 1)) == [(16, 1), (8, 2), (4, 4), (2, 8), (1, 16)]
    assert list(smaller_batches(6, 2)) == [(6, 2), (3, 4), (1, 12)]
    assert list(smaller_batches(5, 3)) == [(5, 3), (1, 15)]


def test_advice_for_later_names_every_change_that_is_left_the_cheapest_first(compose):
    words = ["model=tiny", "data=demo", "data.max_length=1024", "method=full", "precision=fp32"]

    every = untried_changes(compose(*words, "training.per_device_train_batch_size=4"))
    few = untried_changes(
        compose(
            *("model=tiny", "data=demo", "data.max_length=1024", "method=qlora", "precision=bf16"),
            *("training.per_device_train_batch_size=1", "training.gradient_checkpointing=true"),
        )
    )

    assert [change.split(" (")[0] for change in every] == [
        "training.per_device_train_batch_size=2 training.gradient_accumulation_steps=2",
        "training.gradient_checkpointing=true",
        "data.max_length=512",
        "precision=bf16",
        "training.optim=adamw_8bit",
        "method=lora",
        "method=qlora",
    ]
    assert [change.split(" (")[0] for change in few] == ["data.max_length=512"]


def test_running_out_in_the_middle_of_a_run_is_explained_by_the_worker(compose):
    config = compose("model=tiny", "data=demo", "training.per_device_train_batch_size=4", "method=full")

    said = explained(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"), config)

    assert said.startswith("out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.\n")
    assert "\n  training.per_device_train_batch_size=2 training.gradient_accumulation_steps=2 (" in said
    assert explained(ValueError("something else"), config) == "something else"


def test_only_a_lack_of_memory_counts_as_one():
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60, dtype=torch.uint8)

    assert is_out_of_memory(real.value)
    assert reason(real.value).startswith("DefaultCPUAllocator: can't allocate memory")
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("not enough memory"))


def test_a_cpu_process_may_grow_by_what_is_available_and_no_more(monkeypatch):
    """Else the kernel kills it without a word. The machine is said to have 200 MiB left."""
    cpu, read = torch.device("cpu"), memory.sizes_in
    available = {"MemAvailable": 200 * 2**20, "SwapFree": 0}
    monkeypatch.setattr(memory, "sizes_in", lambda path: available if path == "/proc/meminfo" else read(path))
    before = resource.getrlimit(resource.RLIMIT_DATA)

    with memory.bounded_growth(cpu):
        torch.empty(100 * 2**20, dtype=torch.uint8)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            torch.empty(400 * 2**20, dtype=torch.uint8)

    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    torch.empty(400 * 2**20, dtype=torch.uint8)


@pytest.mark.parametrize(
    "optim", ["adamw_torch_fused", "adamw_torch", "sgd", "rmsprop", "adagrad", "adamw_8bit", "lion_32bit", "ademamix"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_keeps_as_much_state_as_is_said(tmp_path, optim, dtype):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), optim=optim, use_cpu=True)
    weights = [torch.nn.Parameter(torch.randn(size, dtype=dtype)) for size in ((256, 256), (512,))]
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = kind(weights, **settings)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()

    kept = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    )
    said = memory.optimizer_state(optim, [*weights, torch.zeros(999)])  # the last is not trained
    assert said == pytest.approx(kept, rel=0.05)
