"""`sweeper=random sweeper.n=20`: a sweep whose jobs draw the swept values, instead of making every combination.

    llmkit train sweeper=random sweeper.n=20 'training.learning_rate=tag(log,interval(1e-5,1e-3))' 'lora.r=choice(4,8)'

Job i depends on the seed, on i and on the swept keys with their definitions, and on nothing else: the first twenty of
`sweeper.n=30` are those of `sweeper.n=20`.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from llmkit.config.grammar import to_grammar
from llmkit.config.nodes import walk_schema
from llmkit.config.sweeper_schema import RandomSweeperConfig
from llmkit.errors import ConfigError

DIGITS = 3  # significant ones of a number that is drawn: enough to tell runs apart, few enough to read and to type
TAGS = ("log", "int")
# Draws that give a combination that is there already, in a row, before there is taken to be no other.
MOST_REPEATED = 10_000


class RandomSweeper(Sweeper):
    """Hydra's sweeper for `sweeper=random`."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `sweep`."""
        self.config, self.config_loader = config, hydra_context.config_loader
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Hand all jobs to the launcher at once. Raises ConfigError."""
        assert self.config is not None
        assert self.launcher is not None
        overrides = OverridesParser.create(config_loader=self.config_loader).parse_overrides(arguments)
        settings: RandomSweeperConfig = cast(Any, OmegaConf.to_object(self.config.sweeper))
        return self.launcher.launch(draw_jobs(overrides, n=settings.n, seed=settings.seed), initial_job_idx=0)


def draw_jobs(overrides: Sequence[Override], *, n: int | None, seed: int) -> list[list[str]]:
    """The overrides of `n` jobs, no two of them alike: a combination that was drawn before is drawn anew.

    Raises ConfigError, with all problems, for what cannot be drawn from.
    """
    # What chooses the jobs is no setting of a job: more of them later are those of before, and more.
    given = {one.get_key_element(): one for one in overrides if one.key_or_group.partition(".")[0] != "sweeper"}
    swept = {key: override for key, override in given.items() if override.is_sweep_override()}
    spaces, problems = {}, []
    for key, override in swept.items():
        try:
            spaces[key] = space_of(override)
        except ConfigError as error:
            problems += error.problems
    if not swept:
        problems.append(
            "sweeper=random: no key has values to draw from: lora.r=choice(4,8,16) or "
            "'training.learning_rate=tag(log,interval(1e-5,1e-3))'."
        )
    if n is None:
        problems.append("sweeper=random: say how many runs to draw, sweeper.n=20.")
    combinations = math.prod(space.size for space in spaces.values())
    if n is not None and spaces and n > combinations:
        problems.append(
            f"sweeper.n={n}: there are only {combinations:.0f} combinations; take sweeper.n={combinations:.0f}, more "
            "values, or sweeper=grid, which runs them all."
        )
    if problems or n is None:
        raise ConfigError(*problems)
    drawn = _distinct(spaces, n=n, seed=seed)
    return [
        [f"{key}={values[key] if key in values else one.get_value_element_as_str()}" for key, one in given.items()]
        for values in drawn
    ]


def _distinct(spaces: "dict[str, Space]", *, n: int, seed: int) -> list[dict[str, str]]:
    drawn: dict[tuple[str, ...], dict[str, str]] = {}
    for number in range(n):
        for attempt in range(MOST_REPEATED):
            # A generator for each key: another swept key leaves what is drawn for this one as it is.
            values = {
                key: space.draw(random.Random(f"{seed}/{number}/{attempt}/{key}")) for key, space in spaces.items()
            }
            if tuple(values.values()) not in drawn:
                break
        else:
            raise ConfigError(
                f"sweeper.n={n}: after {number} jobs nothing new is drawn; numbers have {DIGITS} significant digits. "
                "Take wider intervals or a smaller sweeper.n."
            )
        drawn[tuple(values.values())] = values
    return list(drawn.values())


class Space(Protocol):
    """What the values of a key are drawn from; `size` is how many there are."""

    @property
    def size(self) -> float: ...

    def draw(self, luck: random.Random) -> str:
        """A value in Hydra's grammar."""
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """Values that are equally likely."""

    values: tuple[str, ...]

    @property
    def size(self) -> float:
        return len(set(self.values))

    def draw(self, luck: random.Random) -> str:
        return luck.choice(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Numbers from `start` to `end`, both included; with `log` every factor is as likely as every other."""

    start: float
    end: float
    log: bool
    whole: bool

    @property
    def size(self) -> float:
        return self.end - self.start + 1 if self.whole else math.inf

    def draw(self, luck: random.Random) -> str:
        end = self.end + self.whole  # whole numbers are rounded down, the last one included
        if self.log:
            value = math.exp(luck.uniform(math.log(self.start), math.log(end)))
        else:
            value = luck.uniform(self.start, end)
        if self.whole:
            return str(min(max(math.floor(value), int(self.start)), int(self.end)))
        rounded = float(f"{value:.{DIGITS - 1}e}")
        return to_grammar(min(max(rounded, self.start), self.end))


def space_of(override: Override) -> Space:
    """What a swept key is drawn from. Raises ConfigError where that says nothing that can be drawn from."""
    sweep: Any = override.value()
    tags = set(getattr(sweep, "tags", ()))
    if strange := tags - set(TAGS):
        raise ConfigError(f"{override.input_line}: unknown tag {', '.join(sorted(strange))}; tags are log and int.")
    if isinstance(sweep, IntervalSweep):
        return _interval(override, sweep, tags)
    if tags:
        raise ConfigError(
            f"{override.input_line}: tags are for interval(FROM,TO); leave {', '.join(sorted(tags))} out."
        )
    values = tuple(override.sweep_string_iterator())
    if not values:
        raise ConfigError(f"{override.input_line}: there is no value in it.")
    return Choice(tuple(sorted(values)) if getattr(sweep, "shuffle", False) else values)


def _interval(override: Override, sweep: IntervalSweep, tags: set[str]) -> Interval:
    start, end = sweep.start, sweep.end
    assert start is not None
    assert end is not None
    field = dict(walk_schema()).get(override.key_or_group)
    whole = "int" in tags or (field is not None and field.type in (int, int | None))
    if whole and not (float(start).is_integer() and float(end).is_integer()):
        raise ConfigError(f"{override.input_line}: whole numbers lie between whole bounds.")
    if not start < end:
        raise ConfigError(f"{override.input_line}: interval(FROM,TO) goes from the smaller to the greater number.")
    if "log" in tags and start <= 0:
        raise ConfigError(f"{override.input_line}: a logarithmic interval begins above 0, not at {start:g}.")
    return Interval(start=start, end=end, log="log" in tags, whole=whole)
