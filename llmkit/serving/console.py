"""What `llmkit serve` says on the terminal: facts, warnings, and of vLLM's log what a user needs."""

import re
import sys

# Lines of the log that tell how far it is or what is wrong; the rest is in serve.log.
TELLING = re.compile(
    r"\bERROR\b|\bCRITICAL\b|Starting to load model|Loading weights took|Model loading took|KV cache size"
    r"|Maximum concurrency|torch.compile takes|Graph capturing finished|Avg prompt throughput: (?!0\.0 )"
)
PREFIX = re.compile(r"^(\(\w+ pid=\d+\)\s*)*(\w+ \d\d-\d\d \d\d:\d\d:\d\d )?(\[[^]]+\] )?")


def fact(name: str, value: str) -> None:
    """One line on stdout."""
    print(f"{name:<10} {value}", flush=True)


def warn(text: str) -> None:
    """A warning, on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


class LogFilter:
    """Shows the telling lines of vLLM's log, without their prefixes, each once in a row."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, line: str) -> None:
        if not TELLING.search(line):
            return
        text = PREFIX.sub("", line).strip()
        if text != self._last:
            fact("vllm", text)
        self._last = text
