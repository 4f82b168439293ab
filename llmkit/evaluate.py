"""Measure a model on rows: `llmkit evaluate [run=RUN_DIR] [data.path=FILE] [url=URL]`."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmkit.answering import light_imports, meant, say, whole_number
from llmkit.cli import guarded
from llmkit.config import TrainConfig
from llmkit.data.progress import now_and_then
from llmkit.errors import EXIT_DONE, ConfigError
from llmkit.serving.target import Target
from llmkit.words import YES_OR_NO, Words, composed, sort_words

if TYPE_CHECKING:
    from llmkit.serving.answers import Answering
    from llmkit.serving.endpoint import Endpoint
    from llmkit.training.estimate import Estimate
    from llmkit.training.generation import Answer

HELP = """\
llmkit evaluate [run=RUN_DIR | sweep=DIR | model=NAME] [data.path=FILE] [url=URL] [KEY=VALUE ...]

Asks a model the questions of a data set and counts the answers that are, word for word, the expected ones; in this
process it measures the loss too, and of preference pairs how often the chosen answer is the likelier one. Every figure
has its 95% interval. Alone: the newest finished run under runs/, on its data.test, else on its held-out rows.

  run            a run's directory, one of its checkpoints, or s3://...; sweep: the best run of one
  model          a base model: model=NAME, model=org/name, model.path=DIR
  data           other rows, as llmkit train takes them: data.path=FILE, data.hub_id=..., data.format=...
  recipe         sft or dpo: whether other rows are conversations or pairs; unset: as the run was trained
  url            ask the model at this endpoint (http://HOST:PORT) instead of loading it; the key is VLLM_API_KEY or
                 OPENAI_API_KEY in the environment
  served         true: ask the server that llmkit serve has running for the run
  name           the model's name at the endpoint, where it serves several
  concurrency    requests under way at a time, 16 unless you say otherwise
  limit          the first so many rows only
  max_new_tokens longest answer in tokens; unset: that of the longest expected answer, and a few more
  tasks          tasks of lm-evaluation-harness instead of rows: tasks=gsm8k,ifeval; needs url= or served=true
  backend        how the harness asks: chat (the default) or completions, which tasks that compare likelihoods need
  tracking       wandb: into the run's W&B page too; unset: as the run was tracked

Written beside the run: evaluation.json (all evaluations, the newest last), evaluation_answers.jsonl (its answers).

Examples:
  llmkit evaluate
  llmkit evaluate run=runs/alpha data.path=questions.jsonl limit=200
  llmkit evaluate run=runs/alpha url=http://127.0.0.1:8000
  llmkit evaluate model=qwen3_0_6b data=gsm8k data.test=test
  llmkit evaluate run=runs/alpha served=true tasks=gsm8k limit=50"""

KEYS = {
    "run": "RUN_DIR",
    "sweep": "DIR",
    "url": "URL",
    "served": YES_OR_NO,
    "name": "NAME",
    "concurrency": "N",
    "limit": "N",
    "max_new_tokens": "N",
    "tasks": "TASK,TASK",
    "backend": "chat",
}
NODES = ("model", "data", "recipe", "tracking", "storage")
RENDERING = ("data.chat_template", "data.special_tokens")  # what a run brings itself
WRONG_SHOWN = 3
BATCH_SIZE = 8  # rows whose loss is measured at a time, where the run does not say


def main(argv: list[str] | None = None) -> int:
    """The verb; returns the exit code."""
    return guarded(_evaluate, argv)


def _evaluate(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(HELP)
        return EXIT_DONE
    words = sort_words(
        argv,
        verb="evaluate",
        own=KEYS,
        nodes=NODES,
        exclusive=[("run", "sweep", "model"), ("url", "served"), ("tasks", "data")],
    )
    asked = _asked(words)
    config = composed(words.overrides)
    target = meant(words, config)
    if target.run and (given := [one for one in words.overrides if one.startswith(RENDERING)]):
        raise ConfigError(f"{given[0]}: {target.said} brings its own chat template and tokens.")
    tracked = _tracked(words, config, target)
    began = time.monotonic()
    with ExitStack() as opened:
        endpoint = _endpoint(asked, target, opened)
        with light_imports(tracked):
            import llmkit.serving.evaluation  # noqa: F401 - all that is heavy
        found = _tasks(asked, target, endpoint) if asked.tasks else _rows(words, config, asked, target, endpoint)
    _keep(found, target, tracked, seconds=time.monotonic() - began)
    return EXIT_DONE


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked for beside the config."""

    url: str | None
    served: bool
    name: str | None
    concurrency: int | None
    limit: int | None
    max_new_tokens: int | None
    tasks: list[str]
    chat: bool


def _asked(words: Words) -> Asked:
    """The verb's own words. Raises ConfigError for values that are none, and for words without what they are about."""
    own = words.own
    if own.get("backend", "chat") not in ("chat", "completions"):
        raise ConfigError(f"backend={own['backend']}: chat or completions.")
    if "backend" in own and "tasks" not in own:
        raise ConfigError("backend: says how tasks are asked, and goes with tasks=.")
    if "url" not in own and not words.on("served") and (alone := [k for k in ("name", "concurrency") if k in own]):
        raise ConfigError(f"{alone[0]}: is about an endpoint, and goes with url=URL or served=true.")
    return Asked(
        url=own.get("url"),
        served=words.on("served"),
        name=own.get("name"),
        concurrency=whole_number(words, "concurrency"),
        limit=whole_number(words, "limit"),
        max_new_tokens=whole_number(words, "max_new_tokens"),
        tasks=own["tasks"].split(",") if "tasks" in own else [],
        chat=own.get("backend", "chat") == "chat",
    )


@dataclass(frozen=True, kw_only=True)
class Found:
    """What an evaluation found."""

    record: dict[str, Any]  # what was asked, where
    figures: "dict[str, Estimate]"
    answers: "list[Answer]" = field(default_factory=list)


def _endpoint(asked: Asked, target: Target, opened: ExitStack) -> "Endpoint | None":
    """The endpoint to ask, if one is named. Raises ConfigError, or AnswerError if it does not answer."""
    from llmkit.serving.endpoint import CONCURRENCY, Endpoint, running_server

    url, name = asked.url, asked.name
    if asked.served:
        if (found := running_server(target, name=name)) is None:
            raise ConfigError(
                f"served=true: no server is running for {target.said}; llmkit serve {target.said} starts one."
            )
        url, name = found
    if url is None:
        return None
    concurrency = asked.concurrency or CONCURRENCY
    endpoint = opened.enter_context(Endpoint.at(url, name=name, wanted=target.name, concurrency=concurrency))
    if endpoint.model not in (target.name, name):
        raise ConfigError(
            f"{endpoint.url} serves {endpoint.model}, and the results would be those of {target.said}. Say "
            f"name={endpoint.model} if that is the same model, or name the other one with run= or model=."
        )
    return endpoint


def _tasks(asked: Asked, target: Target, endpoint: "Endpoint | None") -> Found:
    """Ask tasks of lm-evaluation-harness."""
    from llmkit.serving.harness import check_installed, run_tasks

    check_installed()
    if endpoint is None:
        raise ConfigError(f"tasks: are asked of a server: url=URL, or llmkit serve {target.said} and served=true.")
    figures = run_tasks(
        asked.tasks, endpoint, target, chat=asked.chat, limit=asked.limit, max_new_tokens=asked.max_new_tokens
    )
    record = {"where": endpoint.where, "tasks": asked.tasks, "limit": asked.limit}
    return Found(record=record, figures=figures)


def _rows(words: Words, config: TrainConfig, asked: Asked, target: Target, endpoint: "Endpoint | None") -> Found:
    """Ask for the answers that rows expect; in process measure the loss, or which of a pair is preferred."""
    from llmkit.serving import evaluation
    from llmkit.serving.in_process import load_answering, load_answering_tokenizer

    if not words.names("data") and target.run is None:
        raise ConfigError(f"{target.said} brings no rows; name some: data.path=FILE.")
    local = None if endpoint else load_answering(target, config)
    answering: Answering = endpoint or local  # type: ignore[assignment]  # one of the two
    tokenizer = local.loaded.tokenizer if local else load_answering_tokenizer(target, config)
    say("model", f"{target.said}, {answering.where}")
    rows = evaluation.find_rows(
        _with_data(words, config, target),
        tokenizer,
        said=_data_said(words, config, target),
        whole=words.names("data"),
        limit=asked.limit,
        told=now_and_then(lambda line: say("preparing", line), seconds=10.0),
    )
    if endpoint and not rows.asked:
        raise ConfigError(f"{rows.said}: nothing of it can be asked over HTTP; leave url and served out.")
    say("data", f"{rows.said}: {len(rows.dataset):,} {'row' if len(rows.dataset) == 1 else 'rows'}")
    record: dict[str, Any] = {"where": answering.where, "data": rows.said, "rows": len(rows.dataset)}
    record["dataset_fingerprint"] = rows.fingerprint
    figures: dict[str, Estimate] = {}
    answers: list[Answer] = []
    if local:
        size = target.run.training.per_device_eval_batch_size if target.run else None
        figures = evaluation.measure_likelihood(local.loaded, rows, batch_size=size or BATCH_SIZE)
    if rows.asked:
        limit = asked.max_new_tokens or (target.run.evaluation.max_new_tokens if target.run else None)
        limit = limit or evaluation.answer_limit(tokenizer, rows.asked)
        with _progress("answers", len(rows.asked)) as told:
            exact, answers = evaluation.measure_answers(answering, rows, max_new_tokens=limit, told=told)
        figures |= exact
        record["max_new_tokens"] = limit
    return Found(record=record, figures=figures, answers=answers)


def _with_data(words: Words, config: TrainConfig, target: Target) -> TrainConfig:
    """The config whose rows are meant: the command's, else the run's; with the target's model and the right recipe."""
    from llmkit.model.context import settle_lengths

    run = target.run or config
    own = config if words.names("data") else run
    data = dataclasses.replace(own.data, max_length=own.data.max_length or run.data.max_length)
    recipe = config.recipe if words.names("recipe") else run.recipe
    own = dataclasses.replace(own, data=data, recipe=recipe, model=dataclasses.replace(target.base))
    settle_lengths(own)
    return own


def _data_said(words: Words, config: TrainConfig, target: Target) -> str:
    if not words.names("data"):
        return target.said
    data = config.data
    return f"data.path={data.path}" if data.path and data.name == "jsonl" else f"data={data.name}"


@contextmanager
def _progress(what: str, total: int) -> "Iterator[Callable[[int], None]]":
    """A bar on a terminal; yields what is told how many more are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal or not total) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def _tracked(words: Words, config: TrainConfig, target: Target) -> TrainConfig:
    """The config whose tracker hears of it: the run's, with the command's own tracking where it says something."""
    if target.run is None:
        return config
    return dataclasses.replace(target.run, tracking=config.tracking) if words.names("tracking") else target.run


def _keep(found: Found, target: Target, config: TrainConfig, *, seconds: float) -> None:
    """Write, track and show what was found."""
    from llmkit.serving import evaluation
    from llmkit.training.versions import versions

    record = {"model": target.said, **found.record, "seconds": round(seconds, 2), "versions": versions()}
    record = evaluation.keep(target.home, record, found.figures, found.answers)
    _track(config, target, record)
    _show(target, found)


def _track(config: TrainConfig, target: Target, record: dict[str, Any]) -> None:
    """Tell the tracker, as a part of the run where it has a record of that."""
    from llmkit.training.tracking import start_tracker

    earlier = sorted(target.home.glob("wandb/*run-*-*"), key=lambda folder: folder.stat().st_mtime)
    tracker = start_tracker(config, target.home, earlier[-1].name.rpartition("-")[2] if earlier else None)
    summary = {name: figure["value"] for name, figure in record["figures"].items()}
    summary |= {name: record[name] for name in ("data", "tasks", "where") if name in record}
    tracker.finish(plots=[], summary={f"evaluation/{name}": value for name, value in summary.items()}, failed=False)
    if tracker.where:
        say("tracking", tracker.where)


def _show(target: Target, found: Found) -> None:
    """The figures as a table, and a few of the wrong answers."""
    from llmkit.serving.evaluation import ANSWERS, EVALUATIONS
    from llmkit.training.console import RunConsole

    def shown(name: str, value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:.4f}" if name == "loss" else f"{value:.1%}"

    def row(name: str, figure: "Estimate") -> list[str]:
        between = f"{shown(name, figure.low)} to {shown(name, figure.high)}" if figure.low is not None else "-"
        return [name.replace("_", " "), shown(name, figure.value), between, f"{figure.n:,}"]

    console = RunConsole()
    rows = [row(name, figure) for name, figure in found.figures.items()]
    console.table(target.said, ["", "", "95% interval", "rows"], rows)
    if wrong := [answer for answer in found.answers if not answer.matches]:
        console.fact("wrong", f"{len(wrong):,} of {len(found.answers):,}; the first:")
        for answer in wrong[:WRONG_SHOWN]:
            console.fact(
                "", f"{_short(answer.prompt)} -> {_short(answer.answer)} (expected: {_short(answer.expected)})"
            )
    for name in (EVALUATIONS, ANSWERS)[: 1 + bool(found.answers)]:
        console.fact("written", str(target.home / name))


def _short(text: str, limit: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


if __name__ == "__main__":
    sys.exit(main())
