"""Whether a server computes what was trained: same tokens, and log-probabilities within what its arithmetic allows."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmkit import rundir
from llmkit.errors import LlmkitError
from llmkit.remote import files_at, is_remote, local_copy
from llmkit.serving.http import ask
from llmkit.serving.target import Target, dtype_of

# Largest mean difference of log-probabilities in nats, by the coarser of the two arithmetics. Seen between training and
# vLLM on tiny models: 1e-5 in fp32, 0.005 to 0.02 in bf16; another base or adapter: 0.5 and more.
TOLERANCE = {"float32": 0.005, "float16": 0.05, "bfloat16": 0.1}
QUANTIZED_TOLERANCE = 0.5
SHOWN = 12  # tokens around the first difference


class NotTheSame(LlmkitError):
    """The server does not compute what was trained."""


@dataclass(kw_only=True)
class Probed:
    """One conversation: its messages, the tokens of the prompt and of the whole, and log-probabilities in nats."""

    messages: list[Any]
    tools: Any
    prompt_ids: list[int]
    token_ids: list[int]
    log_probs: list[float]  # of token_ids[1:], each given those before


@dataclass(kw_only=True)
class Probe:
    """What probe.json holds."""

    precision: str
    cases: list[Probed]

    def write(self, run_dir: Path) -> None:
        """Write probe.json."""
        rundir.write_json(run_dir / rundir.PROBE, asdict(self))


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How near a server came: differences of log-probabilities in nats."""

    conversations: int
    tokens: int
    mean: float | None  # None: log-probabilities were not compared
    largest: float | None
    tolerance: float

    def __str__(self) -> str:
        said = f"{self.conversations} conversations, {self.tokens} tokens: the same tokens"
        if self.mean is None:
            return said
        return (
            f"{said}; log-probabilities within {self.mean:.1g} nats on average (limit {self.tolerance:g}), "
            f"{self.largest:.1g} at most"
        )


def read_probe(target: Target) -> Probe | None:
    """The probe of the run that made `target`; None for a model that no run of llmkit's made."""
    if target.run is None:
        return None
    place = target.records
    if is_remote(place):
        path = local_copy(place, [rundir.PROBE]) / rundir.PROBE if rundir.PROBE in files_at(place) else None
    else:
        path = Path(place, rundir.PROBE)
    held = rundir.read_json(path) if path else None
    return Probe(precision=held["precision"], cases=[Probed(**case) for case in held["cases"]]) if held else None


def compare(probe: Probe, target: Target, *, url: str, name: str, dtype: str, quantized: bool) -> Parity:
    """Ask the server at `url` for what the probe holds.

    Args:
        dtype: the server's, by vLLM's name.

    Raises:
        NotTheSame: with what differs, and what that may come from.
        NoAnswer: if the server fails.
    """
    mine = dtype_of(probe.precision)
    tolerance = max(TOLERANCE[mine], TOLERANCE.get(dtype, TOLERANCE["bfloat16"]))
    tolerance = QUANTIZED_TOLERANCE if quantized else tolerance
    differences: list[float] = []
    longest = max(model["max_model_len"] or 0 for model in ask(url, "/v1/models")["data"])
    for case in probe.cases:
        _compare_tokens(case, url, name)
        # The probe is of the run's last weights; and one token more than asked about must fit.
        if target.step is None and len(case.token_ids) < longest:
            served = _served_log_probs(case, url, name)
            differences += [abs(ours - theirs) for ours, theirs in zip(case.log_probs, served, strict=True)]
    mean = sum(differences) / len(differences) if differences else None
    if mean is not None and not mean <= tolerance:
        raise NotTheSame(
            f"{name}: the server computes something else than what was trained: log-probabilities of "
            f"{len(differences)} tokens differ by {mean:.2g} nats on average, and at most {tolerance:g} is "
            f"rounding. Is its base, its adapter or its quantization another one? ({target.said}; serve.parity=warn "
            "serves it all the same)"
        )
    return Parity(
        conversations=len(probe.cases),
        tokens=sum(len(case.token_ids) for case in probe.cases),
        mean=mean,
        largest=max(differences) if differences else None,
        tolerance=tolerance,
    )


def _compare_tokens(case: Probed, url: str, name: str) -> None:
    renderings = ((case.messages[:-1], case.prompt_ids, True), (case.messages, case.token_ids, False))
    for messages, expected, is_prompt in renderings:
        body = {"model": name, "messages": messages, "add_generation_prompt": is_prompt}
        body |= {"tools": case.tools} if case.tools else {}
        served = ask(url, "/tokenize", body)["tokens"]
        if served != expected:
            raise NotTheSame(_difference(expected, served, url, name))


def _difference(expected: list[int], served: list[int], url: str, name: str) -> str:
    """Where two renderings part, in text."""
    pairs = zip(expected, served, strict=False)
    at = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(expected), len(served)))
    start = max(at - SHOWN, 0)

    def text(ids: list[int]) -> str:
        part = ids[start : at + SHOWN]
        said = ask(url, "/detokenize", {"model": name, "tokens": part})["prompt"] if part else ""
        return f"{said!r} (tokens {part})"

    return (
        f"{name}: the server renders a conversation to other tokens than training did, from token {at} on. Learnt: "
        f"{text(expected)}; served: {text(served)}. Is its chat template or its tokenizer another one? "
        "(serve.parity=warn serves it all the same)"
    )


def _served_log_probs(case: Probed, url: str, name: str) -> list[float]:
    body = {"model": name, "prompt": case.token_ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    told = ask(url, "/v1/completions", body)["choices"][0]["prompt_logprobs"]
    return [one[str(token)]["logprob"] for one, token in zip(told[1:], case.token_ids[1:], strict=True)]
