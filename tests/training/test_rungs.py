"""Rungs of `early_stop=halving`: where they are, and which runs go on from them."""

import contextlib
import math
from types import SimpleNamespace

import pytest

from llmkit import rundir
from llmkit.config.sweeper_schema import EarlyStopConfig
from llmkit.training.rungs import Behind, RungFiles, Rungs, Verdict, judge, record, rung_steps

BY_LOSS = EarlyStopConfig(name="halving", metric="eval_loss", reduction_factor=2)


@pytest.mark.parametrize(
    ("min_steps", "factor", "total", "steps"),
    [
        (10, 3, 100, [10, 30, 90]),
        (0.1, 2, 100, [10, 20, 40, 80]),
        (0.1, 3, 5, [1, 3]),
        (100, 3, 100, []),
        (7, 4, 8, [7]),
    ],
)
def test_each_rung_is_so_many_times_as_far_and_none_is_at_the_end(min_steps, factor, total, steps):
    assert rung_steps(EarlyStopConfig(min_steps=min_steps, reduction_factor=factor), total) == steps


@pytest.mark.parametrize(
    ("losses", "factor", "go_on"),
    [
        ({"a": 3.0, "b": 1.0, "c": 2.0}, 3, {"b"}),
        ({"a": 3.0, "b": 1.0, "c": 2.0, "d": 4.0, "e": 5.0}, 3, {"b"}),
        ({"a": 3.0, "b": 1.0, "c": 2.0, "d": 4.0}, 2, {"b", "c"}),
        ({"a": 3.0}, 3, {"a"}),
        ({"a": math.nan, "b": 9.0}, 2, {"b"}),
        ({"a": math.nan, "b": math.inf}, 2, set()),
        ({"a": 1.0, "b": 1.0}, 2, {"a"}),
    ],
)
def test_one_run_in_so_many_goes_on_the_best_first_and_none_without_a_loss(losses, factor, go_on):
    standings = {name: (loss,) for name, loss in losses.items()}
    verdicts = {name: judge(standings, name, step=5, factor=factor) for name in losses}

    assert {name for name, verdict in verdicts.items() if verdict.goes_on} == go_on
    assert sorted(verdict.place for verdict in verdicts.values()) == list(range(1, len(losses) + 1))


def test_a_run_is_compared_with_those_that_were_at_the_rung_before_it(tmp_path):
    runs = {name: RungFiles(tmp_path / name, BY_LOSS) for name in "abc"}
    for name in runs:
        (tmp_path / name).mkdir()

    verdicts = []
    for name, step, loss in (("a", 5, 3.0), ("b", 5, 4.0), ("c", 5, 2.0), ("a", 10, 2.5)):
        record(tmp_path / name, step, {"eval_loss": loss})
        verdicts.append(runs[name](step))

    assert [(one.place, one.of, one.goes_on) for one in verdicts] == [
        *((1, 1, True), (2, 2, False), (1, 3, True)),
        (1, 1, True),
    ]
    assert rundir.read_json(tmp_path / "a" / "rungs.json") == {
        "5": {"eval_loss": 3.0, "goes_on": None},
        "10": {"eval_loss": 2.5, "goes_on": None},
    }


def test_a_figure_of_which_more_is_better_decides_and_the_loss_between_equal_ones(tmp_path):
    by_match = EarlyStopConfig(name="halving", metric="exact_match", reduction_factor=2)
    for name, share, loss in (("a", 0.5, 3.0), ("b", 0.7, 4.0), ("c", 0.5, 2.0), ("d", 0.0, 1.0)):
        (tmp_path / name).mkdir()
        record(tmp_path / name, 5, {"eval_loss": loss, "exact_match": share})
    (tmp_path / "e").mkdir()
    record(tmp_path / "e", 5, {"eval_loss": 0.1})  # of a command that compared by the loss

    verdicts = {name: RungFiles(tmp_path / name, by_match)(5) for name in "abcd"}

    assert {name: one.place for name, one in verdicts.items()} == {"b": 1, "c": 2, "a": 3, "d": 4}
    assert [name for name, one in verdicts.items() if one.goes_on] == ["b", "c"]


def test_a_run_that_resume_never_has_moved_aside_is_no_rival(tmp_path):
    for name, loss in (("a", 3.0), ("a.before-1", 1.0)):
        (tmp_path / name).mkdir()
        record(tmp_path / name, 5, {"eval_loss": loss})

    assert RungFiles(tmp_path / "a", BY_LOSS)(5) == Verdict(step=5, place=1, of=1, goes_on=True)


def rungs_at(tmp_path, step, verdict, **known):
    """A run that is taken up at a step, its first rung being after 5; and what it had recorded when it was compared."""
    asked = []

    def compare(step):
        asked.append((step, rundir.read_json(tmp_path / "rungs.json")[str(step)]))
        return verdict

    if known:
        rundir.write_json(tmp_path / "rungs.json", {"5": known})
    rungs = Rungs(tmp_path, [5, 10], compare, {5: 2.0}.get)
    state, control = SimpleNamespace(global_step=step), SimpleNamespace()
    return asked, lambda: rungs.on_train_begin(None, state, control), rungs


@pytest.mark.parametrize(
    ("step", "known"), [(0, {}), (4, {}), (10, {}), (5, {"eval_loss": 2.0, "goes_on": True})], ids=str
)
def test_a_run_that_is_taken_up_elsewhere_or_has_gone_on_from_its_rung_is_not_compared_again(tmp_path, step, known):
    asked, begin, _ = rungs_at(tmp_path, step, None, **known)

    begin()

    assert asked == []


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_run_that_was_stopped_at_a_rung_before_the_others_came_is_compared_when_it_is_taken_up(tmp_path, goes_on):
    verdict = Verdict(step=5, place=1, of=2, goes_on=goes_on)
    asked, begin, rungs = rungs_at(tmp_path, 5, verdict, eval_loss=2.0, goes_on=None)

    with contextlib.nullcontext() if goes_on else pytest.raises(Behind):
        begin()

    assert asked == [(5, {"eval_loss": 2.0, "goes_on": None})]
    assert rundir.read_json(tmp_path / "rungs.json") == {"5": {"eval_loss": 2.0, "goes_on": goes_on}}
    assert rungs.verdict == (None if goes_on else verdict)


def test_a_run_that_is_stopped_before_it_is_compared_leaves_no_loss_at_the_rung(tmp_path):
    _, begin, _ = rungs_at(tmp_path, 5, None)

    with pytest.raises(Behind):
        begin()

    assert rundir.read_json(tmp_path / "rungs.json") == {}


def test_a_run_whose_evaluation_at_a_rung_is_made_up_for_takes_no_step_more_if_it_is_behind(tmp_path):
    _, _, rungs = rungs_at(tmp_path, 5, Verdict(step=5, place=2, of=2, goes_on=False))
    state, control = SimpleNamespace(global_step=5), SimpleNamespace(should_save=False, should_training_stop=False)

    with pytest.raises(Behind):
        rungs.on_evaluate(None, state, control, {"eval_loss": 3.0})

    rungs.on_step_begin(None, state, control)
    rungs.on_evaluate(None, state, control, {"eval_loss": 3.0})
    assert control.should_save and control.should_training_stop  # noqa: PT018
