"""What the report reads from run directories: finished, under way, failed, and with files missing."""

import json
import math
from pathlib import Path

import pytest
from run_files import lora_config, losses, write_sweep

from llmkit import rundir
from llmkit.config.schema import DpoConfig, ModelConfig, TrainingConfig
from llmkit.errors import ConfigError
from llmkit.reporting.collection import differences, read_report
from llmkit.reporting.curves import MOST_POINTS, thinned
from llmkit.reporting.words import cautions, commands, facts
from llmkit.training.estimate import share


def test_a_finished_sweep_is_ranked_as_its_record_says(ranks):
    report = read_report([ranks])

    jobs = json.loads((ranks / rundir.SWEEP).read_text())["jobs"]
    expected = [Path(job["run_dir"]).name for job in sorted(jobs, key=lambda job: job["objective"])]
    assert [run.name for run in report.runs] == expected
    assert [run.rank for run in report.runs] == [1, 2, 3, 4]
    assert report.winner is report.runs[0]
    assert report.swept_keys == ["r", "learning_rate"]
    assert {(run.swept["r"], run.swept["learning_rate"]) for run in report.runs} == {
        (r, rate) for r in "24" for rate in ("0.001", "0.02")
    }


def test_the_figures_are_those_of_the_results_with_the_interval_of_so_many_rows(ranks):
    for run in read_report([ranks]).runs:
        result = rundir.read_result(run.directory)
        assert result is not None
        assert {name: figure.value for name, figure in run.figures.items()} == {
            name: result[name] for name in ("eval_loss", "train_loss", "exact_match", "train_exact_match")
        }
        interval = share(round(result["exact_match"] * 16), 16)  # evaluation.examples
        shown = run.figures["exact_match"]
        assert (shown.low, shown.high, shown.rows) == (interval.low, interval.high, 16)
        assert {name: figure.value for name, figure in run.base.items()} == result["base"]
        assert run.test["loss"].low == result["test"]["loss"]["low"]


def test_curves_answers_audit_and_cost_of_a_finished_run_are_there(ranks):
    run = read_report([ranks]).runs[0]

    assert run.curves["loss"].steps == [1, 2, 3, 4, 5, 6]
    assert run.curves["eval_loss"].steps == [0, 3, 6]
    assert run.answers[0].step == 0
    assert run.shown_answers is not None
    assert run.shown_answers.step == 6
    assert run.shown_answers.samples[0].expected
    assert run.audit is not None
    assert run.audit["splits"]["train"]["rows"] == 142
    assert run.cost is not None
    assert run.cost.device_seconds is not None
    assert run.cost.money == pytest.approx(run.cost.device_seconds * 0.001, abs=1e-4)


def test_a_share_that_is_none_of_so_many_rows_gets_no_interval(make_run, ranks):
    run_dir = make_run("run", status="completed", exact_match=0.3, eval_loss=1.0, objective=1.0)
    audit = rundir.read_json(next(ranks.glob("*/data_audit.json")))
    rundir.write_json(run_dir / rundir.DATA_AUDIT, audit)

    figure = read_report([run_dir]).runs[0].figures["exact_match"]  # 36 rows are held out: 10.8 of them

    assert (figure.value, figure.low, figure.rows) == (0.3, None, None)


def test_a_run_that_is_being_written_is_read_up_to_the_last_whole_line(make_run, tmp_path):
    run_dir = make_run("going", records=[{"step": 0, "eval_loss": 7.0}, *losses(5.0, 4.0), {"step": 2, "eval_loss": 3}])
    with (run_dir / rundir.METRICS).open("a") as file:
        file.write('{"step": 3, "loss": 3.')
    sample = json.dumps({"step": 2, "prompt": "?", "answer": "Brasília", "expected": ""}, ensure_ascii=False).encode()
    (run_dir / rundir.SAMPLES).write_bytes(sample + b"\n" + sample[: sample.index(b"\xc3") + 1])

    with rundir.lock(run_dir):
        run = read_report([run_dir]).runs[0]

    assert run.state.status == "running"
    assert run.step == 2
    assert run.curves["loss"].values == [5.0, 4.0]
    assert run.figures["eval_loss"].value == run.objective == 3
    assert run.base["eval_loss"].value == 7.0
    assert run.rank is None
    assert [answers.samples[0].answer for answers in run.answers] == ["Brasília"]
    assert run.cost is not None
    assert (run.cost.tokens, run.cost.seconds) == (20, None)


