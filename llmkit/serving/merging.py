"""What was trained, merged into its base: an ordinary model in `merged/`, proven to be the one that was trained.

    target = find_target({"run": "runs/alpha"}, config)
    merge(target, merged_directory(target), config.export, say=print)

It is written into a hidden directory beside and gets its name once it has passed the gate (merge_gate.py) and is on the
disk. Free of torch until there is something to merge.
"""

import contextlib
import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmkit import durable, rundir
from llmkit.byte_progress import in_bytes
from llmkit.config.schema import ExportConfig
from llmkit.errors import ConfigError, LlmkitError
from llmkit.model.source import shown_source
from llmkit.serving.target import CHECKPOINT, Target, dtype_of

RECORD, PARITY = "merge.json", "parity.json"
# What of an adapter's directory the merged model depends on.
SOURCES = (
    *("adapter_model.safetensors", "adapter_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"),
)

Say = Callable[[str], None]


class GateError(LlmkitError):
    """A merged model that is not the model that was trained; it is not kept."""


def merged_directory(target: Target) -> Path:
    """Where a target's merged model lies: `merged/` beside what it was made from; of a checkpoint `merged-step-...`."""
    step = Path(target.source).name
    return target.home / (f"{rundir.MERGED}-{step}" if CHECKPOINT.fullmatch(step) else rundir.MERGED)


