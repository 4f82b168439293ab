"""Runs of one and of two ranks under torchrun, stopped by signals: the short version of rank_trials.py."""

import itertools
import signal

import pytest
from rank_trials import Trial, draw_trials, finish, go_on_to_the_end, new_run, stop_again_and_again

from llmkit.training.checkpoints import manifest

pytestmark = pytest.mark.slow

# The second comes while the evaluation that the first has cut off is made up for.
IN_ONE_EVALUATION = [Trial("evaluation", "one rank", signal.SIGTERM, after=0, delay=0, rank=rank) for rank in (1, 0)]
STOPS = {
    "1 rank": (1, list(itertools.islice(draw_trials(0, 1), 3, 4))),
    "2 ranks": (2, list(itertools.islice(draw_trials(0, 2), 4))),
    "2 ranks, twice in one evaluation": (2, IN_ONE_EVALUATION),
}


@pytest.fixture(scope="module", params=STOPS.values(), ids=STOPS.keys())
def stopped(request, tmp_path_factory, tiny_model_dir):
    """A run that was stopped, its number of ranks, and the trials that did it."""
    ranks, trials = request.param
    run_dir = new_run(tmp_path_factory.mktemp("stopped"))
    return run_dir, ranks, stop_again_and_again(run_dir, ranks, trials)


def test_all_ranks_stop_at_the_same_step_which_is_committed_with_the_states_of_each(stopped):
    _, _, trials = stopped

    assert [trial.problems for trial in trials] == [[]] * len(trials)
    assert not any(trial.missed for trial in trials)


def test_a_stopped_run_goes_on_and_ends_as_one_that_nobody_disturbed(stopped, tmp_path):
    run_dir, ranks, _ = stopped
    reference = new_run(tmp_path)
    finish(reference, ranks)

    assert go_on_to_the_end(run_dir, ranks, reference) == []


def test_what_deepspeed_writes_from_two_ranks_is_committed(tmp_path, tiny_model_dir):
    pytest.importorskip("deepspeed")
    run_dir = new_run(tmp_path, "deepspeed=zero2", "training.max_steps=3", "training.save_steps=2")

    finish(run_dir, 2, steps=3)

    assert manifest.step_of(manifest.latest(run_dir)) == 3
