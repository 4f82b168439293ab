"""Start vLLM on what was trained: `llmkit serve [run=RUN_DIR | sweep=DIR | model=NAME] [serve.KEY=VALUE ...]`."""

import sys
from dataclasses import fields
from pathlib import Path

from llmkit.cli import guarded
from llmkit.config import TrainConfig
from llmkit.config.grammar import split_override, to_grammar
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
OF_ONE_COMMAND = ("name", "all", "detach")  # of `serve`: said anew each time


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
    if own := _serve_settings_of(targets[0]):
        config = composed([*give_way(own, words.overrides), *words.overrides])
    passed_on = [one for one in words.overrides if split_override(one)[0].split(".")[0] in ("export", "storage")]
    from llmkit.recipes import serve

    return serve.run(_named(targets, config), config, passed_on, dry_run=words.on("dry_run"))


def _targets(words: Words, config: TrainConfig) -> list[Target]:
    """What is to be served."""
    if config.serve.all:
        if "sweep" not in words.own:
            raise ConfigError("serve.all=true: is for a sweep; name it, sweep=DIR.")
        return [of_run(run) for run in ranked_runs(Path(words.own["sweep"]).expanduser())]
    target = of_model(config.model) if words.names("model") else find_target(words.own, config)
    if "sweep" in words.own:
        print(f"best       {target.said}")
    elif not _names_a_target(words):
        print(f"newest     {target.said}")
    return [target]


def _named(targets: list[Target], config: TrainConfig) -> dict[str, Target]:
    """The targets by the names they are asked for under."""
    name = config.serve.served_model_name
    if len(targets) == 1:
        return {name or targets[0].name: targets[0]}
    if name:
        raise ConfigError("serve.served_model_name: with serve.all=true each adapter has the name of its run.")
    return {target.name: target for target in targets}


def _names_a_target(words: Words) -> bool:
    return bool(words.own.keys() & {"run", "sweep"}) or words.names("model")


def _serve_settings_of(target: Target) -> list[str]:
    """What the run's own config says of serving, as overrides in front of the command's own."""
    if target.run is None:
        return []
    default, own = ServeConfig(), target.run.serve
    values = {info.name: getattr(own, info.name) for info in fields(ServeConfig)}
    kept = {key: value for key, value in values.items() if key not in OF_ONE_COMMAND and value != getattr(default, key)}
    return [f"serve.{key}={to_grammar(value)}" for key, value in kept.items()]


def _show_status(words: Words) -> int:
    servers = _servers(words)
    for home, server in servers:
        state = "answers" if server.answers else "is not ready yet" if not server.ready else "does not answer"
        print(f"{home}: {server.url} {state}, {', '.join(server.names)}; process {server.pid} since {server.started}")
    return EXIT_DONE


def _stop(words: Words) -> int:
    stopping = []
    for home, server in _servers(words):
        print(f"stopping   {home} at {server.url}: requests in flight have {server.shutdown_timeout} s", flush=True)
        stopping.append((home, server.ask_to_stop(home)))
    code = EXIT_DONE
    for home, server in stopping:
        if not server.wait():
            print(f"warning: {home}: it did not end by itself and was killed.", file=sys.stderr)
            code = EXIT_FAILED
        forget(home, server.pid)
    return code


def _servers(words: Words) -> list[tuple[Path, Running]]:
    """The servers that run for what is named; without a name all. Says so if there is none."""
    if not _names_a_target(words):
        servers = all_running(RUNS)
        what = f"anything under {RUNS.absolute()}"
    else:
        home = _targets(words, composed(words.overrides))[0].home
        servers = [(home, server)] if (server := running(home)) else []
        what = str(home)
    if not servers:
        print(f"no server of llmkit's runs for {what}")
    return servers


if __name__ == "__main__":
    sys.exit(main())
