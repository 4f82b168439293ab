"""How fast, and in how much memory, data is prepared: .venv/bin/python tests/benchmarks/bench_data.py [--rounds N]

1. 20,000 generated chats from a JSON Lines file to token ids and labels: llmkit against TRL's own preparation (target:
   at least 2.5 times its tokens per second).
2. The same again from llmkit's cache, in a fresh process (target: at most 0.3 s).
3. A file of `--gigabytes` (default 2) into Arrow: the most memory all processes held above what the imports take
   (target: 2 GiB). It needs about six times the file on disk; `--gigabytes 0` leaves it out.

The comparison. Both use the tokenizer and the template of `model=tiny`, which marks the answers, learn the answers only
and cut nothing; each round starts from an empty cache in a fresh process, and the clock starts once everything is
imported. TRL's clock covers `load_dataset` and the trainer's constructor, less a constructor on a few rows; it runs
twice, with its default of one process and with one per core. That all do the same is checked: tokens and learnt tokens
must agree. Rounds are interleaved.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measurement import Timing, machine, write_results
from rich.console import Console
from rich.progress import track
from rich.table import Table

CHATS = 20_000
SPEED_TARGET, CACHED_TARGET, MEMORY_TARGET = 2.5, 0.3, 2.0  # times TRL's; seconds; GiB
CHECKOUT = Path(__file__).parents[2]
GIB = 2**30
SAMPLED_EVERY = 0.2  # seconds
WORDS = ("the", "of", "and", "a", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "are", "as", "with")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--rounds", type=int, default=3, help="how often everything is measured (default 3)")
    options.add_argument("--gigabytes", type=float, default=2, help="size of the large file (default 2; 0: none)")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    options.add_argument("--child", nargs=2, metavar=("TOOL", "FILE"), help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.child:
        print(json.dumps(CHILDREN[chosen.child[0]](Path(chosen.child[1]))))
        return
    with tempfile.TemporaryDirectory(prefix="bench_data_") as scratch:
        described = machine()
        timings, ratios = compare(Path(scratch), chosen.rounds)
        memory = measure_large(Path(scratch), chosen.gigabytes) if chosen.gigabytes else None
    show(timings, ratios, memory, described)
    if chosen.json:
        write_results(chosen.json, timings, machine=described, ratios=ratios, large_file=memory)


def compare(scratch: Path, rounds: int) -> tuple[list[Timing], dict[str, float]]:
    """Seconds of each tool, and how many times TRL's tokens per second llmkit has. Raises SystemExit if they differ."""
    chats = scratch / "chats.jsonl"
    write_chats(chats, count=CHATS)
    timings = {name: Timing(name) for name in ("llmkit", "llmkit, cached", "trl", "trl, a process per core")}
    for number in track(range(rounds), description="20,000 chats", transient=True):
        cache = scratch / f"cache{number}"
        order = ["llmkit", "trl", "trl, a process per core"]
        counts = set()
        for name in [*(order if number % 2 else reversed(order)), "llmkit, cached"]:
            result = run_child(name, chats, cache / name.partition(",")[0] if "cached" in name else cache / name)
            counts.add((result["tokens"], result["learnt"]))
            timings[name].seconds.append(result["seconds"])
        if len(counts) > 1:
            raise SystemExit(f"the tools do not prepare the same: (tokens, learnt tokens) are {sorted(counts)}")
    ours = timings["llmkit"].median
    return list(timings.values()), {name: timings[name].median / ours for name in ("trl", "trl, a process per core")}


def measure_large(scratch: Path, gigabytes: float) -> dict[str, Any]:
    """Prepare one large file; `memory_gib` is the most all processes held above the imports."""
    chats = scratch / "large.jsonl"
    write_chats(chats, gigabytes=gigabytes)
    return run_child("llmkit", chats, scratch / "large-cache") | {"file_gib": chats.stat().st_size / GIB}


def write_chats(path: Path, *, count: int | None = None, gigabytes: float = 0) -> None:
    """Chats of one to four exchanges, `count` of them or as many as make the size; the same ones every time."""
    rng = random.Random(0)

    def sentences(most: int) -> str:
        return " ".join(
            " ".join(rng.choices(WORDS, k=rng.randint(5, 20))).capitalize() + "." for _ in range(rng.randint(1, most))
        )

    def chat(number: int) -> str:
        messages = [{"role": "system", "content": f"Chat {number}."}] if rng.random() < 0.3 else []
        for _ in range(rng.choice((1, 1, 2, 3, 4))):
            messages.append({"role": "user", "content": sentences(4)})
            messages.append({"role": "assistant", "content": sentences(6)})
        return json.dumps({"messages": messages}) + "\n"

    with path.open("w", encoding="utf-8") as file:
        if count is not None:
            file.writelines(chat(number) for number in range(count))
            return
        # Making 2 GB of random words takes longer than reading them: the same chats come again, each with its number.
        lines = [chat(number) for number in range(CHATS)]
        number = 0
        while file.tell() < gigabytes * 1e9:
            file.writelines(f'{{"id": "{number}-{i}", {line[1:]}' for i, line in enumerate(lines))
            number += 1


