"""From a sweep to a vLLM endpoint that answers as training promised; nothing is replaced by a stand-in."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ports import free_port

from llmkit.serving.state import living_in

pytest.importorskip("vllm", reason="serving needs vLLM: make serve-env")
pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[2]
KEY = "a-key-of-the-tests"
SUMS = {f"{n}+{n}?": str(2 * n) for n in range(8)}
TRAINING = (
    *("data.path=sums.jsonl", "data.validation=sums.jsonl", "training.max_steps=80", "training.learning_rate=1e-2"),
    *("training.global_batch_size=8", "evaluation.baseline=false"),
)
TOKENS = 1500  # of an answer that takes its time
READY_WITHIN = 240.0  # seconds; half a minute on an idle machine


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "llmkit", *words]


def environment(**more: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k != "VLLM_LOGGING_LEVEL"}  # ERROR where trl was imported
    return inherited | {"PYTHONPATH": str(CHECKOUT)} | more


@pytest.fixture(scope="module")
def project(closed_world: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with runs/ranks: a sweep of two ranks that has learnt the sums by heart."""
    directory = tmp_path_factory.mktemp("project")
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in SUMS.items()]
    text = "".join(json.dumps({"messages": messages}) + "\n" for messages in rows)
    (directory / "sums.jsonl").write_text(text, encoding="utf-8")
    words = command("train", *TRAINING, "-m", "lora.r=4,8", "name=ranks")
    subprocess.run(words, cwd=directory, env=environment(), check=True, capture_output=True, timeout=600)
    return directory


class Served:
    """A server that `llmkit serve` has started: its address, what was said, and the process."""

    def __init__(self, process: subprocess.Popen[str], url: str):
        self.process, self.url = process, url
        self.said: list[str] = []

    def post(self, path: str, body: dict[str, Any], *, key: str | None = KEY) -> Any:
        return json.loads(self.ask(path, body, key=key)[1])

    def ask(
        self, path: str, body: dict[str, Any] | None = None, *, key: str | None = KEY, method: str | None = None
    ) -> tuple[int, bytes]:
        """The status and the content of an answer."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def answer(self, name: str, question: str) -> str:
        body = {"model": name, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 8}
        return self.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]


@contextmanager
def serving(project: Path, *words: str) -> Iterator[Served]:
    """Start it, wait until it says that it is ready, and stop it as Ctrl-C does, if it still runs."""
    port = free_port()
    process = subprocess.Popen(
        command("serve", "serve=cpu", f"serve.port={port}", *words),
        cwd=project,
        env=environment(VLLM_API_KEY=KEY),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    served = Served(process, f"http://127.0.0.1:{port}")
    reader = threading.Thread(target=_collect, args=(process, served.said), daemon=True)
    reader.start()
    try:
        wait_until(lambda: process.poll() is not None or any(line.startswith("ready") for line in served.said))
        assert process.poll() is None, "".join(served.said)
        yield served
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            assert process.wait(120) == 0, "".join(served.said)
    finally:
        process.kill()
        process.wait()
        reader.join(10)
        assert process.stdout
        process.stdout.close()


def _collect(process: subprocess.Popen[str], lines: list[str]) -> None:
    assert process.stdout
    for line in process.stdout:
        lines.append(line)


def wait_until(holds: Callable[[], bool], *, seconds: float = READY_WITHIN) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def serve_state(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "serve.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def every_adapter(project: Path) -> Iterator[Served]:
    with serving(project, "sweep=runs/ranks", "serve.all=true") as served:
        yield served


def test_every_adapter_of_a_sweep_answers_under_its_own_name_on_one_base(every_adapter):
    listed = {model["id"] for model in json.loads(every_adapter.ask("/v1/models")[1])["data"]}
    for name in ("r=4", "r=8"):
        assert name in listed
        assert {q: every_adapter.answer(name, q) for q in SUMS} == SUMS


def test_each_was_compared_with_what_its_training_stored(every_adapter):
    parity = [line for line in every_adapter.said if line.startswith("parity")]

    assert len(parity) == 2
    for line in parity:
        assert "the same tokens; log-probabilities within" in line


def test_no_route_but_the_probes_answers_without_the_key_or_with_a_wrong_one(every_adapter, project):
    log = next((project / "runs" / "ranks").glob("*/serve.log")).read_text(encoding="utf-8")
    mounted = re.findall(r"Route: (\S+), Methods: ([\w, ]+)", log)
    assert len(mounted) > 20
    answering = set()
    for path, methods in mounted:
        for method in methods.split(", "):
            for key in (None, "wrong"):
                body = None if method in ("GET", "HEAD") else {}
                status, _ = every_adapter.ask(path.replace("{response_id}", "x"), body, key=key, method=method)
                if status not in (401, 404):
                    answering.add((method, path))

    assert answering == {("GET", "/health"), ("GET", "/metrics")}


def test_the_key_is_nowhere_but_in_the_environment(every_adapter, project):
    home = next((project / "runs" / "ranks").glob("*/serve.json")).parent
    pid = serve_state(home)["pid"]
    for text in (
        (home / "serve.log").read_text(encoding="utf-8"),
        (home / "serve.json").read_text(encoding="utf-8"),
        Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8"),
        "".join(every_adapter.said),
    ):
        assert KEY not in text


def test_a_second_server_for_the_same_run_is_refused(every_adapter, project):
    done = subprocess.run(
        command("serve", "serve=cpu", f"serve.port={free_port()}", "sweep=runs/ranks"),
        cwd=project,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 2
    assert "a server runs for it already" in done.stderr


def test_a_stop_lets_requests_in_flight_end_and_leaves_nothing(every_adapter, project):
    home = next((project / "runs" / "ranks").glob("*/serve.json")).parent
    group = os.getpgid(serve_state(home)["pid"])
    body = {"model": "r=8", "prompt": "1", "max_tokens": TOKENS, "ignore_eos": True, "temperature": 1.0}
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(every_adapter.post, "/v1/completions", body) for _ in range(8)]
        wait_until(lambda: _running(every_adapter) == 8)
        every_adapter.process.send_signal(signal.SIGTERM)
        counts = [one.result()["usage"]["completion_tokens"] for one in asked]

    assert counts == [TOKENS] * 8
    assert every_adapter.process.wait(120) == 0
    assert not (home / "serve.json").exists()
    assert living_in(group) == []


def _running(served: Served) -> int:
    found = re.findall(r"^vllm:num_requests_running\{.*\} ([\d.]+)$", served.ask("/metrics")[1].decode(), re.M)
    return int(sum(map(float, found)))


def test_the_best_run_merged_gives_the_same_answers_and_parity_and_dies_with_llmkit(project):
    with serving(project, "sweep=runs/ranks", "serve.adapter=merged", "serve.served_model_name=sums") as served:
        assert {q: served.answer("sums", q) for q in SUMS} == SUMS
        assert any(line.startswith("parity") and "the same tokens; log-prob" in line for line in served.said)
        assert any(line.startswith("merged") and "serve.adapter=merged" in line for line in served.said)
        group = serve_state(next((project / "runs" / "ranks").glob("*/serve.json")).parent)["pid"]
        served.process.kill()
        wait_until(lambda: living_in(group) == [], seconds=60)


# --- what is not what was trained ----------------------------------------------------------------------------------


@pytest.fixture
def copied(project: Path, tmp_path: Path) -> Path:
    """A project of the test's own, with a copy of one run as runs/copy."""
    shutil.copytree(project / "runs" / "ranks" / "r=4", tmp_path / "runs" / "copy")
    return tmp_path


