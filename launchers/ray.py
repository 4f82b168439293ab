"""`launcher=ray`: runs as detached actors of a Ray cluster, one per run, which outlive this process.

What an actor does is in ray_job.py. The address of its cluster is part of a job's id, `NAME@ADDRESS`, so that any shell
asks the cluster that has it. How it is reached is in ray_connection.py.
"""

import contextlib
import os
import uuid
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.config import TrainConfig
from llmkit.config.launcher_schema import RayLauncherConfig
from llmkit.errors import ConfigError
from llmkit.launchers.cluster import SchedulerError, Seen, Submitted
from llmkit.launchers.job_record import QUEUED, RUNNING
from llmkit.launchers.local import package_parent
from llmkit.launchers.ray_connection import address_of, connected, listens, ray_module, reason

LOCAL = "local"
# An actor that has a node answers at once; one that waits for a node cannot.
ANSWER = 2.0  # seconds
GB = 1e9


def connect(launcher: RayLauncherConfig) -> "Ray":
    """The cluster at `launcher.address`, which is asked only later. Raises ConfigError if Ray is not installed."""
    ray_module()
    return Ray(launcher)


@dataclass(frozen=True, slots=True)
class Ray:
    """The Ray clusters that a config's jobs are in: that of `launcher.address` for new ones."""

    launcher: RayLauncherConfig

    @property
    def outlives_driver(self) -> bool:
        """Whether jobs go on when this process ends; a Ray of its own ends with it."""
        return self.launcher.address != LOCAL

    def check(self, config: TrainConfig) -> None:
        """Raise ConfigError for what no node can ever run. Ray itself would wait for such a node without a word."""
        if self.outlives_driver:
            with self._wanted() as ray:
                refuse_impossible(config, ray.nodes())

    def submit(self, configs: Sequence[TrainConfig], run_dirs: Sequence[Path]) -> list[Submitted]:
        """One actor per run; see `cluster.Scheduler`. A Ray of our own is started here."""
        from llmkit.launchers.ray_job import remove_job

        with self._wanted() as ray:
            nodes, address = ray.nodes(), address_of(ray, self.launcher.address)
            if not self.outlives_driver:
                for config in configs:
                    refuse_impossible(config, nodes)
            names: list[str] = []
            try:
                for config, run_dir in zip(configs, run_dirs, strict=True):
                    names.append(uuid.uuid4().hex[:8])
                    _start(ray, config, run_dir, names[-1], gpus_there=_has_gpus(nodes))
            except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                for name in names:
                    remove_job(name)
                raise ConfigError(f"launcher=ray: Ray refuses the job: {reason(error)}") from error
        return [Submitted(job_id=f"{name}@{address}") for name in names]

    @contextlib.contextmanager
    def _wanted(self) -> Iterator[Any]:
        """Ray, connected to the cluster of the config. Raises ConfigError if it does not answer."""
        try:
            with connected(self.launcher.address, start=not self.outlives_driver) as ray:
                yield ray
        except SchedulerError as error:
            raise ConfigError(f"launcher.address={self.launcher.address}: {error}") from error

    def seen(self, job_ids: Collection[str]) -> dict[str, Seen]:
        """What the actors say of themselves; one that is gone has ended."""
        found: dict[str, Seen] = {}
        for address, names in _by_address(job_ids).items():
            if not self.outlives_driver and not listens(address):
                continue  # it has ended with its driver, and so have its jobs
            with connected(address) as ray:
                found |= {f"{name}@{address}": seen for name, seen in _ask(ray, names).items()}
        return found

    def cancel(self, job_ids: Collection[str]) -> None:
        """Ask what runs to save and stop, and remove what waits."""
        for address, names in _by_address(job_ids).items():
            if not self.outlives_driver and not listens(address):
                continue
            with connected(address) as ray:
                _cancel(ray, names)


