"""chat and evaluate over HTTP: against a real vLLM, and against servers that fail."""

import dataclasses
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import talking
from ports import free_port

from llmkit import chat, evaluate
from llmkit.data.examples import Conversation
from llmkit.errors import ConfigError
from llmkit.serving.answers import AnswerError, Sampling
from llmkit.serving.endpoint import Endpoint, endpoint_url, running_server
from llmkit.serving.state import Running, born
from llmkit.serving.target import of_run

talking_run = talking.talking_run  # a fixture
KEY = "correct horse battery staple"
ME = "I am a tiny model, fine-tuned with llmkit."
QUESTION = [{"role": "user", "content": "Who are you?"}]
ASKED = Conversation(messages=[*QUESTION, {"role": "assistant", "content": ME}])


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


# --- vLLM ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(talking_run: Path, tiny_model_dir: Path) -> Iterator[tuple[str, int]]:
    """The address and the process of a vLLM with the run's adapter as `talking`, which asks for a key."""
    port, final = free_port(), talking_run / "final"
    # fmt: off
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_model_dir), "--port", str(port),
        "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "512", "--enforce-eager",
        "--kv-cache-memory-bytes", str(2**27), "--tokenizer", str(final),
        "--chat-template", str(final / "chat_template.jinja"), "--generation-config", str(final),
        "--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"talking={final}",
    ]
    # fmt: on
    with tempfile.TemporaryFile("w+") as log:
        environment = os.environ | {"VLLM_API_KEY": KEY, "VLLM_NO_USAGE_STATS": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            deadline = time.monotonic() + 300
            while not _is_up(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    pytest.fail(log.read()[-4000:])
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()
            process.wait(60)


def _is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture
def with_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)


@pytest.mark.slow
@pytest.mark.usefixtures("with_key")
def test_a_server_streams_what_the_model_says(server):
    pieces: list[str] = []
    with Endpoint.at(server[0]) as endpoint:
        endpoint.reply(QUESTION, Sampling(), pieces.append)

    assert endpoint.model == "talking"  # and not the base, which is served beside it
    assert "".join(pieces) == ME
    assert len(pieces) > 3


@pytest.mark.slow
@pytest.mark.usefixtures("with_key")
def test_a_server_and_this_process_give_the_same_answers(server, talking_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path(shutil.copytree(talking_run, tmp_path / "talking"))
    found = []
    for words in ([f"url={server[0]}", "concurrency=7"], []):
        assert evaluate.main([f"run={run}", *words]) == 0
        record = json.loads((run / "evaluation.json").read_text())["evaluations"][-1]
        answers = [json.loads(line) for line in (run / "evaluation_answers.jsonl").read_text().splitlines()]
        for answer in answers:  # of bytes at the end that make no character vLLM says nothing
            answer["answer"] = answer["answer"].rstrip("\N{REPLACEMENT CHARACTER}")
        found.append((record["figures"]["exact_match"], record["max_new_tokens"], record["data"], answers))

    differing = [pair for pair in zip(found[0][3], found[1][3], strict=True) if pair[0] != pair[1]]
    assert differing == []
    assert found[0] == found[1]
    assert len(found[0][3]) == 36


@pytest.mark.slow
@pytest.mark.usefixtures("with_key")
def test_the_server_that_serve_has_running_is_found(server, talking_run, tmp_path, capsys):
    run = Path(shutil.copytree(talking_run, tmp_path / "talking"))
    url, pid = server
    running = {"pid": pid, "born": born(pid) or "", "host": socket.gethostname(), "url": url, "log": "", "started": ""}
    state = Running(**running, shutdown_timeout=60, sources={"talking": str(run / "final")}, ready=True)
    state.write(run)

    assert chat.main([f"run={run}", "prompt=Who are you?"]) == 0

    said = capsys.readouterr()
    assert said.out == f"{ME}\n"
    assert said.err == f"model      run={run}, at its running server {url}/v1\n"
    dataclasses.replace(state, sources={"other": str(run / "final")}).write(run)
    assert running_server(of_run(run)) == (url, "other")
    assert running_server(of_run(run), name="talking") is None
    checkpoint = str(run / "checkpoints" / "step-00000010")
    for other in ({"sources": {"talking": checkpoint}}, {"ready": False}, {"host": "elsewhere"}):
        dataclasses.replace(state, **other).write(run)
        assert running_server(of_run(run)) is None


@pytest.mark.slow
def test_a_server_that_wants_a_key_says_so(server, monkeypatch):
    with pytest.raises(AnswerError, match="asks for a key; set VLLM_API_KEY in the environment"):
        Endpoint.at(server[0])
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(AnswerError, match="asks for a key; the one in OPENAI_API_KEY is not it") as refused:
        Endpoint.at(server[0])
    assert "wrong" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.usefixtures("with_key")
def test_names_that_are_not_served_are_refused(server, talking_run):
    with pytest.raises(ConfigError, match="Did you mean 'talking'"):
        Endpoint.at(server[0], name="taking")
    assert evaluate.main(["model=tiny", "data=demo", f"url={server[0]}"]) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("with_key")
def test_more_than_the_context_holds_is_an_error_in_the_servers_words(server):
    with Endpoint.at(server[0]) as endpoint, pytest.raises(AnswerError, match="max_model_len=512"):
        endpoint.reply(QUESTION, Sampling(max_new_tokens=5000), print)


@pytest.mark.slow
@pytest.mark.usefixtures("with_key")
@pytest.mark.parametrize(
    ("backend", "asked", "figure"),
    [
        ("chat", "output_type: generate_until\ngeneration_kwargs: {until: [x], max_gen_toks: 16}", "exact_match"),
        ("completions", f"output_type: multiple_choice\ndoc_to_choice: ['{30 * '?! '}', '{ME}']", "acc"),
    ],
)
def test_tasks_of_the_harness_are_asked_of_the_server(server, talking_run, tmp_path, backend, asked, figure):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed here")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": q, "a": ME}) + "\n" for q in ("Who are you?", "Who are you? ")))
    task = tmp_path / "mine.yaml"
    task.write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\ntest_split: test\n"
        f"doc_to_text: '{{{{q}}}}'\ndoc_to_target: '{{{{a}}}}'\n{asked}\n"
        f"metric_list: [{{metric: {figure}, aggregation: mean, higher_is_better: true}}]\n"
    )
    run = Path(shutil.copytree(talking_run, tmp_path / "talking"))

    code = evaluate.main([f"run={run}", f"url={server[0]}", f"tasks={task}", f"backend={backend}", "limit=1"])

    record = json.loads((run / "evaluation.json").read_text())["evaluations"][-1]
    assert code == 0
    assert record["tasks"] == [str(task)]
    found = record["figures"][f"mine {figure}"]
    assert (found["value"], found["high"], found["n"]) == (1.0, 1.0, 1)
    assert found["low"] == pytest.approx(0.2065, abs=1e-4)  # Wilson's


