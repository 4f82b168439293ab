"""Serve what was trained: check, start vLLM, prove that it computes what training computed, and keep it until the end.

    llmkit serve run=runs/alpha

Runs in the process of the verb, which imports neither torch nor vLLM: the server is a child.
"""

import datetime
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmkit.config import TrainConfig
from llmkit.errors import EXIT_DONE, ConfigError
from llmkit.serving.checks import check
from llmkit.serving.console import LogFilter, fact, warn
from llmkit.serving.environment import find_environment
from llmkit.serving.merged import merged_where_needed
from llmkit.serving.parity import NotTheSame, compare, read_probe
from llmkit.serving.plan import KEY, Plan, make_plan
from llmkit.serving.server import Server
from llmkit.serving.state import LOG, Running, born, forget, running
from llmkit.serving.target import Target

SECONDS_BETWEEN_LOOKS = 0.2


def run(targets: dict[str, Target], config: TrainConfig, *, dry_run: bool) -> int:
    """Serve the targets by their names until a signal asks to stop; returns the exit code.

    Raises LlmkitError for the user to read: what does not fit, a server that dies, one that is not what was trained.
    """
    began = time.monotonic()
    environment = find_environment(config.serve.python)
    targets = merged_where_needed(targets, config, dry_run=dry_run)
    plan = make_plan(targets, config, environment)
    plan, facts, warnings = check(plan, config.hardware)
    state_facts(plan, facts, warnings)
    if dry_run:
        return show_commands(plan)

    home = next(iter(targets.values())).home
    if other := running(home):
        raise ConfigError(f"{home}: a server runs for it already, at {other.url}; llmkit serve stop=true ends it.")
    server = Server(plan, home / LOG, show=LogFilter())
    with _signals() as asked:
        server.start()
        try:
            if not server.wait_until_ready(stopped=lambda: bool(asked)):
                return stop(server, home)
            check_parity(plan)
            announce(plan, home, server, seconds=time.monotonic() - began)
            if plan.serve.detach:
                return EXIT_DONE
            while not asked:
                server.check_alive()
                time.sleep(SECONDS_BETWEEN_LOOKS)
        except BaseException:
            forget(home)
            server.kill()
            raise
        return stop(server, home)


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
    """Compare every model with what its training stored. Raises NotTheSame as `serve.parity` says."""
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
        except NotTheSame as error:
            if plan.serve.parity == "strict":
                raise
            warn(str(error))
        else:
            fact("parity", f"{name}: {near}")


def announce(plan: Plan, home: Path, server: Server, *, seconds: float) -> None:
    """Say that it is ready, and how to ask it; other commands read the same in serve.json."""
    assert server.process is not None
    Running(
        pid=server.process.pid,
        born=born(server.process.pid) or "",
        url=plan.url,
        names=plan.names,
        log=str(server.log),
        started=datetime.datetime.now().isoformat(timespec="seconds"),
        shutdown_timeout=plan.serve.shutdown_timeout,
    ).write(home)
    fact("ready", f"{plan.url}/v1 serves {', '.join(plan.names)} after {seconds:.0f} s; its log is {server.log}")
    key = f' -H "Authorization: Bearer ${KEY}"' if plan.needs_key else ""
    body = f'{{"model": "{plan.names[0]}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    fact("ask", f"curl {plan.url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'")
    fact("chat", f"llmkit chat url={plan.url}")
    if plan.serve.detach:
        fact("stop", "llmkit serve stop=true")
    sys.stdout.flush()


def stop(server: Server, home: Path) -> int:
    """Let requests in flight end, then the server."""
    fact("stopping", f"requests in flight have {server.plan.serve.shutdown_timeout} s; once more: at once")
    server.stop()
    forget(home)
    return EXIT_DONE


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the requests to stop; a second one ends this process at once, and the server with it."""
    asked: list[int] = []

    def note(number: int, _frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