def _by_address(job_ids: Collection[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for job_id in job_ids:
        name, _, address = job_id.partition("@")
        found.setdefault(address, []).append(name)
    return found


def _start(ray: Any, config: TrainConfig, run_dir: Path, name: str, *, gpus_there: bool) -> None:
    """Have Ray start one run's actor when there is room for it; that of several nodes is in the first of their bundles.

    Ray starts it again for as long as it takes; how often is enough it knows itself, from job.json.
    """
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from llmkit.launchers.ray_job import RayJob

    launcher: RayLauncherConfig = config.launcher
    need, hardware = resources(config, gpus_there=gpus_there), config.hardware
    options = as_options(need) | {"runtime_env": _runtime_env(config, need)}
    first: dict[str, Any] = {}
    if hardware.num_nodes > 1:
        bundles = [{kind: amount for kind, amount in need.items() if amount}] * hardware.num_nodes
        group = ray.util.placement_group(bundles, strategy=launcher.placement_strategy, name=name, lifetime="detached")
        first["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
    actor = ray.remote(RayJob).options(name=name, lifetime="detached", max_restarts=-1, **options, **first)
    actor.remote(name, str(run_dir), nodes=hardware.num_nodes, max_retries=launcher.max_retries, options=options)


def resources(config: TrainConfig, *, gpus_there: bool) -> dict[str, float]:
    """What a run needs on each of its nodes, by Ray's names of resources.

    Args:
        gpus_there: whether the cluster has GPUs, which a run takes then, one per process.
    """
    launcher: RayLauncherConfig = config.launcher
    hardware, gpus = config.hardware, launcher.num_gpus
    if gpus is None:
        wants = hardware.device == "cuda" or (hardware.device == "auto" and gpus_there)
        gpus = hardware.num_processes if wants else 0
    cpus = hardware.num_processes if launcher.num_cpus is None else launcher.num_cpus
    need: dict[str, float] = {"CPU": cpus, "GPU": gpus}
    if launcher.mem_gb is not None:
        need["memory"] = launcher.mem_gb * GB
    return need | launcher.resources


def as_options(need: dict[str, float]) -> dict[str, Any]:
    """Resources as Ray's actors are given them."""
    own = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    options: dict[str, Any] = {option: need[kind] for kind, option in own.items() if kind in need}
    return options | {"resources": {kind: amount for kind, amount in need.items() if kind not in own}}


def _runtime_env(config: TrainConfig, need: dict[str, float]) -> dict[str, Any]:
    """Ray's own runtime_env: the user's, llmkit where it is here, and no more threads and GPUs than were asked for."""
    launcher: RayLauncherConfig = config.launcher
    given = dict(launcher.runtime_env)
    threads = max(int(need["CPU"]) // config.hardware.num_processes, 1)
    variables = {
        "PYTHONPATH": f"{package_parent()}{os.pathsep}${{PYTHONPATH}}",
        "OMP_NUM_THREADS": str(threads),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    if not need["GPU"]:
        variables["CUDA_VISIBLE_DEVICES"] = ""  # else all that the node has would be seen
    user = {key: str(value) for key, value in given.pop("env_vars", {}).items()}
    return given | {"env_vars": variables | user}


def refuse_impossible(config: TrainConfig, nodes: Sequence[dict[str, Any]]) -> None:
    """Raise ConfigError, saying what there is, if these nodes (`ray.nodes()`) can never have room for a run."""
    launcher: RayLauncherConfig = config.launcher
    if not launcher.check_resources:
        return
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    need = resources(config, gpus_there=_has_gpus(nodes))
    room = [_times(need, have) for have in alive]
    if launcher.placement_strategy == "STRICT_SPREAD":
        room = [min(one, 1) for one in room]
    wanted = config.hardware.num_nodes
    if sum(room) >= wanted:
        return
    kinds = Counter(_shown(have) for have in alive)
    there = "; ".join(f"{count} node{'s' if count > 1 else ''} with {kind}" for kind, count in sorted(kinds.items()))
    of = f"{wanted} nodes with {_shown(need)} each" if wanted > 1 else f"a node with {_shown(need)}"
    raise ConfigError(
        f"launcher=ray: the run needs {of}, and this cluster has {there or 'no node'}; ask for less "
        "(launcher.num_cpus, num_gpus, mem_gb, resources), or set launcher.check_resources=false where nodes are added "
        "as they are needed."
    )


def _times(need: dict[str, float], have: dict[str, float]) -> int:
    """How often a node has what is needed; once, if that is nothing."""
    return min((int(have.get(kind, 0) / amount + 1e-6) for kind, amount in need.items() if amount), default=1)


def _shown(kinds: dict[str, float]) -> str:
    """Resources in words, without those that Ray keeps for itself."""
    words = []
    for kind, amount in sorted(kinds.items()):
        if kind == "memory":
            words.append(f"memory {amount / GB:.1f} GB")
        elif amount and kind != "object_store_memory" and not kind.startswith("node:"):
            words.append(f"{kind} {amount:g}")
    return ", ".join(words) or "nothing"


def _has_gpus(nodes: Sequence[dict[str, Any]]) -> bool:
    return any(node["Alive"] and node["Resources"].get("GPU") for node in nodes)


def _ask(ray: Any, names: Collection[str]) -> dict[str, Seen]:
    answers, lost = _call(ray, "state", names)
    said, _ = ray.wait(list(answers.values()), num_returns=len(answers), timeout=ANSWER) if answers else ([], [])
    found = {name: Seen(state=RUNNING, detail="does not answer") for name in _actors(ray, lost)} if lost else {}
    for name, answer in answers.items():
        found[name] = Seen(state=QUEUED, detail="waits for room")
        if answer in said:
            try:
                state, detail = ray.get(answer)
                found[name] = Seen(state=state, detail=detail)
            except ray.exceptions.ActorUnavailableError:
                found[name] = Seen(state=QUEUED, detail="its node is lost; Ray starts it again")
            except ray.exceptions.RayActorError:  # it has just ended
                del found[name]
    return found


def _call(ray: Any, method: str, names: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """The answers to come of the actors that have not ended, and the names of those that cannot even be called.

    Through ray:// an actor that ends in this moment is an error of the system's (2.60).
    """
    answers, lost = {}, []
    for name, actor in _actors(ray, names).items():
        try:
            answers[name] = getattr(actor, method).remote()
        except ray.exceptions.RayError:
            lost.append(name)
    return answers, lost


def _actors(ray: Any, names: Collection[str]) -> dict[str, Any]:
    """Handles of the actors that have not ended."""
    actors = {}
    for name in set(ray.util.list_named_actors()).intersection(names):
        with contextlib.suppress(ValueError):  # it has just ended
            actors[name] = ray.get_actor(name)
    return actors


def _cancel(ray: Any, names: Collection[str]) -> None:
    from llmkit.launchers.ray_job import remove_job

    answers, _ = _call(ray, "stop", names)
    if not answers:
        return
    said, _ = ray.wait(list(answers.values()), num_returns=len(answers), timeout=ANSWER)
    for name, answer in answers.items():
        try:
            if answer in said and ray.get(answer) is None:
                continue
        except ray.exceptions.RayActorError:
            pass
        remove_job(name)
