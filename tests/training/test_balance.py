"""Ranks get the same global batches as one process, every row once, and about as many tokens as one another."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from rank_trials import closed_world
from uneven_ranks import CASES, STOPPED, STOPPED_AT, train_all

from llmkit.config.schema import DataConfig, ModelConfig
from llmkit.data.prepare import prepare_data
from llmkit.model.loading import load_tokenizer
from llmkit.training.balance import deal
from llmkit.training.longest_batch import row_lengths
from llmkit.training.rank_batches import Blank, EvaluationBatches, StepBatches, rank_loader

CHECKOUT = Path(__file__).parents[2]
GSM8K = CHECKOUT / "../shared/data/gsm8k/train.jsonl"
HANGS_AFTER = 900.0  # seconds; far more than it takes on a busy machine


def lengths_of(rows: int, *, seed: int = 0) -> np.ndarray:
    """As uneven as those of chats."""
    return np.random.default_rng(seed).lognormal(5, 0.8, rows).astype(np.int64) + 2


def epoch_of(lengths: np.ndarray, epoch: int = 0, *, ranks: int, **batch: int) -> list[list[list[int]]]:
    """Of each rank its micro-batches of an epoch."""
    found = []
    for rank in range(ranks):
        batches = StepBatches(lengths, seed=42, rank=rank, ranks=ranks, **batch)
        batches.set_epoch(epoch)
        found.append(list(batches))
        assert len(found[-1]) == len(batches)
    return found


def steps_of(epoch: list[list[list[int]]], accumulation: int) -> list[set[int]]:
    """The rows of each step on all ranks together, of which none may come twice."""
    steps = []
    for start in range(0, len(epoch[0]), accumulation):
        rows = [row for rank in epoch for batch in rank[start : start + accumulation] for row in batch]
        assert len(set(rows)) == len(rows)
        steps.append(set(rows))
    return steps


@pytest.mark.parametrize("rows", [960, 961, 964, 1007, 3])
@pytest.mark.parametrize(
    ("ranks", "micro_batch", "accumulation"), [(1, 8, 2), (1, 2, 8), (2, 4, 2), (2, 1, 8), (8, 2, 1), (16, 1, 1)]
)
def test_each_step_has_the_rows_that_one_process_draws_for_any_number_of_ranks(rows, ranks, micro_batch, accumulation):
    lengths = lengths_of(rows)
    for epoch in (0, 3):
        drawn = SeedableRandomSampler(range(rows), data_seed=42)
        drawn.set_epoch(epoch)
        order = list(drawn)
        expected = [set(order[start : start + 16]) for start in range(0, rows, 16)]

        dealt = epoch_of(lengths, epoch, ranks=ranks, micro_batch=micro_batch, accumulation=accumulation)

        assert steps_of(dealt, accumulation) == expected


@pytest.mark.parametrize("rows", [1, 3, 7, 8, 9, 31, 32])
def test_a_rank_is_without_rows_only_where_there_are_fewer_rows_than_micro_batches(rows):
    slots = deal(lengths_of(rows), micro_batch=4, ranks=8)

    batches = [batch for slot in slots for batch in slot]
    assert len(slots) == -(-rows // 32)
    assert sum(len(batch) > 0 for batch in batches) == min(rows, len(batches))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("ranks", "micro_batch", "accumulation"), [(1, 4, 4), (2, 4, 1), (8, 4, 2), (8, 1, 4)])
def test_no_micro_batch_is_larger_than_one_of_the_longest_rows(seed, ranks, micro_batch, accumulation):
    lengths = lengths_of(ranks * micro_batch * accumulation, seed=seed)

    slots = deal(lengths, micro_batch=micro_batch, ranks=ranks)

    assert len(slots) == accumulation
    sizes = [len(batch) * lengths[batch].max() for slot in slots for batch in slot]
    assert max(sizes) <= micro_batch * lengths.max()


def test_one_row_at_a_time_stays_one_row_at_a_time():
    slots = deal(lengths_of(64), micro_batch=1, ranks=8)

    assert {len(batch) for slot in slots for batch in slot} == {1}


def test_one_row_that_outweighs_all_others_has_a_rank_for_itself():
    slots = deal(np.array([5] * 31 + [5000]), micro_batch=8, ranks=4)

    assert [31] in [batch.tolist() for batch in slots[0]]
    assert all(len(batch) for batch in slots[0])


@pytest.fixture(scope="module")
def gsm8k_lengths(tmp_path_factory, tiny_model_dir):
    if not GSM8K.exists():
        pytest.skip("the files of GSM8K are not beside the checkout (../shared/data/gsm8k)")
    tokenizer = load_tokenizer(ModelConfig(name="tiny"), "keep-original")
    data = prepare_data(DataConfig(path=str(GSM8K), validation=None), tokenizer, max_length=16384)
    return row_lengths(data.train.dataset)


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize(("micro_batch", "accumulation"), [(4, 1), (8, 1), (2, 2), (1, 4), (4, 4)])
def test_over_an_epoch_of_gsm8k_the_fullest_rank_has_at_most_1_05_times_the_mean_tokens(
    gsm8k_lengths, ranks, micro_batch, accumulation
):
    one = epoch_of(gsm8k_lengths, ranks=1, micro_batch=ranks * micro_batch, accumulation=accumulation)
    dealt = epoch_of(gsm8k_lengths, ranks=ranks, micro_batch=micro_batch, accumulation=accumulation)

    assert steps_of(dealt, accumulation) == steps_of(one, accumulation)
    whole = len(gsm8k_lengths) // (ranks * micro_batch * accumulation) * accumulation  # the last step has too few rows
    tokens = np.array([[gsm8k_lengths[batch].sum() for batch in rank[:whole]] for rank in dealt])
    of_steps = tokens.reshape(ranks, -1, accumulation).sum(axis=2)
    assert (of_steps.max(axis=0) / of_steps.mean(axis=0)).mean() <= 1.05


@pytest.mark.parametrize(("rows", "ranks"), [(100, 1), (100, 3), (2, 3), (97, 8)])
def test_an_evaluation_takes_every_row_once_and_as_many_batches_on_each_rank(rows, ranks):
    lengths = lengths_of(rows)
    loaders = [EvaluationBatches(lengths, batch_size=4, rank=rank, ranks=ranks) for rank in range(ranks)]

    taken = [list(loader) for loader in loaders]

    assert (
        [len(batches) for batches in taken] == [len(loader) for loader in loaders] == [-(-rows // (4 * ranks))] * ranks
    )
    assert sorted(row for batches in taken for batch in batches for row in batch) == list(range(rows))


def test_a_batch_without_rows_is_blank_and_teaches_nothing():
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7], [8]], "labels": [[5, 6, 7], [8]]})

    def collate(rows):
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    full, blank = rank_loader(rows, [[0], []], collate, device=torch.device("cpu"), pin_memory=False)

    assert type(full) is dict
    assert type(blank) is Blank
    assert blank["labels"].tolist() == [[-100, -100]]


@pytest.fixture(scope="module")
def logged(tmp_path_factory, tiny_model_dir):
    """Case -> what one process logs, and each of two ranks."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    train_all(one)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "2", str(CHECKOUT / "tests" / "training" / "uneven_ranks.py"), str(two)]
    with (two / "log.txt").open("w") as log:
        done = subprocess.run(
            command, env=os.environ | closed_world(), stdout=log, stderr=subprocess.STDOUT, timeout=HANGS_AFTER
        )
    assert done.returncode == 0, (two / "log.txt").read_text(encoding="utf-8")[-5000:]

    def read(folder, name, rank):
        return json.loads((folder / f"{name}-{rank}.json").read_text(encoding="utf-8"))

    names = [*CASES, STOPPED]
    return {name: (read(one, name, 0), read(two, name, 0), read(two, name, 1)) for name in names}