def test_a_sweep_under_way_shows_every_job_and_why_one_failed(make_run, tmp_path):
    make_run("s/r=2", config=lora_config(2), status="completed", eval_loss=1.5, objective=1.5)
    failed = "out of memory\nTraceback ..."
    make_run("s/r=4", config=lora_config(4), records=losses(5.0), status="failed", error=failed)
    make_run("s/r=8", records=losses(5.0))
    sweep = write_sweep(
        tmp_path / "s",
        {"run_dir": "runs/s/r=2", "overrides": ["lora.r=2"], "objective": 1.5},  # as whoever started it saw it
        {"run_dir": "runs/s/r=4", "overrides": ["lora.r=4"], "status": "failed", "error": failed},
        {"run_dir": "runs/s/r=8", "overrides": ["lora.r=8"], "status": "running"},
        {"run_dir": "runs/s/r=16", "overrides": ["lora.r=16"], "status": "waiting"},
    )

    with rundir.lock(sweep / "r=8"):
        report = read_report([sweep])

    states = [(run.name, run.state.status, run.state.reason) for run in report.runs]
    assert states == [
        ("r=2", "completed", ""),
        ("r=4", "failed", "out of memory"),
        ("r=8", "running", ""),
        ("r=16", "waiting", ""),
    ]
    assert [run.rank for run in report.runs] == [1, None, None, None]
    assert dict(facts(report))["runs"] == "4: 1 completed, 1 running, 1 waiting, 1 failed"
    assert any("2 of 4 runs were not at their end" in caution for caution in cautions(report))


def test_a_run_under_way_has_the_interval_of_its_last_evaluation_and_of_the_one_before_training(make_run):
    evaluations = [
        {"step": step, "epoch": 0.0, "eval_loss": loss, "eval_loss_low": loss - 0.2, "eval_loss_high": loss + 0.3}
        for step, loss in ((0, 4.0), (1, 3.0), (2, 2.0))
    ]
    run_dir = make_run("a", records=[*evaluations, *losses(1.9, start=3)])

    (run,) = read_report([run_dir]).runs

    figures = run.base["eval_loss"], run.figures["eval_loss"]
    assert [(one.value, one.low, one.high) for one in figures] == [(4.0, 3.8, 4.3), (2.0, 1.8, 2.3)]


def test_the_interval_of_the_loss_says_whom_the_winner_cannot_be_told_from(make_run, tmp_path):
    for name, loss in (("a", 2.0), ("b", 2.1), ("c", 3.0)):
        interval = [loss - 0.2, loss + 0.2]
        make_run(
            f"s/{name}",
            records=losses(loss),
            status="completed",
            eval_loss=loss,
            objective=loss,
            eval_loss_interval=interval,
        )
    jobs = [{"run_dir": f"s/{name}", "overrides": [f"seed={name}"], "objective": 2.0} for name in "abc"]

    report = read_report([write_sweep(tmp_path / "s", *jobs)])

    assert report.winner.figures["eval_loss"].low == pytest.approx(1.8)
    assert any("95% interval meets that of 1 of the 2 others" in caution for caution in cautions(report))


def test_a_run_that_was_stopped_early_says_why_and_that_it_might_have_learnt_later(make_run, tmp_path):
    make_run("s/a", records=losses(2.0), status="completed", eval_loss=2.0, objective=2.0)
    verdict = {"step": 5, "place": 2, "of": 2, "goes_on": False}
    reason = "early_stop=halving: place 2 of 2 at step 5"
    make_run("s/b", records=losses(3.0), status="stopped", early_stop=verdict, error=reason, eval_loss=3.0)
    sweep = write_sweep(
        tmp_path / "s",
        {"run_dir": "s/a", "overrides": ["seed=1"], "objective": 2.0},
        {"run_dir": "s/b", "overrides": ["seed=2"], "status": "stopped", "error": reason},
    )

    report = read_report([sweep])

    assert [(run.state.status, run.state.reason) for run in report.runs] == [("completed", ""), ("stopped", reason)]
    assert any(caution.startswith("1 of 2 runs were stopped early, behind") for caution in cautions(report))
    assert any("chosen by eval_loss on the evaluation rows, out of 2 runs" in caution for caution in cautions(report))


