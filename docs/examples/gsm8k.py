"""GSM8K, grade school mathematics: https://huggingface.co/datasets/openai/gsm8k (MIT licence).

    llmkit fetch data.script=gsm8k.py to=data/gsm8k

It comes from the hub, or from the directory that GSM8K_DIR names, with train.jsonl and test.jsonl in it.
"""

import json
import os
import re
from pathlib import Path

SPLITS = ("train", "test")


def rows(split):
    for problem in problems(split):
        # Every sum is annotated for a calculator, "48/2 = <<48/2=24>>24": left in, the model would learn to write that.
        yield {"question": problem["question"], "answer": re.sub(r"<<.*?>>", "", problem["answer"])}


def problems(split):
    if directory := os.environ.get("GSM8K_DIR"):
        with open(Path(directory) / f"{split}.jsonl", encoding="utf-8") as lines:
            yield from map(json.loads, lines)
    else:
        from datasets import load_dataset

        yield from load_dataset("openai/gsm8k", "main", split=split)