def values(records, key):
    return [record[key] for record in records if key in record]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_learn_what_one_process_learns(logged, case):
    one, two, other = logged[case]
    steps = 2 * -(-21 // (CASES[case][1] * CASES[case][2]))

    assert len(values(one, "loss")) == steps
    # Rounding grows with the steps, to 2e-5 on a CPU with AVX-512; a row counted twice moves the loss far more.
    for key, precision in {"loss": 1e-4, "grad_norm": 1e-4, "epoch": 0, "num_input_tokens_seen": 0}.items():
        assert values(two, key) == pytest.approx(values(one, key), abs=precision), key
    assert values(other, "num_input_tokens_seen") == values(two, "num_input_tokens_seen")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_measure_on_held_out_rows_what_one_process_measures(logged, case):
    one, two, other = logged[case]

    before, *later = values(one, "eval_loss")
    assert len(later) >= 3
    assert values(two, "eval_loss")[0] == pytest.approx(before, rel=1e-6)
    # Training has then moved the weights apart in their last digits.
    assert values(two, "eval_loss")[1:] == pytest.approx(later, rel=1e-5)
    assert values(other, "eval_loss") == values(two, "eval_loss")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("dpo")])
def test_figures_of_pairs_are_means_over_the_same_pairs(logged, case):
    one, two, _ = logged[case]

    for key in ("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"):
        for name in (key, f"eval_{key}"):
            assert values(one, name)
            # A margin is a difference of log-probabilities near 100, whose last digit is 1e-5.
            assert values(two, name) == pytest.approx(values(one, name), rel=1e-4, abs=4e-5), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_was_stopped_within_the_second_epoch_goes_on_exactly(logged, ranks):
    unbroken, went_on = logged["sft, 1 of 4 left"][ranks - 1], logged[STOPPED][ranks - 1]

    assert len(values(unbroken, "loss")) > STOPPED_AT
    assert went_on == unbroken
