"""`launcher=NAME`: start one run, or the runs of a sweep (`-m`), where the config says."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from llmkit import rundir
from llmkit.config import TrainConfig, resolve
from llmkit.config.launcher_schema import LocalLauncherConfig, PackedLauncherConfig
from llmkit.errors import ConfigError, LlmkitError
from llmkit.launchers import cluster, local, local_sweep
from llmkit.launchers.random_sweep import RandomSweeper
from llmkit.launchers.sweep import Sweep

HERE = {"local", "packed"}  # launchers whose runs are processes of this machine, begun by this one


def start_run(config: TrainConfig, run_dir: Path) -> int:
    """Start one run and see it to its end; returns the exit code of the contract."""
    if not (run_dir.parent / rundir.SWEEP).exists():
        for setting in _of_sweeps(config):
            print(f"warning: {setting} has no effect on a single run; it is for sweeps (-m).", file=sys.stderr)
    if config.launcher.name in HERE:
        cluster.refuse_held_elsewhere(config, run_dir)
        return local.run_here(config, run_dir)
    return cluster.run_there(config, run_dir)


def _of_sweeps(config: TrainConfig) -> Iterator[str]:
    """What a config sets that a single run does nothing with."""
    if isinstance(config.launcher, LocalLauncherConfig) and config.launcher.max_parallel is not None:
        yield "launcher.max_parallel"
    if isinstance(config.launcher, PackedLauncherConfig):
        yield "launcher=packed"
    if config.early_stop.name != "none":
        yield f"early_stop={config.early_stop.name}"


class SweepLauncher(Launcher):
    """Hydra's launcher for `-m`, for every `launcher=`."""

    sweep: ClassVar[Sweep | None] = None  # what the verb reads the exit code from

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `launch`."""
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs; every one gets a record, so that a failed one hides nothing."""
        directory = Path(self.config.hydra.sweep.dir)
        (directory / "multirun.yaml").unlink(missing_ok=True)  # Hydra's copy of what each job's config.yaml says
        configs = [
            resolve(self.context.config_loader.load_sweep_config(self.config, list(overrides)))
            for overrides in job_overrides
        ]
        SweepLauncher.sweep = sweep = _run_sweep(directory, job_overrides, configs, swept=self._drawn_keys())
        returns = []
        for job in sweep.jobs_of_this_command:
            record = JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)
            record.return_value = job.objective
            returns.append(record)
        return returns

    def _drawn_keys(self) -> list[str]:
        """The keys whose values are drawn (sweeper=random): of few jobs all may have drawn the same."""
        if self.config.sweeper.name != "random":
            return []
        parsed = OverridesParser.create().parse_overrides(list(self.config.hydra.overrides.task))
        return [override.key_or_group for override in parsed if override.is_sweep_override()]


# What `run_composed` makes known to Hydra.
HYDRA_PLUGINS: dict[str, type] = {"SweepLauncher": SweepLauncher, "RandomSweeper": RandomSweeper}


def _not_held(configs: Sequence[TrainConfig]) -> None:
    for config in configs:
        assert config.run_dir, "a sweep gives each job its directory"
        cluster.refuse_held_elsewhere(config, Path(config.run_dir))


def _is_at_work(run_dir: Path) -> bool:
    return rundir.is_locked(run_dir) or cluster.handed_over(run_dir) is not None


def _run_sweep(
    directory: Path, overrides: Sequence[Sequence[str]], configs: Sequence[TrainConfig], *, swept: Sequence[str]
) -> Sweep:
    names = {config.launcher.name for config in configs}
    if len(names) > 1:
        raise ConfigError(f"launcher={','.join(sorted(names))}: a sweep has one launcher; choose one of them.")
    here = names <= HERE
    with rundir.lock(directory):
        try:
            ready = _not_held if here else cluster.ready
            sweep = Sweep.plan(directory, overrides, configs, ready=ready, swept=swept)
        except LlmkitError:
            (directory / rundir.LOCK).unlink()
            with contextlib.suppress(OSError):  # not empty: what is there is somebody's
                directory.rmdir()
            raise
        sweep.complete_copies(is_at_work=_is_at_work)
        if here:
            local_sweep.run_all(sweep)
            sweep.finish()
        else:
            cluster.queue_sweep(sweep)
    if not here and configs[0].launcher.wait:
        cluster.follow_sweep(sweep)
    return sweep
