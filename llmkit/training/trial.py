"""The longest batches run first, without an update: too little memory shows in the first minute, and so does what fits.

Generated answers are not tried: their cache is small beside the activations of training, and grows with what is said.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llmkit.config import TrainConfig
from llmkit.errors import OutOfMemory
from llmkit.training.advice import batch_overrides, costlier_changes, halves, smaller_batches, untried_changes
from llmkit.training.console import RunConsole
from llmkit.training.engine import is_sharded
from llmkit.training.facts import device_name
from llmkit.training.longest_batch import LongestBatches, Outcome, Setting
from llmkit.training.memory import in_units, memory_in_use, reset_peak
from llmkit.training.pack.pack import note_peak, note_room

MANY = 0.2  # of the rows
SHORTEST_TRIED = 8  # tokens, the least that data.max_length takes
SHORTEST_SHARE = 8  # parts of the longest row; data cut shorter is other data


def run_trial(trainer: Any, config: TrainConfig, console: RunConsole) -> list[Outcome]:
    """Try the longest training batch and the longest evaluation batch; state the peak of each.

    Call it once, between building the trainer and its first use, which it does not change in any way.

    Raises:
        OutOfMemory: names the cheapest settings that do fit here, by trying them.
    """
    if is_sharded(trainer):
        console.fact("trial", "left out: the engine divides the model only when training starts")
        return []
    batches = LongestBatches(trainer, config)
    note_peak(batches.device)
    before = memory_in_use(batches.device)
    outcomes = batches.run(batches.asked)
    note_room(trainer, before=before, needed=outcomes[0].needed, there=batches.capacity)
    failed = next((outcome for outcome in outcomes if outcome.problem), None)
    if failed:
        there = f"{device_name(batches.device)} with {in_units(batches.capacity)}"
        raise OutOfMemory(f"the {failed} does not fit into {there}: {failed.problem}.\n{_advise(batches, config)}")
    for outcome in outcomes:
        peak, needed = in_units(outcome.peak), in_units(outcome.needed)
        with_state = f" ({needed} with optimizer state)" if needed != peak else ""
        console.fact("trial", f"{outcome}: peak {peak}{with_state} of {in_units(batches.capacity)}")
    reset_peak(batches.device)  # what the run reports is that of training
    return outcomes


def _advise(batches: LongestBatches, config: TrainConfig) -> str:
    """What to type instead, the cheapest first."""
    if batches.trainer.args.world_size > 1:
        # One process may run out where another does not, and a batch that only some of them repeat never ends.
        return _listed("What may help, the cheapest first:", untried_changes(config))
    asked = batches.asked
    fitting = _cheapest_that_fits(batches)
    last = replace(batches.with_micro_batch(1), eval_batch=1, checkpointing=_checkpointing(batches)[-1])
    shorter = _longest_that_fits(batches, asked if fitting else last)
    others = costlier_changes(config)
    if shorter and shorter.max_length is not None:
        longer, total = batches.count_longer(shorter.max_length)
        # Rows that are cut or lost cost least where they are few, and most where they are many.
        others.insert(len(others) if longer > MANY * total else 0, _in_words(shorter, batches, config))
    if fitting is None:
        extent = "with gradient checkpointing " if last.checkpointing else ""
        return _listed(f"One row at a time {extent}does not fit either. What is left, the cheapest first:", others)
    found = f"With the same examples per step, this fits (tried just now):\n  {_overrides(fitting, asked)}"
    return f"{found}\n{_listed('Or, the cheapest first:', others)}"


def _cheapest_that_fits(batches: LongestBatches) -> Setting | None:
    """The setting that trains on the same examples per step in the least time, if any fits."""
    found = next((setting for setting in _cheaper(batches) if not batches.train(setting).problem), None)
    if found is None or batches.trainer.eval_dataset is None:
        return found
    evaluations = (replace(found, eval_batch=size) for size in halves(batches.asked.eval_batch))
    return next((setting for setting in evaluations if not batches.evaluate(setting).problem), None)


def _cheaper(batches: LongestBatches) -> Iterator[Setting]:
    """Smaller micro-batches cost no result and little time; checkpointing costs one more forward pass."""
    asked = batches.asked
    for checkpointing in _checkpointing(batches):
        for micro_batch, accumulation in smaller_batches(asked.micro_batch, asked.accumulation):
            yield replace(asked, micro_batch=micro_batch, accumulation=accumulation, checkpointing=checkpointing)


def _checkpointing(batches: LongestBatches) -> list[bool]:
    """Off and on, as far as they can be chosen."""
    asked = batches.asked.checkpointing
    can = getattr(batches.trainer.model, "supports_gradient_checkpointing", False)
    return [False, True] if can and not asked else [asked]


def _longest_that_fits(batches: LongestBatches, setting: Setting) -> Setting | None:
    """`setting` with rows cut to the longest length that fits, of the halves of the longest row."""
    longest = batches.longest
    least = max(longest // SHORTEST_SHARE, SHORTEST_TRIED)
    lengths = (length for length in halves(longest) if least <= length < longest)
    shorter = (replace(setting, max_length=length) for length in lengths)
    return next((one for one in shorter if not any(outcome.problem for outcome in batches.run(one))), None)


def _overrides(setting: Setting, asked: Setting) -> str:
    """The words to type for `setting` in place of the one asked for."""
    words = []
    if setting.micro_batch != asked.micro_batch:
        words.append(batch_overrides(setting.micro_batch, setting.accumulation))
    if setting.eval_batch != asked.eval_batch:
        words.append(f"training.per_device_eval_batch_size={setting.eval_batch}")
    if setting.checkpointing != asked.checkpointing:
        words.append("training.gradient_checkpointing=true")
    if setting.max_length is not None:
        words.append(f"data.max_length={setting.max_length}")
    return " ".join(words)


def _in_words(shorter: Setting, batches: LongestBatches, config: TrainConfig) -> str:
    """The overrides for shorter rows, and how many rows that concerns."""
    assert shorter.max_length is not None
    words = _overrides(shorter, batches.asked)
    longer, total = batches.count_longer(shorter.max_length)
    if longer and config.data.on_overlong == "error":
        words += f" data.on_overlong={'drop' if 2 * longer <= total else 'truncate_prompt'}"
    kind = "packs of that length; " if config.data.packing != "none" else ""
    return f"{words} (tried just now; {kind}{longer:,} of {total:,} rows are longer)"


def _listed(heading: str, items: list[str]) -> str:
    return "\n".join([heading, *(f"  {item}" for item in items)]) if items else ""