def refused(project: Path, *words: str) -> str:
    """What a server that does not become ready says."""
    done = subprocess.run(
        command("serve", "serve=cpu", f"serve.port={free_port()}", "run=runs/copy", *words),
        cwd=project,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=READY_WITHIN,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ready" not in done.stdout
    assert not (project / "runs" / "copy" / "serve.json").exists()
    return done.stderr


def test_a_changed_template_is_caught(copied):
    template = copied / "runs" / "copy" / "final" / "chat_template.jinja"
    text = template.read_text(encoding="utf-8")
    template.write_text(text.replace("message['content']", "message['content'] + ' '"), encoding="utf-8")
    assert template.read_text(encoding="utf-8") != text

    assert re.search(r"copy: the server renders a conversation to other tokens .*chat template", refused(copied))


def test_a_wrong_tokenizer_is_caught(copied, tiny_model_dir):
    other = Path(shutil.copytree(tiny_model_dir, copied / "other"))
    held = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = held["model"]["vocab"]
    first, second = [token for token in vocabulary if token.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(held), encoding="utf-8")

    assert "renders a conversation to other tokens" in refused(copied, f"serve.tokenizer={other}")


def test_a_wrong_base_is_caught(copied, tiny_model_dir):
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(tiny_model_dir, copied / "other"))
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("mlp.down_proj.weight"))
    weights[name] = weights[name].flip(0)
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    config = copied / "runs" / "copy" / "config.yaml"
    text = re.sub(r"(?m)^(model:\n(?:  .*\n)*?  path: ).*$", rf"\g<1>{other}", config.read_text(encoding="utf-8"))
    assert str(other) in text
    config.write_text(text, encoding="utf-8")

    assert "computes something else than what was trained" in refused(copied)


def test_a_server_that_dies_says_why_and_what_to_change(copied):
    said = refused(copied, "serve.extra_args=[--max-model-len,99999999]")

    assert "serve.max_model_len is beyond the model's context: at most 16384" in said
    assert "Its last lines" in said


# --- left running --------------------------------------------------------------------------------------------------


def test_a_detached_server_goes_on_is_listed_and_is_stopped_by_another_command(copied):
    def llmkit(*words: str) -> subprocess.CompletedProcess[str]:
        run = {"cwd": copied, "env": environment(), "capture_output": True, "text": True, "timeout": READY_WITHIN}
        return subprocess.run(command("serve", *words), **run, check=False)

    started = llmkit("run=runs/copy", "serve=cpu", f"serve.port={free_port()}", "serve.detach=true")
    assert started.returncode == 0, started.stdout + started.stderr
    pid = serve_state(copied / "runs" / "copy")["pid"]
    assert re.search(r"runs/copy: http://127.0.0.1:\d+ answers, copy; process \d+", llmkit("status=true").stdout)
    stopped = llmkit("stop=true")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert living_in(pid) == []
    assert "no server of llmkit's runs" in llmkit("status=true").stdout
