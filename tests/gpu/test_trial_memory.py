"""On a GPU the trial foretells the peak of training, and its advice fits into the memory there is."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "training"))
from recipe_trainers import make_trainer, random_rows

from llmkit.errors import OutOfMemory
from llmkit.training.console import RunConsole
from llmkit.training.longest_batch import LongestBatches
from llmkit.training.trial import run_trial

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # upstream's deprecations inside real training

WORDS = ["model=tiny", "data=demo", "training.max_steps=2", "training.per_device_eval_batch_size=1"]
BATCH = re.compile(r"training\.per_device_train_batch_size=\d+ training\.gradient_accumulation_steps=\d+")


@pytest.fixture
def whole_gpu():
    """A GPU of which a test may forbid a part."""
    yield torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_the_trial_foretells_the_peak_of_training(compose, tmp_path, method, checkpointing):
    words = [f"method={method}", f"training.gradient_checkpointing={checkpointing}"]
    config = compose(*WORDS, *words, "training.per_device_train_batch_size=8", "training.gradient_accumulation_steps=2")
    trainer = make_trainer(config, tmp_path, random_rows([1024] * 32))

    (foretold,) = run_trial(trainer, config, RunConsole())
    torch.cuda.reset_peak_memory_stats()
    trainer.train()

    assert foretold.needed == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)


def test_a_batch_the_gpu_has_no_room_for_is_refused_and_the_advice_works(compose, tmp_path, whole_gpu):
    rows, held_out = random_rows([2048] * 16), random_rows([2048], seed=1)
    asked = ["training.per_device_train_batch_size=16", "training.gradient_accumulation_steps=1"]
    config = compose(*WORDS, *asked)
    batches = LongestBatches(make_trainer(config, tmp_path, rows, held_out), config)
    large, small = batches.train(batches.asked), batches.train(batches.with_micro_batch(1))
    assert small.needed < large.needed / 2
    torch.cuda.set_per_process_memory_fraction((small.needed + large.needed) / 2 / whole_gpu)

    with pytest.raises(OutOfMemory, match=r"the longest training batch \(16 x 2,048 tokens\) does not fit") as caught:
        run_trial(make_trainer(config, tmp_path, rows, held_out), config, RunConsole())

    config = compose(*WORDS, *BATCH.search(str(caught.value))[0].split())
    trainer = make_trainer(config, tmp_path, rows, held_out)
    run_trial(trainer, config, RunConsole())
    trainer.train()


def test_the_optimizers_state_is_reserved_while_a_batch_is_tried(compose, tmp_path):
    config = compose(*WORDS, "method=full", "training.per_device_train_batch_size=2")
    batches = LongestBatches(make_trainer(config, tmp_path, random_rows([64] * 8)), config)

    outcome = batches.train(replace(batches.asked, accumulation=1))

    assert outcome.needed - outcome.peak == batches.state > 0
    assert torch.cuda.memory_allocated() < outcome.peak  # and given back
