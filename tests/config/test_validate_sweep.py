"""What jobs of a sweep need in order to be ranked, and compared at rungs (`early_stop=halving`)."""

import pytest

from llmkit.config.validate_sweep import sweep_problems, sweep_warnings
from llmkit.errors import ConfigError

HALVING = "early_stop=halving"


@pytest.mark.parametrize(
    ("words", "metric"),
    [
        ([], "eval_loss"),
        (["objective=train_loss"], "eval_loss"),
        (["objective=train_exact_match"], "eval_loss"),
        (["objective=exact_match"], "exact_match"),
        (["recipe=dpo", "objective=preference_accuracy"], "preference_accuracy"),
        (["objective=exact_match", "early_stop.metric=eval_loss"], "eval_loss"),
    ],
    ids=" ".join,
)
def test_runs_are_compared_by_the_objective_where_it_is_measured_on_held_out_rows(compose, words, metric):
    assert compose(HALVING, *words).early_stop.metric == metric


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["early_stop.metric=exact_mach"],
            "measures eval_loss, exact_match on held-out rows. Did you mean 'exact_match'",
        ),
        (["early_stop.metric=train_loss"], "recipe=sft measures eval_loss, exact_match"),
        (["early_stop.metric=exact_match", "evaluation.examples=0"], "evaluation.examples=0 measures it on no rows"),
        (["data.validation=null"], "early_stop=halving compares runs on held-out rows; set data.validation"),
        (["early_stop.min_steps=10.5"], "a whole number of steps, or below 1 a share"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_rung_at_which_nothing_can_be_compared_is_refused(compose, words, message):
    with pytest.raises(ConfigError, match=message):
        compose(HALVING, *words)


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        (["training.max_steps=100,200"], ["share of each run's steps"]),
        (["training.num_train_epochs=1,2", "training.max_steps=null"], ["share of each run's steps"]),
        (["training.global_batch_size=8,16", "training.max_steps=null"], ["share of each run's steps"]),
        (["training.global_batch_size=8,16", "training.max_steps=100"], []),
        (["training.max_steps=100,200", "early_stop.min_steps=10"], []),
        (["lora.r=4,8"], []),
        (["data.num_proc=1,2", "training.max_steps=null"], []),
        (["data.max_length=64,128", "training.max_steps=null"], []),
        (["data.max_length=64,128", "training.max_steps=null", "data.packing=bfd"], ["(data.max_length)"]),
        (["early_stop.reduction_factor=2,3"], ["give each of them one value"]),
        (["objective=eval_loss,exact_match", "early_stop.metric=eval_loss"], ["different objectives"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_jobs_that_no_rung_would_compare_at_the_same_step_are_refused(compose, words, problems):
    found = sweep_problems(compose(HALVING, "-m", *words))

    assert len(found) == len(problems)
    assert all(problem in text for problem, text in zip(problems, found, strict=True))


@pytest.mark.parametrize(
    ("words", "warned"),
    [
        (["dpo.beta=0.1,0.5"], True),
        (["dpo.beta=0.1,0.5", "objective=preference_accuracy"], False),
        (["dpo.beta=0.1,0.5", "objective=preference_accuracy", HALVING], False),
        (["dpo.beta=0.1,0.5", "objective=preference_accuracy", HALVING, "early_stop.metric=eval_loss"], True),
        (["training.learning_rate=1e-5,1e-6"], False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_ranking_by_losses_of_unlike_kinds_is_warned_of(compose, words, warned):
    assert bool(sweep_warnings(compose("recipe=dpo", "-m", *words))) == warned