# --- servers that fail ---------------------------------------------------------------------------------------------


class Moody(http.server.BaseHTTPRequestHandler):
    """An endpoint whose completions are answered as `mood` says: a list of status codes, the last one for ever."""

    mood: list[int]
    seen: list[dict[str, Any]]

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": "moody", "object": "model", "created": 0, "owned_by": "x"}]})

    def do_POST(self) -> None:
        self.seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        status = self.mood.pop(0) if len(self.mood) > 1 else self.mood[0]
        message = {"role": "assistant", "content": ME}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        done = {"id": "1", "object": "chat.completion", "created": 0, "model": "moody", "choices": [choice]}
        self._send(
            status, done if status == 200 else {"error": {"message": "moody today", "type": "x", "code": status}}
        )

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """In silence."""


@pytest.fixture
def moody() -> Iterator[tuple[str, type[Moody]]]:
    """The address of a Moody endpoint, and its class, whose mood a test sets."""
    kind = type("MoodyHere", (Moody,), {"mood": [200], "seen": []})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}", kind
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def answers_of(url: str, count: int) -> list[str]:
    with Endpoint.at(url) as endpoint:
        return [one.answer for one in endpoint.answer([ASKED] * count, max_new_tokens=9, told=lambda count: None)]


def test_a_request_that_fails_for_a_moment_is_made_again(moody):
    url, kind = moody
    kind.mood = [503, 429, 200]

    assert answers_of(url, 3) == [ME] * 3
    assert len(kind.seen) == 5


def test_a_request_that_fails_for_good_ends_the_evaluation_and_is_named(moody):
    url, kind = moody
    kind.mood = [400]

    with pytest.raises(AnswerError, match=r"example \d+: moody today"):
        answers_of(url, 3)


def test_what_is_sent_is_the_conversation_greedily_with_its_tools(moody):
    url, kind = moody
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "é"}}}
    turns = [*QUESTION, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "a mirror"}]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    asked = Conversation(messages=[*turns, {"role": "assistant", "content": ME}], tools=tools)

    with Endpoint.at(url) as endpoint:
        (answer,) = endpoint.answer([asked], max_new_tokens=9, told=lambda count: None)

    (sent,) = kind.seen
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("moody", 0.0, 9)
    assert (sent["tools"], sent["tool_choice"]) == (tools, "none")
    assert [message["role"] for message in sent["messages"]] == ["user", "assistant", "tool"]
    assert sent["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"at": "é"}'
    assert call["function"]["arguments"] == {"at": "é"}  # the data is as it was
    assert answer.matches


def test_a_proxy_does_not_lead_to_this_machine(moody, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")

    assert answers_of(moody[0], 1) == [ME]


def test_where_nothing_answers_there_is_one_message(capsys):
    assert chat.main([f"url=http://127.0.0.1:{free_port()}", "prompt=x"]) == 1
    assert "nothing answers there" in capsys.readouterr().err


@pytest.mark.parametrize("typed", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_an_address_may_leave_the_version_out(typed):
    assert endpoint_url(typed) == "http://h:1/v1"
