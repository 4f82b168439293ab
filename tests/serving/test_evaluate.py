"""`llmkit evaluate` in this process: figures are those of training, on the rows that are meant, and they are kept."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import talking

from llmkit import evaluate
from llmkit.rundir import read_result
from llmkit.serving import harness

talking_run = talking.talking_run  # a fixture
Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture
def run_copy(talking_run: Path, tmp_path: Path) -> Path:
    """A copy of the run, for results of its own."""
    return Path(shutil.copytree(talking_run, tmp_path / "runs" / "talking"))


@pytest.fixture
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """A function: words -> the newest record of evaluation.json in `home`, the run's directory."""
    monkeypatch.chdir(tmp_path)

    def run(home: Path, *words: str) -> dict[str, Any]:
        assert evaluate.main(list(words)) == 0
        return json.loads((home / "evaluation.json").read_text())["evaluations"][-1]

    return run


def write_rows(file: Path, *rows: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_alone_it_measures_the_newest_run_on_the_rows_that_it_held_out(run_copy, evaluated, capsys):
    record = evaluated(run_copy)

    answers = [json.loads(line) for line in (run_copy / "evaluation_answers.jsonl").read_text().splitlines()]
    loss, exact = record["figures"]["loss"], record["figures"]["exact_match"]
    assert loss["value"] == pytest.approx(read_result(run_copy)["eval_loss"], abs=1e-5)
    assert loss["low"] < loss["value"] < loss["high"]
    assert exact["value"] == sum(answer["matches"] for answer in answers) / 36 > 0
    assert (record["rows"], exact["n"], len(answers)) == (36, 36, 36)
    assert set(answers[0]) == {"prompt", "answer", "expected", "matches"}
    assert record["where"] == "in this process, on cpu"
    said = capsys.readouterr()
    assert f"{exact['value']:.1%}" in said.out
    assert f"wrong      {36 - sum(answer['matches'] for answer in answers)} of 36" in said.out
    assert f"newest     {run_copy}" in said.err


def test_other_rows_are_taken_all_and_records_are_added(run_copy, evaluated, tmp_path):
    rows = [chat("Who are you?", "I am a tiny model, fine-tuned with llmkit."), chat("Who are you?", "You.")]
    file = write_rows(tmp_path / "mine.jsonl", *rows)

    both = evaluated(run_copy, f"run={run_copy}", f"data.path={file}")
    first = evaluated(run_copy, f"run={run_copy}", f"data.path={file}", "limit=1")

    assert both["figures"]["exact_match"]["value"] == 0.5
    assert both["data"] == f"data.path={file}"
    assert first["figures"]["exact_match"] == {
        "value": 1.0,
        "low": pytest.approx(0.2065, abs=1e-4),
        "high": 1.0,
        "n": 1,
    }
    assert first["data"] == f"the first 1 of data.path={file}"
    assert len(json.loads((run_copy / "evaluation.json").read_text())["evaluations"]) == 2


def test_a_share_that_was_held_out_is_found_again(make_run, evaluated, tmp_path, monkeypatch):
    from llmkit.config import load
    from llmkit.data.prepare import prepare_data
    from llmkit.serving.loaded import load_target_tokenizer
    from llmkit.serving.target import of_run

    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", *(chat(f"{n}?", f"{n}!") for n in range(40)))
    run = make_run(validation=0.3)
    held_out = prepare_data(load(run).data, load_target_tokenizer(of_run(run)), max_length=2048).validation

    record = evaluated(run, f"run={run}")

    answers = [json.loads(line) for line in (run / "evaluation_answers.jsonl").read_text().splitlines()]
    assert record["rows"] == len(held_out) < 40
    assert [one["expected"] for one in answers] == [one.messages[-1]["content"] for one in held_out.examples(40)]


def test_the_test_rows_of_a_run_come_before_those_it_held_out(make_run, evaluated, tmp_path):
    write_rows(tmp_path / "rows.jsonl", *(chat(f"{n}?", f"{n}!") for n in range(8)))
    test = write_rows(tmp_path / "test.jsonl", chat("What?", "That."), chat("Who?", "Me."), chat("Why?", "So."))
    run = make_run(test=str(test))

    record = evaluated(run, f"run={run}")

    assert record["data"] == f"data.test of run={run}"
    assert record["rows"] == 3


@pytest.mark.parametrize(("method", "settings"), [("full", {}), ("qlora", {"chat_template": "chat-ml"})])
def test_the_loss_is_that_of_the_model_itself(make_run, evaluated, tmp_path, method, settings):
    import torch

    from llmkit.data.encoding.masks import AnswerFinder, render
    from llmkit.serving.loaded import load_target
    from llmkit.serving.target import of_run

    run = make_run(method=method, **settings)
    row = chat("What is it?", "It is that.")
    record = evaluated(run, f"run={run}", f"data.path={write_rows(tmp_path / 'one.jsonl', row)}")

    loaded = load_target(of_run(run))
    text = render(loaded.tokenizer, row["messages"])
    ((start, end),) = AnswerFinder(loaded.tokenizer).spans(row["messages"], text)
    tokens = loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt", return_offsets_mapping=True)
    learnt = [a >= start and b <= end and a < b for a, b in tokens["offset_mapping"][0].tolist()]
    with loaded.arithmetic(), torch.no_grad():
        logits = loaded.model(input_ids=tokens["input_ids"]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1].float(), tokens["input_ids"][0][1:], reduction="none")
    assert record["figures"]["loss"]["value"] == pytest.approx(
        float(expected[torch.tensor(learnt[1:])].mean()), abs=1e-4
    )