def merge(target: Target, directory: Path, settings: ExportConfig, *, say: Say) -> dict[str, Any]:
    """Merge what was trained into its base and write the model to `directory`; returns what its merge.json says.

    Weights are in 16 bits: float16 where the run trained in it, else bfloat16. A run in float32 keeps float32, so that
    the merged model computes what was trained to the last digits. What an adapter was made from is read again, and if
    the model in `directory` was made from the same, it stays. Nobody else may write there (see `rundir.lock`).

    Args:
        directory: replaced in one step, once the merged model has passed the gate; left as it was otherwise.
        say: told what is done, a line at a time.

    Raises:
        ConfigError: if there is nothing to merge, or the base cannot be had.
        GateError: if the merged model is not the one that was trained.
        LlmkitError: if it cannot be written.
    """
    if target.is_whole:
        raise ConfigError(f"{target.said}: a whole model, with nothing to merge: {target.source} is ready as it is.")
    partial = directory.with_name(f".{directory.name}.partial")
    made_from = _made_from(target, settings)
    with _disk_explained(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        _tidy(directory, partial)
        there = rundir.read_json(directory / RECORD)
        if there is not None and there["made_from"] == made_from and _is_whole(directory, there):
            say(f"{directory} is this model already ({in_words(rundir.read_json(directory / PARITY) or {})})")
            return there
        try:
            record = _make(target, partial, settings, made_from, say)
            _put_in_place(partial, directory)
        except GateError as error:
            stays = f" {directory} is still the one merged before." if directory.exists() else ""
            raise GateError(f"{target.said}: {error}{stays}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    say(f"{directory}: {in_bytes(sum(record['files'].values()))} in {made_from['dtype']}")
    return record


def _make(target: Target, partial: Path, settings: ExportConfig, made_from: dict[str, Any], say: Say) -> dict[str, Any]:
    """Write the merged model to `partial`, proven and on the disk; returns its record. Raises GateError."""
    say(f"merging {target.said} into {made_from['base']}")
    figures = _write_and_compare(target, partial, settings, made_from)
    say(f"merged and unmerged: {in_words(figures)}")
    _check(figures, settings, hint=_hint(target, made_from))
    (partial / "README.md").write_text(merged_card(target, made_from, figures), encoding="utf-8")
    rundir.write_json(partial / PARITY, figures)
    files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    record = {"made_from": made_from, "files": files}
    rundir.write_json(partial / RECORD, record)
    durable.sync_tree(partial)
    return record


def _write_and_compare(
    target: Target, partial: Path, settings: ExportConfig, made_from: dict[str, Any]
) -> dict[str, Any]:
    """Write the merged model's files to `partial`; returns what parity.json says."""
    import torch

    from llmkit.serving.loaded import load_target
    from llmkit.serving.merge_gate import compare, distributions, gate_prompts
    from llmkit.serving.merged_weights import load_merged, merge_weights, write_model
    from llmkit.serving.parity import read_probe
    from llmkit.training.versions import versions

    dtype = getattr(torch, made_from["dtype"])
    loaded = load_target(target)
    prompts = gate_prompts(loaded.tokenizer, read_probe(target))
    reference = list(distributions(loaded.model, prompts, arithmetic=loaded.arithmetic))
    model, tokenizer = loaded.model, loaded.tokenizer
    del loaded  # nothing else may hold the model: it is to go before the merged one is loaded
    if made_from["merge_base"] == "original":
        del model
        gc.collect()
        model = load_target(target, quantized=False).model
    model = merge_weights(model, target, dtype)
    write_model(model, tokenizer, partial, max_shard_gb=settings.max_shard_gb)
    del model
    gc.collect()
    figures = compare(reference, distributions(load_merged(target, partial, dtype), prompts))
    limits = {"max_kl": settings.max_kl, "min_top1_agreement": settings.min_top1_agreement}
    more = {"limits": limits, "prompts": len(prompts), "base": made_from["base"], "versions": versions()}
    return {**figures, **more}


def _check(figures: dict[str, Any], settings: ExportConfig, *, hint: str) -> None:
    """Raise GateError, with the figures, the limits and what to do, if a merged model is beyond them."""
    problems = []
    if not figures["mean_kl"] <= settings.max_kl:  # also what is not a number
        problems.append(f"the mean KL divergence is {figures['mean_kl']:.4g} nats (export.max_kl={settings.max_kl:g})")
    if not figures["top1_agreement"] >= settings.min_top1_agreement:
        problems.append(
            f"the likeliest token is the same at {figures['top1_agreement']:.1%} of positions "
            f"(export.min_top1_agreement={settings.min_top1_agreement:g})"
        )
    if problems:
        raise GateError(
            f"the merged model is not the one that was trained: over {figures['positions']} positions "
            f"{' and '.join(problems)}. {hint}"
        )


def in_words(figures: dict[str, Any]) -> str:
    """The figures of parity.json in one line."""
    return (
        f"mean KL {figures['mean_kl']:.2g} nats, the same likeliest token at {figures['top1_agreement']:.1%} of "
        f"{figures['positions']} positions"
    )


def _made_from(target: Target, settings: ExportConfig) -> dict[str, Any]:
    """All that decides what the merged model is."""
    source, run = Path(target.source), target.run
    is_quantized = run is not None and run.qlora is not None
    return {
        "trained": {name: durable.sha256_of(source / name) for name in SOURCES if (source / name).is_file()},
        "base": target.base.hub_id if target.base.hub_id and not target.base.path else shown_source(target.base),
        "revision": target.base.commit or target.base.revision,
        "merge_base": settings.merge_base if is_quantized else None,
        "dtype": dtype_of(run.precision.name if run else ""),
        "max_shard_gb": settings.max_shard_gb,
        "limits": [settings.max_kl, settings.min_top1_agreement],
    }


def _is_whole(directory: Path, record: dict[str, Any]) -> bool:
    """Whether all files of a merged model are there; they got their name in one step, so their sizes tell."""
    sizes = {path.name: path.stat().st_size for path in directory.iterdir()}
    return all(sizes.get(name) == size for name, size in record["files"].items())


def _tidy(directory: Path, partial: Path) -> None:
    """Remove what a killed merge has left, and give the model it was about to replace its name back."""
    shutil.rmtree(partial, ignore_errors=True)
    former = directory.with_name(f".{directory.name}.former")
    if former.exists() and not directory.exists():
        os.replace(former, directory)
    shutil.rmtree(former, ignore_errors=True)


def _put_in_place(partial: Path, directory: Path) -> None:
    former = directory.with_name(f".{directory.name}.former")
    if directory.exists():
        os.replace(directory, former)
    os.replace(partial, directory)
    durable.sync(directory.parent)
    shutil.rmtree(former, ignore_errors=True)


def _hint(target: Target, made_from: dict[str, Any]) -> str:
    """What may be the reason that a merged model differs, and what helps."""
    quantized = target.run.qlora if target.run else None
    if made_from["merge_base"] == "original":
        why = "the adapter was trained on the quantized weights, not on the original ones: use merge_base=dequantized"
    elif quantized is not None and quantized.bits == 8:
        why = "8-bit layers round what flows through them too, which no merged model does: use qlora.bits=4 to train"
    elif made_from["dtype"] == "float32":
        why = "both compute in float32, so the files of the base may have changed since: look at model.path"
    else:
        why = (
            f"{made_from['dtype']} may be too coarse for what was learnt: serve the adapter with serve.adapter=unmerged"
        )
    return f"Likely {why}; or raise the limits, if you know what they stand for."


def merged_card(target: Target, made_from: dict[str, Any], figures: dict[str, Any]) -> str:
    """A model card in the hub's format; it names a base in a directory by its last part alone."""
    from llmkit.training.delivery import LOAD_FULL

    base, run = made_from["base"], target.run
    on_hub = bool(target.base.hub_id and not target.base.path)
    name = base if on_hub else Path(base).name
    head = ["---", *([f"base_model: {base}"] if on_hub else []), "library_name: transformers"]
    head += [f"tags: [llmkit{f', {run.recipe}' if run else ''}]", "---"]
    what = "An adapter" if target.adapter is not None else "Some of its weights, trained anew,"
    into = {"dequantized": ", whose quantized weights were made 16-bit", "original": ", in its original weights"}
    lines = [
        f"# {name.rpartition('/')[2]}, fine-tuned and merged",
        "",
        f"{what} merged into the base model `{name}`{into.get(made_from['merge_base'], '')}.",
        "",
        *([f"- base revision: `{target.base.commit}`"] if target.base.commit else []),
        *([f"- method: {run.method.name}"] if run else []),
        f"- weights: {made_from['dtype']}",
        f"- compared with the model as trained: {in_words(figures)}",
        "",
        "The chat template in this folder is the one it was trained with.",
        "",
        "```python",
        LOAD_FULL,
        "```",
    ]
    return "\n".join([*head, "", *lines, ""])


@contextlib.contextmanager
def _disk_explained(directory: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter is how safetensors says that the disk is full
        why = getattr(error, "strerror", None) or str(error)
        raise LlmkitError(f"{directory} cannot be written: {why}.") from error