def run_child(tool: str, chats: Path, cache: Path) -> dict[str, Any]:
    """One preparation in a fresh process; with the most memory it and its children held above the imports, in GiB."""
    environment = os.environ | {
        "PYTHONPATH": str(CHECKOUT),
        "LLMKIT_CACHE": str(cache / "llmkit"),
        "HF_HOME": str(cache / "huggingface"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, __file__, "--child", tool, str(chats)]
    most = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        while child.poll() is None:
            most = max(most, memory_of(child.pid))
            time.sleep(SAMPLED_EVERY)
        printed, complaints = child.communicate()
    if child.returncode:
        raise SystemExit(f"{tool} failed:\n{complaints}")
    result = json.loads(printed.splitlines()[-1])
    return result | {"memory_gib": (most - result.pop("imports")) / GIB}


def memory_of(process: int) -> int:
    """Bytes of a process and its children, pages that several share counted once (Linux)."""
    pids = [process]
    total = 0
    for pid in pids:
        try:
            pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Pss:"))
    return total


def prepare_with_llmkit(chats: Path) -> dict[str, Any]:
    """In the child: llmkit's preparation, the tokenizer loaded."""
    import datasets  # noqa: F401 - imported before the clock starts, as in TRL's child

    from llmkit.config.schema import DataConfig, ModelConfig
    from llmkit.data.prepare import prepare_data
    from llmkit.model.loading import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(name="tiny"), "keep-original")
    imports, began = memory_of(os.getpid()), time.perf_counter()
    data = prepare_data(DataConfig(path=str(chats), validation=None), tokenizer, max_length=16384)
    return {
        "seconds": time.perf_counter() - began,
        "tokens": data.train.tokens,
        "learnt": data.train.supervised_tokens,
        "imports": imports,
    }


def prepare_with_trl(chats: Path, *, processes: int | None) -> dict[str, Any]:
    """In the child: TRL's preparation, the tokenizer and the model loaded."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from llmkit.model.tiny import tiny_model

    directory = tiny_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)

    def trainer(rows: Any) -> Any:
        arguments = SFTConfig(
            output_dir=str(chats.with_suffix(".trl")),
            max_length=None,
            assistant_only_loss=True,
            dataset_num_proc=processes,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        return SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)

    few = datasets.Dataset.from_list([json.loads(line) for line in chats.open(encoding="utf-8").readlines()[:2]])
    began = time.perf_counter()
    trainer(few)
    constructor = time.perf_counter() - began
    imports, began = memory_of(os.getpid()), time.perf_counter()
    prepared = trainer(datasets.load_dataset("json", data_files=str(chats), split="train")).train_dataset
    seconds = time.perf_counter() - began - constructor
    table = prepared.with_format("arrow")[:]
    learnt = sum((column.values.to_numpy() != -100).sum() for column in table.column("labels").chunks)
    tokens = sum(len(column.values) for column in table.column("input_ids").chunks)
    return {"seconds": seconds, "tokens": tokens, "learnt": int(learnt), "imports": imports}


CHILDREN = {
    "llmkit": prepare_with_llmkit,
    "llmkit, cached": prepare_with_llmkit,
    "trl": lambda chats: prepare_with_trl(chats, processes=None),
    "trl, a process per core": lambda chats: prepare_with_trl(chats, processes=len(os.sched_getaffinity(0))),
}


def show(
    timings: list[Timing], ratios: dict[str, float], memory: dict[str, Any] | None, described: dict[str, Any]
) -> None:
    """The table, with the targets beside the figures."""
    table = Table("", "median", "fastest", "slowest", "target", title=f"{CHATS:,} chats to token ids and labels")
    for timing in timings:
        table.add_row(*timing.row(), f"{CACHED_TARGET} s" if "cached" in timing.name else "")
    table.add_section()
    for name, ratio in ratios.items():
        table.add_row(f"llmkit's speed / {name}", f"{ratio:.2f}", "", "", f"{SPEED_TARGET}" if name == "trl" else "")
    if memory:
        table.add_section()
        rate = memory["tokens"] / memory["seconds"] / 1e6
        table.add_row(f"a file of {memory['file_gib']:.2f} GiB", f"{memory['seconds']:.0f} s", f"{rate:.2f} Mtokens/s")
        table.add_row("  memory above the imports", f"{memory['memory_gib']:.2f} GiB", "", "", f"{MEMORY_TARGET} GiB")
    console = Console()
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in described.items()))


if __name__ == "__main__":
    main()
