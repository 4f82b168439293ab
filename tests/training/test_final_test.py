"""The figures of data.test: they agree with what they stand for, and their intervals cover as often as they say."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from recipe_trainers import make_trainer, random_pairs, random_rows

from llmkit.data.examples import Conversation
from llmkit.training.estimate import Estimate, in_words, ratio, share
from llmkit.training.final_test import by_row, measure_test, row_losses
from llmkit.training.generation import Answer

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's deprecations inside real training runs

WORDS = ["model=tiny", "data=demo", "hardware=cpu", "training.per_device_eval_batch_size=3"]
LENGTHS = [30, 12, 50, 7, 22, 41, 9]


class TestRows:
    """A split of the test set: token ids, and conversations to answer."""

    __test__ = False

    def __init__(self, dataset, origins=None):
        self.dataset = dataset
        self.origins = np.arange(len(dataset)) if origins is None else np.array(origins)

    def examples(self, count):
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]
        return [Conversation(messages=turns)] * min(count, len(self.dataset))


class Answers:
    """Stands in for a model: the first answer is right, the others are not."""

    def answer(self, conversations):
        return [Answer("?", "no" if number else "yes", "yes") for number in range(len(conversations))]


@pytest.mark.parametrize("changes", [{}, {"padding_free": True}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_is_that_of_an_evaluation(compose, tmp_path, changes, precision):
    """Also where rows lie in one sequence, and before anything has prepared the model for mixed precision."""
    rows = random_rows(LENGTHS, learnt=[1, 5, 40, 2, 20, 3, 9])
    trainer = make_trainer(compose(*WORDS, f"precision={precision}"), tmp_path / "run", rows, rows, **changes)

    figure = measure_test(trainer, TestRows(rows), Answers(), examples=0)["loss"]

    assert figure["value"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5 if precision == "fp32" else 1e-3)
    assert figure["n"] == len(LENGTHS)
    assert figure["low"] < figure["value"] < figure["high"]


@pytest.mark.parametrize("changes", [{}, {"padding_free": True}])
def test_each_row_has_its_own_loss_and_learnt_tokens(compose, tmp_path, changes):
    rows = random_rows(LENGTHS, learnt=[1, 5, 40, 2, 20, 3, 9])
    trainer = make_trainer(compose(*WORDS), tmp_path / "run", rows, **changes)

    sums, counts = row_losses(trainer, rows)

    assert counts.tolist() == [1, 5, 40, 2, 20, 3, 8]  # nothing predicts the first token of a row
    for row, total, count in zip(rows, sums, counts, strict=True):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            loss = trainer.model(input_ids=ids, labels=labels).loss
        assert total == pytest.approx(float(loss) * count, rel=1e-5)


def test_the_parts_of_one_row_are_one_draw(compose, tmp_path):
    rows = random_rows(LENGTHS)
    trainer = make_trainer(compose(*WORDS), tmp_path / "run", rows)

    apart = measure_test(trainer, TestRows(rows), Answers(), examples=7)
    together = measure_test(trainer, TestRows(rows, origins=[0, 0, 0, 1, 2, 2, 3]), Answers(), examples=7)

    assert together["loss"]["value"] == pytest.approx(apart["loss"]["value"])
    assert (apart["loss"]["n"], together["loss"]["n"]) == (7, 4)
    assert together["exact_match"]["value"] == apart["exact_match"]["value"]
    assert together["exact_match"]["high"] > apart["exact_match"]["high"]


def test_a_row_counts_once_however_often_it_is_split():
    sums, counts = np.array([4.0, 2.0, 9.0, 5.0]), np.array([2, 1, 3, 4])
    halves, origins = np.repeat(sums / 2, 2), np.repeat(np.arange(4), 2)

    assert ratio(by_row(halves, origins), by_row(np.repeat(counts / 2, 2), origins)) == ratio(sums, counts)


def test_exact_match_is_asked_of_the_first_rows_only(compose, tmp_path):
    rows = random_rows(LENGTHS)
    trainer = make_trainer(compose(*WORDS), tmp_path / "run", rows)

    figures = measure_test(trainer, TestRows(rows), Answers(), examples=4)

    assert (figures["exact_match"]["value"], figures["exact_match"]["n"]) == (0.25, 4)
    assert "exact_match" not in measure_test(trainer, TestRows(rows), Answers(), examples=0)


def test_of_pairs_the_share_of_likelier_chosen_answers_is_measured_over_all(compose, tmp_path):
    pairs = random_pairs([(5, 1, 60), (4, 2, 70), (3, 50, 1), (8, 1, 40)])  # what is shorter is likelier
    trainer = make_trainer(compose("recipe=dpo", *WORDS), tmp_path / "run", pairs)

    figures = measure_test(trainer, TestRows(pairs), Answers(), examples=1)

    assert list(figures) == ["preference_accuracy"]
    assert (figures["preference_accuracy"]["value"], figures["preference_accuracy"]["n"]) == (0.75, 4)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"), [(0, 10, 0.0, 0.27753), (8, 10, 0.49016, 0.94332), (10, 10, 0.72247, 1.0)]
)
def test_shares_have_wilsons_interval(hits, n, low, high):
    estimate = share(hits, n)

    assert (estimate.low, estimate.high) == (pytest.approx(low, abs=1e-5), pytest.approx(high, abs=1e-5))
    assert estimate.value == hits / n


def test_the_interval_of_a_loss_covers_the_true_one_95_times_in_100():
    """Rows of very different length, whose tokens are alike within a row: an interval by tokens would be too narrow."""
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        counts = draw.integers(1, 200, size=100)
        sums = counts * draw.gamma(4.0, 0.5, size=100)  # each row has its own mean loss, 2 on average
        estimate = ratio(sums, counts)
        covered += estimate.low < 2.0 < estimate.high

    assert 0.93 < covered / 2000 < 0.96


def test_one_row_has_a_figure_and_no_interval():
    estimate = ratio(np.array([6.0]), np.array([3]))

    assert estimate == Estimate(value=2.0, low=None, high=None, n=1)
    assert in_words("loss", asdict(estimate)) == "loss 2.0000 (1 row)"


def test_figures_are_said_with_their_interval():
    figure = {"value": 0.25, "low": 0.2, "high": 0.3, "n": 1319}

    assert in_words("exact_match", figure) == "exact match 25.0% (95%: 20.0% to 30.0%, 1,319 rows)"
