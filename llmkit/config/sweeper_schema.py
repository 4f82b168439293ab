"""The options of `sweeper=`, one dataclass each: which jobs the swept values of a command make."""

from dataclasses import dataclass

from llmkit.config.setting import setting


@dataclass(kw_only=True, slots=True)
class GridSweeperConfig:
    name: str = setting("grid", "The option of the sweeper group.")


@dataclass(kw_only=True, slots=True)
class RandomSweeperConfig:
    name: str = setting("random", "The option of the sweeper group.")
    n: int | None = setting(None, "How many jobs are drawn; more of them later keep those that are there.", ge=1)
    seed: int = setting(0, "Seed of what is drawn; that of the runs is `seed`.", ge=0)


# Option of the sweeper group -> the dataclass that types it.
SWEEPERS: dict[str, type] = {"grid": GridSweeperConfig, "random": RandomSweeperConfig}