def test_runs_without_an_evaluation_or_with_one_that_is_no_number_are_not_ranked(make_run, tmp_path):
    make_run("s/a", records=losses(2.0), status="completed", train_loss=2.0)
    make_run("s/b", records=losses(2.0), status="completed", train_loss=2.0, eval_loss=math.nan, objective=math.nan)
    sweep = write_sweep(
        tmp_path / "s",
        {"run_dir": "s/a", "overrides": ["seed=1"]},
        {"run_dir": "s/b", "overrides": ["seed=2"], "objective": math.nan},
    )

    report = read_report([sweep])

    assert [run.rank for run in report.runs] == [None, None]
    assert report.winner is None
    assert any("none is ranked" in caution for caution in cautions(report))
    assert not any("serve" in command for _, command in commands(report))


def test_of_preference_runs_the_highest_share_wins(make_run, tmp_path):
    values = {"recipe": "dpo", "dpo": DpoConfig(), "objective": "preference_accuracy"}
    for name, value in (("a", 0.5), ("b", 0.75)):
        make_run(
            f"s/{name}",
            config=lora_config(**values),
            records=losses(0.69),
            status="completed",
            preference_accuracy=value,
            objective=value,
        )
    jobs = [{"run_dir": f"s/{name}", "overrides": [f"dpo.beta={name}"]} for name in "ab"]

    report = read_report([write_sweep(tmp_path / "s", *jobs, objective="preference_accuracy")])

    assert [run.name for run in report.ranked] == ["b", "a"]


def test_runs_with_different_objectives_stand_side_by_side_unranked(make_run):
    sft = make_run("sft", records=losses(2.0), status="completed", eval_loss=1.0, objective=1.0)
    config = lora_config(recipe="dpo", dpo=DpoConfig(), objective="preference_accuracy")
    dpo = make_run("dpo", config=config, status="completed", preference_accuracy=0.5, objective=0.5)

    report = read_report([sft, dpo])

    assert [run.name for run in report.runs] == ["sft", "dpo"]
    assert report.objective is report.winner is None
    assert next(cautions(report)) == "The runs were to be compared by different figures, so they are not ranked."


def test_runs_that_are_no_sweep_are_told_apart_by_what_was_set(make_run):
    places = [
        make_run(f"r{r}", config=lora_config(r), records=losses(2.0), status="completed", eval_loss=r, objective=r)
        for r in (4, 2)
    ]

    report = read_report(places)

    assert [(run.name, run.swept["r"]) for run in report.ranked] == [("r2", "2"), ("r4", "4")]
    assert [(one.key, one.values) for one in differences(report.runs)] == [
        ("lora.lora_alpha", [4, 8]),
        ("lora.r", [2, 4]),
    ]


def test_of_a_single_run_what_was_set_is_compared_with_what_holds_unset(make_run):
    config = lora_config(16, seed=7, training=TrainingConfig(max_steps=5), derived=["lora.lora_alpha"])
    report = read_report([make_run("one", config=config, records=losses(2.0), status="completed")])

    assert [(one.key, *one.values) for one in differences(report.runs)] == [
        ("seed", 42, 7),
        ("lora.r", 8, 16),
        ("training.max_steps", None, 5),
    ]
    assert report.winner is report.runs[0]


def test_data_of_other_rows_is_a_caution(make_run):
    places = [
        make_run(name, status="completed", eval_loss=1.0, objective=1.0, dataset_fingerprint=name) for name in "ab"
    ]

    assert any("different rows" in caution for caution in cautions(read_report(places)))


