"""How many runs of a pack train at a time: as many as make a step large enough for the device, and fit into memory."""

from dataclasses import dataclass
from typing import Any

from llmkit.training.longest_batch import row_lengths
from llmkit.training.memory import in_units

# Tokens of a run's own micro-batch from which on joint steps gain nothing: the device is busy. Seen with 25M parameters
# on two cores with AVX-512 (160 tokens: 0.95 to 1.0 times as fast). For GPUs both are guesses, as yet unmeasured.
BUSY_TOKENS = {"cpu": 128, "cuda": 4096}
# Tokens of a joint micro-batch up to which it gains by being longer (there: 40 tokens of each of ten runs, 1.6 times).
JOINT_TOKENS = {"cpu": 384, "cuda": 4096}


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Memory as the first run of a pack finds it, in bytes."""

    before: int  # in use before its longest batch, the base included
    needed: int  # at most, in that batch
    there: int
    kept: int  # of what is needed, what a run keeps between two steps: trained weights and the optimizer's state

    @property
    def each(self) -> int:
        """What a run takes beside the base."""
        return max(self.needed - self.before, 1)

    @property
    def left(self) -> int:
        """What is left beside the base."""
        return self.there - self.before

    @property
    def runs(self) -> int:
        """How many can train at a time, one at least."""
        return max(self.left // self.each, 1)

    def begun(self, training: int) -> int:
        """How many can be under way, of which so many train and the others wait at rungs."""
        return training + max(self.left - training * self.each, 0) // max(self.kept, 1)


@dataclass(frozen=True, slots=True)
class Width:
    """How many runs train at a time, and why."""

    runs: int
    why: str

    def in_words(self) -> str:
        return f"{at_a_time(self.runs)}: {self.why}"


def choose_width(trainer: Any, *, why_apart: str | None, asked: int | None, count: int, room: Room | None) -> Width:
    """The width of a pack of `count` runs, by what its first one to train is like.

    Args:
        why_apart: why they cannot be joined, if they cannot.
        asked: `launcher.width`.
    """
    args, rows = trainer.args, trainer.train_dataset
    if why_apart:
        return Width(1, why_apart)
    if "seq_lengths" in rows.column_names:
        return Width(1, "what keeps the examples of packed rows apart (data.packing) is said of a whole batch")
    sides = 2 if "chosen_ids" in rows.column_names else 1  # of a pair, one below the other
    tokens = max(int(row_lengths(rows).mean() * args.per_device_train_batch_size * sides), 1)
    device, said = args.device.type, f"a micro-batch has {tokens} tokens"
    is_busy = tokens >= BUSY_TOKENS[device]
    if asked:
        vain = f"; {said}, and joining them gains nothing from {BUSY_TOKENS[device]} tokens on" if is_busy else ""
        return Width(min(asked, count), f"launcher.width={asked}{vain}")
    if is_busy:
        return Width(1, f"{said}, which keep this device busy")
    gains = min(max(JOINT_TOKENS[device] // tokens, 1), count)
    if room is not None and room.runs < gains:
        return Width(room.runs, f"each takes {in_units(room.each)}, and {in_units(room.left)} are left beside the base")
    return Width(gains, f"{said}, and up to {JOINT_TOKENS[device]} together gain")


def at_a_time(runs: int) -> str:
    return "one after the other" if runs == 1 else f"{runs} at a time"
