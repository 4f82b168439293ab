"""How fast this GPU trains, and what helps: python tests/gpu/measure_training.py [--shapes NAME ...] [--cases NAME ...]

Runs `llmkit train` for each case on models with random weights in the shape of a real one (TinyLlama-1.1B, Mistral-7B),
made here: nothing is downloaded. Every row has the same number of tokens, so that cases compare. Printed for each:

- tokens/s: the median over the run's log events, padding left out.
- MFU: model FLOPs per second over what a large bf16 matrix product reaches on this device (measured first). Model FLOPs
  per token are 2N forward, 2N backward to the activations, 2N more where all weights are trained (arXiv 2204.02311,
  appendix B), and 12 x layers x hidden x length for attention; DPO counts the reference's forward pass too. Those that
  gradient checkpointing computes again do not count.
- peak memory: of the device, by tensors.

The parts: `methods` (SFT and DPO; full, lora, qlora), and for LoRA `attention` (kernels), `packing`, `checkpointing`.
`--shapes tiny --device cpu` tries the script itself on a machine without a GPU.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

CHECKOUT = Path(__file__).parents[2]
STEPS = 12
ROW_TOKENS = 1024  # about; a row of the packing case has a quarter, a half or all of them
ROWS = 256
PARTS = ("methods", "attention", "packing", "checkpointing")
HARDWARE = {"cuda": "auto", "cpu": "cpu"}  # option of the hardware group for a device


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like model."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int

    def config(self) -> dict[str, object]:
        """As config.json names them."""
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }


SHAPES = {
    "tiny": Shape(64, 128, 2, 4, 2, 1024),
    "tinyllama-1.1b": Shape(2048, 5632, 22, 32, 4, 32000),
    "mistral-7b": Shape(4096, 14336, 32, 32, 8, 32000),
}


@dataclass(frozen=True)
class Case:
    """One run: its words beside those of all."""

    name: str
    words: list[str]
    rows: str = "chats"  # or pairs
    trains_all: bool = False
    forwards: int = 1  # of the model without a backward pass, and one with it


def cases(parts: list[str], *, large: bool) -> Iterator[Case]:
    """The cases of the named parts."""
    if "methods" in parts:
        # All weights of a large model in 32 bits, with gradients and AdamW's state, are 16 bytes each.
        full = ["method=full", "precision=bf16_pure"] if large else ["method=full"]
        for recipe, rows in (("sft", "chats"), ("dpo", "pairs")):
            reference = 0 if recipe == "sft" else 1
            yield Case(f"{recipe} full", [f"recipe={recipe}", *full], rows, trains_all=True, forwards=reference)
            yield Case(f"{recipe} lora", [f"recipe={recipe}", "method=lora"], rows, forwards=reference)
            yield Case(f"{recipe} qlora", [f"recipe={recipe}", "method=qlora"], rows, forwards=reference)
    if "attention" in parts:
        for kernel in ("eager", "sdpa", "flex_attention", "flash_attention_2"):
            yield Case(f"attention {kernel}", ["method=lora", f"model.attn_implementation={kernel}"], forwards=0)
    if "packing" in parts:
        for packing in ("none", "bfd"):
            yield Case(f"packing {packing}", ["method=lora", f"data.packing={packing}"], "uneven", forwards=0)
    if "checkpointing" in parts:
        for on in ("false", "true"):
            yield Case(f"checkpointing {on}", ["method=lora", f"training.gradient_checkpointing={on}"], forwards=0)


def make_model(shape: Shape, directory: Path) -> int:
    """Write a model of this shape with random weights and the demo's tokenizer; returns its number of parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from llmkit.model.tiny import tiny_model

    AutoTokenizer.from_pretrained(tiny_model()).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(shape.config()), encoding="utf-8")
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.bfloat16)
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def write_rows(directory: Path, tokens: int) -> None:
    """chats.jsonl, uneven.jsonl and pairs.jsonl: rows of digits, of which each is a token to the demo's tokenizer."""
    generator = random.Random(0)

    def digits(count: int) -> str:
        return "".join(generator.choice("0123456789") for _ in range(count))

    def chat(count: int) -> dict[str, str]:
        return {"question": digits(count // 4), "answer": digits(count - count // 4)}

    def pair(count: int) -> dict[str, str]:
        prompt, answer = count // 4, count // 2 - count // 4
        return {"prompt": digits(prompt), "chosen": digits(answer), "rejected": digits(answer)}

    for name, rows in {
        "chats": [chat(tokens) for _ in range(ROWS)],
        "uneven": [chat(tokens // generator.choice((1, 2, 4))) for _ in range(ROWS)],
        "pairs": [pair(tokens) for _ in range(ROWS)],
    }.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")


def reachable_flops(device: str) -> float:
    """Floating-point operations per second of a large bf16 matrix product."""
    import torch

    size = 8192 if device == "cuda" else 512
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(10):
        began = time.perf_counter()
        for _ in range(10):
            left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 10 * 2 * size**3 / (time.perf_counter() - began))
    return best


def flops_per_token(case: Case, shape: Shape, parameters: int, length: int) -> float:
    """Model FLOPs for each trained token; see the head of this file."""
    weights = parameters - shape.vocabulary * shape.hidden  # looking up an embedding is no product
    attention = 4 * shape.layers * shape.hidden * length  # of a forward pass; causal kernels need half of it
    passes = 1 + 1 + (1 if case.trains_all else 0) + case.forwards
    return passes * 2 * weights + (3 + case.forwards) * attention


def run(case: Case, model: Path, rows: Path, directory: Path, device: str) -> dict | str:
    """result.json of the case, or why there is none."""
    words = [
        *(
            f"model.path={model}",
            f"data.path={rows / case.rows}.jsonl",
            f"hardware={HARDWARE[device]}",
            "evaluation=off",
        ),
        *("data.validation=null", f"training.max_steps={STEPS}", "training.logging_steps=2", "checkpoint=off"),
        *("training.global_batch_size=16", f"run_dir={directory / case.name.replace(' ', '-')}"),
    ]
    if not any(word.startswith("precision=") for word in case.words):
        words.append("precision=bf16")
    done = subprocess.run(
        [sys.executable, "-m", "llmkit", "train", *words, *case.words],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        return (said or done.stderr.splitlines()[-1:] or ["no message"])[0][:120]
    return json.loads((directory / case.name.replace(" ", "-") / "result.json").read_text(encoding="utf-8"))


def main() -> None:
    """Measure and print the table."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tinyllama-1.1b", "mistral-7b"])
    options.add_argument("--cases", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--json", type=Path, help="write the figures there too")
    asked = options.parse_args()
    console, figures = Console(width=120), []
    reachable = reachable_flops(asked.device)
    console.print(f"a large bf16 matrix product: {reachable / 1e12:.1f} TFLOP/s")
    for name in asked.shapes:
        shape = SHAPES[name]
        table = Table(title=name, title_justify="left")
        for heading in ("case", "tokens/s", "MFU", "peak GiB", "loss"):
            table.add_column(heading)
        with tempfile.TemporaryDirectory() as folder:
            model, rows = Path(folder) / "model", Path(folder)
            model.mkdir()
            parameters = make_model(shape, model)
            length = ROW_TOKENS if asked.device == "cuda" else 64
            write_rows(rows, length)
            for case in cases(asked.cases, large=name == "mistral-7b"):
                result = run(case, model, rows, Path(folder), asked.device)
                if isinstance(result, str):
                    table.add_row(case.name, result)
                    continue
                rate = result["tokens_per_second"]
                share = rate * flops_per_token(case, shape, parameters, length) / reachable
                peak = result["peak_memory_bytes"] / 2**30
                table.add_row(case.name, f"{rate:,.0f}", f"{share:.1%}", f"{peak:.1f}", f"{result['train_loss']:.3f}")
                figures.append(
                    {"shape": name, "case": case.name, "tokens_per_second": rate, "mfu": share, "peak": peak}
                )
        console.print(table)
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
