"""What says how good a model is beside its loss, each recipe its own: measured before training and after."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmkit.data.examples import Conversation, Preference
from llmkit.data.prepare import Split
from llmkit.training.generation import exact_match
from llmkit.training.preferences import preference_accuracy

if TYPE_CHECKING:
    from llmkit.training.session import Session


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A share between 0 and 1 of the rows that a model gets right."""

    name: str  # key of result.json
    label: str  # in the table at the end
    measure: Callable[[Split, int], float | None]  # over so many rows of a split; None where there are none to ask
    on_training_rows: bool = False  # else on the held-out ones

    def of(self, session: "Session") -> float | None:
        """The figure of the model as it is now; None where there is nothing to measure it on."""
        split = session.data.train if self.on_training_rows else session.data.validation
        count = session.config.evaluation.examples
        return self.measure(split, count) if split and count else None


def exact_match_figures(session: "Session") -> list[Figure]:
    """How many answers are, word for word, the expected ones."""

    def measure(split: Split, count: int) -> float | None:
        asked = questions(split, count)
        return exact_match(session.generator.answer(asked)) if asked else None

    return [
        Figure(name="exact_match", label="exact match, held out", measure=measure),
        Figure(name="train_exact_match", label="exact match, trained on", measure=measure, on_training_rows=True),
    ]


def preference_figures(session: "Session") -> list[Figure]:
    """How many chosen answers are likelier than the rejected ones."""

    def measure(split: Split, count: int) -> float | None:
        return preference_accuracy(session.trainer, split.dataset, count)

    return [
        Figure(name="preference_accuracy", label="chosen preferred, held out", measure=measure),
        Figure(
            name="train_preference_accuracy",
            label="chosen preferred, trained on",
            measure=measure,
            on_training_rows=True,
        ),
    ]


def questions(split: Split, count: int) -> list[Conversation]:
    """The first `count` examples, each up to and with its last answer in words; of a pair the chosen one."""
    cut = []
    for example in split.examples(count):
        turns = [*example.prompt, *example.chosen] if isinstance(example, Preference) else example.messages
        spoken = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and turn.get("content")]
        if spoken and spoken[-1]:  # an answer to something
            cut.append(Conversation(messages=turns[: spoken[-1] + 1], tools=example.tools))
    return cut
