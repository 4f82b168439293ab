"""Serve what was trained: check, start vLLM, prove that it computes what training computed, and keep it until the end.

    llmkit serve run=runs/alpha

Runs in the process of the verb, which imports neither torch nor vLLM: the server is a child.
"""

import datetime
import json
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from llmkit import rundir
from llmkit.config import TrainConfig
from llmkit.errors import EXIT_DONE, ConfigError
from llmkit.serving.checks import check
from llmkit.serving.console import LogFilter, fact, warn
from llmkit.serving.environment import find_environment
from llmkit.serving.http import NoAnswer
from llmkit.serving.merged import merged_where_needed
from llmkit.serving.parity import NotTheSame, compare, read_probe
from llmkit.serving.plan import KEY, Plan, make_plan
from llmkit.serving.server import Server
from llmkit.serving.state import LOG, Running, born, forget, running, was_asked_to_stop
from llmkit.serving.target import Target

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_OF_A_REFUSED = 10.0  # to end, for a server that is not what was trained


class StopAsked(BaseException):
    """A signal asked for a stop before the server was ready."""


def run(targets: dict[str, Target], config: TrainConfig, overrides: Sequence[str], *, dry_run: bool) -> int:
    """Serve the targets by their names until a signal asks to stop; returns the exit code.

    Args:
        overrides: what the command line says of merging and of buckets.

    Raises LlmkitError for the user to read: what does not fit, a server that dies, one that is not what was trained.
    """
    began = time.monotonic()
    home = next(iter(targets.values())).home
    if not dry_run and (other := running(home)):
        raise ConfigError(f"{home}: a server runs for it already, at {other.url}; llmkit serve stop=true ends it.")
    environment = find_environment(config.serve.python)
    asked = {name: target.source for name, target in targets.items()}
    targets = merged_where_needed(targets, config.serve.adapter, overrides, dry_run=dry_run)
    plan = make_plan(targets, config, environment)
    plan, facts, warnings = check(plan, config.hardware)
    state_facts(plan, facts, warnings)
    if dry_run:
        return show_commands(plan)

    server = Server(plan, home / LOG, show=LogFilter())
    with _signals() as signals:
        try:
            state = start(server, home, asked)
            server.wait_until_ready()
            check_parity(plan)
            replace(state, ready=True).write(home)
            announce(plan, server, seconds=time.monotonic() - began)
            signals.raises = False
            if plan.serve.detach and not signals.asked:
                return EXIT_DONE
            while not signals.asked and not (server.has_ended and was_asked_to_stop(home, server.pid)):
                server.check_alive()
                time.sleep(SECONDS_BETWEEN_LOOKS)
        except StopAsked:
            signals.raises = False
        except BaseException:
            if server.process is not None:
                server.end(within=SECONDS_OF_A_REFUSED)
                forget(home, server.pid)
            raise
        return stop(server, home)


def start(server: Server, home: Path, asked: dict[str, str]) -> Running:
    """Start it, the only one for its home, and say so in serve.json."""
    home.mkdir(parents=True, exist_ok=True)
    with rundir.lock(home):  # of two commands at the same time one starts
        if other := running(home):
            raise ConfigError(f"{home}: a server was started for it just now, at {other.url}.")
        server.start()
        state = Running(
            pid=server.pid,
            born=born(server.pid) or "",
            host=socket.gethostname(),
            url=server.plan.url,
            sources=asked,
            log=str(server.log),
            started=datetime.datetime.now().isoformat(timespec="seconds"),
            shutdown_timeout=server.plan.serve.shutdown_timeout,
        )
        state.write(home)
    return state


def state_facts(plan: Plan, facts: list[str], warnings: list[str]) -> None:
    """Say what will be served, and how."""
    for name, target in plan.targets.items():
        beside = f", an adapter on {plan.base}" if name in plan.adapters else ""
        fact("model", f"{name}: {target.source}{beside}")
    fact("vLLM", f"{plan.environment.version} ({plan.environment.python}), dtype {plan.dtype}")
    for one in facts:
        fact("memory", one)
    for one in warnings:
        warn(one)


def show_commands(plan: Plan) -> int:
    """What `dry_run=true` prints: the command here, and the same in vLLM's own image."""
    variables = [f"{name}={value}" for name, value in plan.variables().items()]
    print(shlex.join(["env", *variables, *plan.command()]))
    print(plan.in_container())
    return EXIT_DONE


def check_parity(plan: Plan) -> None:
    """Compare every model with what its training stored. Raises NotTheSame or NoAnswer as `serve.parity` says."""
    if plan.serve.parity == "off":
        return
    for name, target in plan.targets.items():
        probe = read_probe(target)
        if probe is None or not probe.cases:
            fact("parity", f"{name}: not known, there is no probe.json of its training")
            continue
        try:
            near = compare(
                probe,
                target,
                url=plan.url,
                name=name,
                dtype=plan.dtype,
                quantized=plan.serve.quantization is not None,
            )
        except (NotTheSame, NoAnswer) as error:
            if plan.serve.parity == "strict":
                raise
            warn(str(error))
        else:
            fact("parity", f"{name}: {near}")


def announce(plan: Plan, server: Server, *, seconds: float) -> None:
    """Say that it is ready, and how to ask it."""
    first, url = plan.names[0], f"{plan.url}/v1/chat/completions"
    fact("ready", f"{plan.url}/v1 serves {', '.join(plan.names)} after {seconds:.0f} s; its log is {server.log}")
    body = json.dumps({"model": first, "messages": [{"role": "user", "content": "Hello"}]}, ensure_ascii=False)
    key = f' -H "Authorization: Bearer ${KEY}"' if plan.needs_key else ""  # in double quotes: the shell fills it in
    fact("ask", f"curl {url} -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}")
    fact("chat", shlex.join(["llmkit", "chat", f"url={plan.url}", *([f"name={first}"] if len(plan.names) > 1 else [])]))
    if plan.serve.detach:
        fact("stop", shlex.join(["llmkit", "serve", "stop=true", plan.targets[first].said]))
    sys.stdout.flush()


def stop(server: Server, home: Path) -> int:
    """Let requests in flight end, then the server."""
    if server.process is None:
        return EXIT_DONE
    if not server.has_ended:
        fact("stopping", f"requests in flight have {server.plan.serve.shutdown_timeout} s; once more: at once")
    try:
        server.stop()
    except KeyboardInterrupt:
        server.end()
    finally:
        forget(home, server.pid)
    return EXIT_DONE


class _Signals:
    """The requests to stop: until the server is ready they end what is under way, a second one ends everything."""

    def __init__(self) -> None:
        self.asked = False
        self.raises = True

    def note(self, _number: int, _frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self.raises:
            raise StopAsked


@contextmanager
def _signals() -> Iterator[_Signals]:
    signals = _Signals()
    previous = {number: signal.signal(number, signals.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