def test_the_answers_shown_are_those_of_the_weights_that_were_delivered(make_run):
    def answered(step: int, answer: str) -> dict:
        return {"step": step, "prompt": "p", "answer": answer, "expected": "e"}

    samples = [answered(0, "base"), answered(1, "best\u2028 of all"), answered(2, "last")]
    records = [{"step": step, "eval_loss": loss} for step, loss in ((0, 9.0), (1, 1.0), (2, 2.0))]
    run_dir = make_run("run", records=records, samples=samples, status="completed", final_is="best", final_step=1)

    shown = read_report([run_dir]).runs[0].shown_answers

    assert shown is not None
    assert shown.samples[0].answer == "best\u2028 of all"  # which is a line end to some


def test_values_that_are_no_numbers_are_gaps(make_run):
    run_dir = make_run("run", records=losses(3.0, math.nan, math.inf, 2.0), status="failed", error="not finite")

    assert read_report([run_dir]).runs[0].curves["loss"].values == [3.0, None, None, 2.0]


def test_a_long_curve_keeps_its_ends_and_every_spike():
    points: list[tuple[int, float | None]] = [(step, 1.0) for step in range(100_000)]
    points[54_321] = (54_321, 99.0)
    points[77_777] = (77_777, None)

    kept = thinned(points)

    assert len(kept) <= MOST_POINTS
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert points[54_321] in kept
    assert points[77_777] in kept
    assert kept == sorted(kept, key=lambda point: point[0])
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]


@pytest.mark.parametrize("present", [[], [rundir.DATA_AUDIT], [rundir.METRICS], [rundir.RESULT]], ids=str)
def test_a_directory_with_files_missing_is_read(make_run, ranks, present):
    run_dir = make_run("run")
    for name in present:
        (run_dir / name).write_bytes(next(ranks.glob(f"*/{name}")).read_bytes())
    other = make_run("other", records=losses(1.0), status="completed", eval_loss=1.0, objective=1.0)

    run = next(run for run in read_report([run_dir, other]).runs if run.name == "run")

    assert run.state.status == ("completed" if rundir.RESULT in present else "unknown")


def test_nothing_to_show_is_said(make_run, tmp_path):
    sweep = write_sweep(tmp_path / "s", *({"run_dir": f"s/{name}", "status": "waiting"} for name in "ab"))

    with pytest.raises(ConfigError, match="nothing to show yet; none of its 2 runs has logged a step"):
        read_report([sweep])
    with pytest.raises(ConfigError, match="nothing to show yet"):
        read_report([make_run("new")])


def test_a_directory_that_is_neither_names_what_lies_below_it(make_run, tmp_path):
    make_run("runs/alpha")

    with pytest.raises(ConfigError, match=r"neither a run .* nor a sweep .* Below it: .*runs/alpha"):
        read_report([tmp_path / "runs"])


def test_a_run_named_twice_is_shown_once(make_run, tmp_path):
    run_dir = make_run("run", records=losses(1.0), status="completed")

    assert len(read_report([run_dir, tmp_path / "." / "run"]).runs) == 1


def test_runs_with_the_same_name_or_the_same_config_keep_apart(make_run, tmp_path):
    places = [make_run(f"{folder}/x", records=losses(1.0), config=lora_config(r)) for folder, r in (("a", 2), ("b", 4))]
    assert [run.name for run in read_report(places).runs] == [str(place) for place in places]

    again = make_run("again", records=losses(1.0), config=lora_config(2))
    assert len({run.label for run in read_report([places[0], places[1], again]).runs}) == 3


def test_models_that_are_unlike_in_many_ways_are_told_apart_by_their_names(make_run):
    model = ModelConfig(name="other", hub_id="a/b", revision="v2", gated=True, pad_token="eos", chat_template="plain")
    training = TrainingConfig(learning_rate=1e-3, weight_decay=0.1)
    places = [
        make_run("one", records=losses(1.0)),
        make_run("two", config=lora_config(model=model, training=training, seed=1), records=losses(1.0)),
    ]

    assert [run.label for run in read_report(places).runs] == ["one", "two"]
