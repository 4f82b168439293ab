"""Which jobs the swept values of a command make (`sweeper=`), and which of them are stopped early (`early_stop=`)."""

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


@dataclass(kw_only=True, slots=True)
class EarlyStopConfig:
    """Which runs of a sweep are stopped before their last step; see training/rungs.py."""

    name: str = setting("none", "The option of the early_stop group.")
    metric: str | None = setting(
        None,
        "What runs are compared by: eval_loss, or a figure on held-out rows, the loss deciding between equal ones; "
        "unset: the objective if it is such a figure, else eval_loss.",
    )
    min_steps: float = setting(
        0.1, "The first rung, where runs are compared: steps, or below 1 a share of the run.", gt=0
    )
    reduction_factor: int = setting(
        3, "Each next rung is that many times as far, and one run in so many goes on to it.", ge=2
    )


# Option of the sweeper group -> the dataclass that types it.
SWEEPERS: dict[str, type] = {"grid": GridSweeperConfig, "random": RandomSweeperConfig}
