"""A real headless Chromium on a page of this machine, spoken to over a pipe in the DevTools protocol.

with Browser(profile) as browser:
    page = browser.open(Path("report.html"))
    page.screenshot(Path("cost.png"), "#cost")
"""

import base64
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest

MUST = "LLMKIT_TEST_CHROMIUM"  # set where these tests may not be skipped
LOOK_FOR = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1280, 900  # pixels
PATIENCE = 120.0  # seconds for one answer
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--remote-debugging-pipe", f"--window-size={WIDTH},{HEIGHT}"),
    # No name leads anywhere: what a page may not fetch, it cannot.
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--disable-component-update"),
)


def find_chromium() -> str:
    """The browser's program. Skips the test where there is none, unless LLMKIT_TEST_CHROMIUM is set."""
    found = next(filter(None, map(shutil.which, LOOK_FOR)), None)
    if found is None:
        reason = "there is no chromium here: apt-get install chromium"
        assert MUST not in os.environ, reason
        pytest.skip(reason)
    return found


@dataclass
class Page:
    """A page that has been loaded, and what it has said and asked for since."""

    browser: "Browser"
    session: str
    said: list[str] = field(default_factory=list)  # errors and warnings of the console, exceptions, refusals
    requests: list[str] = field(default_factory=list)  # addresses

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol."""
        return self.browser.ask(method, session=self.session, **params)

    def run(self, expression: str) -> Any:
        """The value of some JavaScript, promises awaited."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until some JavaScript is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.run(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"never true: {expression}\n{self.said}"
            time.sleep(0.1)

    def screenshot(self, file: Path, selector: str) -> Path:
        """A picture of one element, whole, as PNG."""
        box = self.run(
            f"(() => {{ const box = document.querySelector({selector!r}).getBoundingClientRect();"
            "return {x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height}; })()"
        )
        answer = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=box | {"scale": 1})
        file.write_bytes(base64.b64decode(answer["data"]))
        return file


class Browser:
    """Ends with the `with`. One page at a time."""

    def __init__(self, profile: Path):
        self.program, self.profile = find_chromium(), profile

    def __enter__(self) -> Self:
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # The pipe's ends must be the descriptors 3 and 4, which no option of subprocess arranges.
        script = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        command = ["bash", "-c", script, "bash", self.program, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        self._process = subprocess.Popen(
            command, pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self._number, self._rest = 0, b""
        self._page: Page | None = None
        return self

    def __exit__(self, *_: object) -> None:
        self.ask("Browser.close")
        self._process.wait(timeout=60)
        os.close(self._write)
        os.close(self._read)

    def open(self, file: Path, *, dark: bool = False, scripts: bool = True) -> Page:
        """Load a file and wait until its charts are drawn."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._page = page = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.ask(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.ask("Emulation.setEmulatedMedia", features=[scheme])
        page.ask("Emulation.setScriptExecutionDisabled", value=not scripts)
        page.ask("Page.navigate", url=file.absolute().as_uri())
        page.wait_for("document.readyState === 'complete'")
        if page.run("document.getElementById('figures') !== null") and scripts:
            page.wait_for("document.documentElement.dataset.drawn")
        return page

    def ask(self, method: str, *, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; what happens meanwhile is noted in the page."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        os.write(self._write, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            if self._page is not None and answer.get("sessionId") == self._page.session:
                _note(self._page, answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._read, 1 << 20)
            assert part, f"{self.program} has ended (exit code {self._process.poll()})"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


def _note(page: Page, event: dict[str, Any]) -> None:
    params = event.get("params", {})
    match event.get("method"):
        case "Runtime.exceptionThrown":
            page.said.append(json.dumps(params["exceptionDetails"]))
        case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
            page.said.append(json.dumps(params["args"]))
        case "Log.entryAdded":
            page.said.append(params["entry"]["text"])
        case "Network.requestWillBeSent":
            page.requests.append(params["request"]["url"])
