"""Start vLLM on what was trained: `llmkit serve [run=RUN_DIR | sweep=DIR | model=NAME] [serve.KEY=VALUE ...]`."""

import sys
from dataclasses import fields
from pathlib import Path

from llmkit.cli import guarded
from llmkit.config import TrainConfig
from llmkit.config.grammar import to_grammar
from llmkit.config.schema import ServeConfig
from llmkit.config.user_file import give_way
from llmkit.errors import EXIT_DONE, EXIT_FAILED, ConfigError
from llmkit.serving.state import Running, all_running, forget, running
from llmkit.serving.target import KEYS, RUNS, Target, find_target, of_model, of_run, ranked_runs
from llmkit.words import YES_OR_NO, Words, composed, sort_words

HELP = """\
llmkit serve [run=RUN_DIR | sweep=DIR | model=NAME | model.path=DIR] [serve.KEY=VALUE ...]

Starts vLLM on what was trained, with its template, tokens and precision, and checks that it computes what training
computed. Without words: the newest finished run under runs/. Ctrl-C lets requests in flight end, then the server.

  run      a finished run, s3://bucket/.../NAME, or a checkpoint: RUN_DIR/checkpoints/step-...
  sweep    the best run of a sweep; with serve.all=true every adapter of it, on one base
  model    a model that was not trained here: a shipped name, org/name, or model.path=DIR
  serve    a preset: {presets}; and any serve.KEY=VALUE:
           port, host, dtype, quantization, max_model_len, devices, gpu_memory_utilization, adapter=merged, ...
  dry_run  true: check, print the command (also for vLLM's own image) and stop
  status   true: which servers run;  stop  true: end them (with run= that one)

Examples:
  llmkit serve
  llmkit serve run=runs/alpha serve.port=8001 serve.detach=true
  llmkit serve sweep=runs/ranks serve.all=true
  llmkit serve model=mistral7b serve=2gpu serve.devices=0,1
  llmkit serve stop=true

Any address but this machine's own (serve.host=0.0.0.0) needs VLLM_API_KEY in the environment."""

OWN = {**KEYS, "dry_run": YES_OR_NO, "status": YES_OR_NO, "stop": YES_OR_NO}
NODES = ("serve", "model", "storage", "hardware", "export")


def main(argv: list[str] | None = None) -> int:
    """The verb; returns the exit code."""
    return guarded(_serve, argv)


def _serve(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        from llmkit.config.registration import group_options

        print(HELP.format(presets=", ".join(group_options("serve"))))
        return EXIT_DONE
    exclusive = [("run", "sweep", "model"), ("status", "stop", "dry_run")]
    words = sort_words(argv, verb="serve", own=OWN, nodes=NODES, exclusive=exclusive)
    if words.on("status"):
        return _show_status(words)
    if words.on("stop"):
        return _stop(words)
    config = composed(words.overrides)
    targets = _targets(words, config)
    first = next(iter(targets.values()))
    if own := _serve_settings_of(first):
        config = composed([*give_way(own, words.overrides), *words.overrides])
    from llmkit.recipes import serve

    return serve.run(targets, config, dry_run=words.on("dry_run"))


def _targets(words: Words, config: TrainConfig) -> dict[str, Target]:
    """What is to be served, by the names it is asked for under."""
    if config.serve.all:
        if "sweep" not in words.own:
            raise ConfigError("serve.all=true: is for a sweep; name it, sweep=DIR.")
        if config.serve.served_model_name:
            raise ConfigError("serve.served_model_name: with serve.all=true each adapter has the name of its run.")
        targets = [of_run(run) for run in ranked_runs(Path(words.own["sweep"]).expanduser())]
        return {target.name: target for target in targets}
    target = of_model(config.model) if words.names("model") else find_target(words.own, config)
    if not words.own.keys() & {"run", "sweep"} and not words.names("model"):
        print(f"newest     {target.said}")
    elif "sweep" in words.own:
        print(f"best       {target.said}")
    return {config.serve.served_model_name or target.name: target}


def _serve_settings_of(target: Target) -> list[str]:
    """What the run's own config says of serving, as overrides in front of the command's."""
    if target.run is None:
        return []
    default, own = ServeConfig(), target.run.serve
    values = {info.name: getattr(own, info.name) for info in fields(ServeConfig) if info.name != "name"}
    return [f"serve.{key}={to_grammar(value)}" for key, value in values.items() if value != getattr(default, key)]


def _show_status(words: Words) -> int:
    servers = _servers(words)
    if not servers:
        print(f"no server of llmkit's runs for anything under {RUNS.absolute()}")
    for home, server in servers:
        state = "answers" if server.answers else "does not answer yet"
        print(f"{home}: {server.url} {state}, {', '.join(server.names)}; process {server.pid} since {server.started}")
    return EXIT_DONE


def _stop(words: Words) -> int:
    servers = _servers(words)
    if not servers:
        print(f"no server of llmkit's runs for anything under {RUNS.absolute()}")
    in_time = True
    for home, server in servers:
        print(f"stopping   {home} at {server.url}: requests in flight have {server.shutdown_timeout} s", flush=True)
        in_time &= server.stop()
        forget(home)
    return EXIT_DONE if in_time else EXIT_FAILED


def _servers(words: Words) -> list[tuple[Path, Running]]:
    """The servers that run for what is named; without a name all."""
    if not words.own.keys() & {"run", "sweep"} and not words.names("model"):
        return all_running(RUNS)
    config = composed(words.overrides)
    target = of_model(config.model) if words.names("model") else find_target(words.own, config)
    server = running(target.home)
    return [(target.home, server)] if server else []


if __name__ == "__main__":
    sys.exit(main())
