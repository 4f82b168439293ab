"""How much longer `llmkit serve` takes to be ready than vLLM's own command for the same model.

    python tests/benchmarks/bench_serve.py --rounds 5

Both serve the same fine-tuned adapter with the same settings, in turn; the clock stops at the first answer to a
request for one token. llmkit has then also checked memory and port, compared the server with what training stored,
and put its guard in front of the routes. Target: at most 5% more.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
TRAINING = ("training.max_steps=20", "evaluation=off", "name=alpha")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port: int) -> bool:
    body = json.dumps({"model": "alpha", "prompt": "1", "max_tokens": 1}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", data=body, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status == 200
    except OSError:
        return False


def seconds_until_ready(command: list[str], port: int, project: Path, *, announced: bool) -> float:
    """Start a server, wait for its first answer (or for llmkit's word that it is ready), and end it."""
    began = time.monotonic()
    with open(project / "server.log", "w+", encoding="utf-8") as log:
        server = subprocess.Popen(command, cwd=project, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while not (_said_ready(project) if announced else answers(port)):
                if server.poll() is not None:
                    raise RuntimeError((project / "server.log").read_text(encoding="utf-8")[-2000:])
                time.sleep(0.05)
            return time.monotonic() - began
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(120)


def _said_ready(project: Path) -> bool:
    return "\nready " in (project / "server.log").read_text(encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    os.environ["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as scratch:
        project = Path(scratch)
        subprocess.run([sys.executable, "-m", "llmkit", "train", *TRAINING], cwd=project, check=True)
        ours, theirs = [], []
        for _ in range(rounds):
            port = free_port()
            serve = [sys.executable, "-m", "llmkit", "serve", "serve=cpu", f"serve.port={port}", "run=runs/alpha"]
            shown = subprocess.run(
                [*serve, "dry_run=true"], cwd=project, check=True, capture_output=True, text=True
            ).stdout
            line = next(line for line in shown.splitlines() if line.startswith("env "))
            own = ["sh", "-c", "exec " + line.replace(" --middleware llmkit_allow_list.AllowList", "")]
            theirs.append(seconds_until_ready(own, port, project, announced=False))
            ours.append(seconds_until_ready(serve, port, project, announced=True))
            print(f"vLLM's own command {theirs[-1]:.1f} s, llmkit serve {ours[-1]:.1f} s", flush=True)
    ratio = statistics.median(ours) / statistics.median(theirs)
    print(
        f"medians of {rounds}: {statistics.median(theirs):.1f} s and {statistics.median(ours):.1f} s: {ratio:.3f} times"
    )


if __name__ == "__main__":
    main()
