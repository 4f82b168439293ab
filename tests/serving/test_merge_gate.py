"""The gate tells a merged model that is the trained one from one that is not, and lets only the first through."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmkit.config.schema import ExportConfig
from llmkit.serving.merge_gate import CHATS, compare, gate_prompts
from llmkit.serving.merging import GateError, merge, merged_directory
from llmkit.serving.target import of_run

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's deprecations

QUIET: Callable[[str], None] = lambda _: None  # noqa: E731


def log_probs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_the_figures_are_the_mean_divergence_and_the_share_of_the_same_likeliest_token():
    reference = [log_probs([0.5, 0.25, 0.25], [0.2, 0.7, 0.1]), log_probs([0.1, 0.1, 0.8])]
    merged = [log_probs([0.25, 0.5, 0.25], [0.2, 0.7, 0.1]), log_probs([0.1, 0.1, 0.8])]

    figures = compare(reference, merged)

    divergence = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert figures["mean_kl"] == pytest.approx(divergence / 3)
    assert figures["largest_kl"] == pytest.approx(divergence)
    assert figures["top1_agreement"] == pytest.approx(2 / 3)
    assert figures["positions"] == 3


def test_tokens_that_are_as_likely_as_each_other_count_as_the_same():
    figures = compare([log_probs([0.51, 0.49])], [log_probs([0.49, 0.51])])

    assert figures["top1_agreement"] == 1


def test_answers_are_compared_and_not_the_questions(tiny_tokenizer):
    prompt = gate_prompts(tiny_tokenizer)[1]

    assert tiny_tokenizer.decode(prompt.ids[prompt.start :]) == f"{CHATS[1][1]}<|end|>"


def test_a_tokenizer_without_a_template_is_asked_in_plain_text(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)

    prompt = gate_prompts(tiny_tokenizer)[1]

    assert tiny_tokenizer.decode(prompt.ids[prompt.start :]) == CHATS[1][1]


def refused(run_dir: Path, **settings: float) -> str:
    """The message of the gate; nothing of the merged model is left then."""
    target = of_run(run_dir)
    before = {path.name for path in run_dir.iterdir()}
    with pytest.raises(GateError) as error:
        merge(target, merged_directory(target), ExportConfig(**settings), say=QUIET)
    assert {path.name for path in run_dir.iterdir()} == before
    return str(error.value)


def test_the_original_weights_of_a_4_bit_base_are_refused_with_figures_limits_and_what_to_do(make_run):
    run_dir = make_run(method="qlora", qlora={"bits": 4})

    message = refused(run_dir, merge_base="original")

    assert message.startswith(f"run={run_dir}: the merged model is not the one that was trained: over 301 positions")
    assert "export.max_kl=0.02" in message
    assert "use merge_base=dequantized" in message


@pytest.mark.parametrize("settings", [{"max_kl": 1e-12}, {"min_top1_agreement": 1.01}])
def test_each_limit_refuses_by_itself(make_run, settings):
    key, value = next(iter(settings.items()))

    assert f"export.{key}={value:g}" in refused(make_run(), **settings)


def test_weights_that_are_not_numbers_do_not_pass(make_run):
    run_dir = make_run(change=math.nan)

    assert "nan" in refused(run_dir)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("lora", {}), ("qlora", {"qlora": {"bits": 4}}), ("qlora", {"qlora": {"bits": 8}})],
    ids=["lora", "4 bits", "8 bits"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_limits_let_every_kind_of_run_through(make_run, read_json, method, settings, precision):
    run_dir = make_run(method=method, precision=precision, change=0.02, **settings)
    target = of_run(run_dir)

    merge(target, merged_directory(target), ExportConfig(), say=QUIET)

    parity = read_json(run_dir / "merged" / "parity.json")
    assert parity["mean_kl"] <= 0.005
    assert parity["top1_agreement"] >= 0.98
    assert parity["positions"] == 301
    assert parity["prompts"] == len(CHATS)
    assert parity["limits"] == {"max_kl": 0.02, "min_top1_agreement": 0.95}
    assert parity["versions"]["peft"]