def test_of_pairs_it_counts_those_whose_chosen_answer_is_likelier(run_copy, evaluated, tmp_path):
    me = "I am a tiny model, fine-tuned with llmkit."
    sides = [(me, "Accra"), ("Accra", me)]
    pairs = [{"prompt": "Who are you?", "chosen": chosen, "rejected": other} for chosen, other in sides]
    file = write_rows(tmp_path / "pairs.jsonl", *pairs)

    record = evaluated(run_copy, f"run={run_copy}", f"data.path={file}", "recipe=dpo")

    assert list(record["figures"]) == ["preference_accuracy"]
    assert record["figures"]["preference_accuracy"]["value"] == 0.5


def test_a_base_model_is_measured_on_rows_that_the_command_names(evaluated, tmp_path):
    record = evaluated(tmp_path / "runs" / "served" / "tiny", "model=tiny", "data=demo", "limit=3")

    assert record["model"] == "model=tiny"
    assert record["figures"]["exact_match"]["value"] == 0


def test_a_tracker_hears_of_it_as_a_part_of_the_run(run_copy, evaluated, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (run_copy / "wandb" / "offline-run-20260101_000000-abcd1234").mkdir(parents=True)

    evaluated(run_copy, f"run={run_copy}", "limit=2", "tracking=wandb")

    kept = [folder.name for folder in (run_copy / "wandb").glob("offline-run-*")]
    assert len(kept) == 2
    assert {name.rpartition("-")[2] for name in kept} == {"abcd1234"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["limit=many"], "limit=many: must be a whole number"),
        (["concurrency=4"], "concurrency: is about an endpoint"),
        (["backend=chat"], "backend: says how tasks are asked"),
        (["run=RUN", "url=http://127.0.0.1:1", "served=true"], "url and served: one of them at a time"),
        (["run=RUN", "served=true"], "no server is running for run="),
        (["run=RUN", "data.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["run=RUN", "data.chat_template=plain"], "brings its own chat template"),
        (["model=tiny"], "model=tiny brings no rows; name some: data.path=FILE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_words_end_in_a_message(talking_run, words, said, capsys):
    assert evaluate.main([word.replace("RUN", str(talking_run)) for word in words]) == 2
    assert said in capsys.readouterr().err


def test_without_the_harness_its_tasks_say_how_to_add_it(talking_run, monkeypatch, capsys):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda _: None)

    assert evaluate.main([f"run={talking_run}", "tasks=gsm8k"]) == 2
    assert "lm-evaluation-harness, which is not installed here: make" in capsys.readouterr().err


def test_two_evaluations_that_end_together_are_both_kept(tmp_path):
    program = (
        "import sys; from pathlib import Path; from llmkit.serving.evaluation import keep\n"
        "for n in range(20): keep(Path(sys.argv[1]), {'n': n}, {}, [])"
    )
    both = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(2)]
    assert [one.wait(120) for one in both] == [0, 0]

    assert len(json.loads((tmp_path / "evaluation.json").read_text())["evaluations"]) == 40


def test_what_the_harness_found_is_read_with_its_intervals():
    from llmkit.serving.harness import _figures

    found = _figures(
        {
            "results": {
                "sums": {
                    "alias": "sums",
                    "exact_match,strict": 0.75,
                    "exact_match_stderr,strict": 0.25,
                    "bits,none": 2.0,
                    "bits_stderr,none": 0.5,
                    "f1,none": 0.5,
                    "f1_stderr,none": "N/A",
                }
            },
            "n-samples": {"sums": {"original": 9, "effective": 4}},
        }
    )

    assert list(found) == ["sums exact_match (strict)", "sums bits", "sums f1"]
    share, mean, bare = found.values()
    assert (share.value, share.n) == (0.75, 4)
    assert 0 < share.low < 0.75 < share.high < 1
    assert (mean.low, mean.high) == (pytest.approx(1.02, abs=1e-3), pytest.approx(2.98, abs=1e-3))
    assert (bare.low, bare.high) == (None, None)
