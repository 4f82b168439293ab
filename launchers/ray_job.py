"""What Ray runs for a job: an actor that starts the run on its node, and again when a node is lost.

The run is never inside the actor: `python -m llmkit.launchers.ray_job RUN_DIR RANK NODES RENDEZVOUS` is one node of it,
a process that the actor starts, asks to stop, and that dies with it. A job of several nodes has one such actor with one
more for every other node, each in its bundle of a placement group.

Ray starts a lost actor again on another node; the run then goes on from its newest checkpoint, as soon as what is left
of the old one has let go of the run directory.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from llmkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED
from llmkit.launchers.job_record import CANCELLED, ENDED, QUEUED, RUNNING, JobRecord
from llmkit.launchers.local import worker_environment
from llmkit.launchers.on_node import Place, run_on_node
from llmkit.processes import die_with_parent

SAVING = 120.0  # seconds that a run has to save when it is asked to stop; then it is ended
HANGING = 30.0  # the same where a node is lost: the ranks wait for those that are gone, and cannot save
NOTICE = 60.0  # seconds in which Ray has noticed that a node is lost, once the other nodes' ranks fail
GLANCE = 0.5  # seconds between two looks at what has been started


class RayJob:
    """The actor of a job. It works in a thread, so that it always answers; when all is over it removes itself.

    Args:
        name: its own, among Ray's actors.
        options: Ray's options for the actors of the other nodes.
    """

    def __init__(self, name: str, run_dir: str, *, nodes: int, max_retries: int, options: dict[str, Any]):
        self.name, self.run_dir = name, Path(run_dir)
        self.nodes, self.max_retries, self.options = nodes, max_retries, options
        self.asked = False  # to stop
        self.said = (QUEUED, "waits for the other nodes") if nodes > 1 else (RUNNING, f"on {socket.gethostname()}")
        self.here: NodeProcess | None = None
        self.others: list[Any] = []
        threading.Thread(target=self._work, daemon=True).start()

    def state(self) -> tuple[str, str]:
        """How the job is, and where or why."""
        return self.said

    def stop(self) -> None:
        """Have the run save its step and end, on all nodes."""
        self.asked = True
        if self.here is not None:
            self.here.stop(SAVING)
        for other in self.others:
            other.stop.remote(SAVING)

    def _work(self) -> None:
        try:
            self._run()
        except Exception:
            self._end(EXIT_FAILED, traceback.format_exc(limit=-1).splitlines()[-1])
        finally:
            self._leave()

    def _run(self) -> None:
        while True:
            record = self._record()
            if record is not None and record.state == ENDED and record.exit_code != EXIT_PREEMPTED:
                return  # its node was lost while it was being removed; one that was preempted with its node goes on
            if record is not None and record.starts > self.max_retries:
                why = f"its node was lost once more than launcher.max_retries={self.max_retries} allows"
                self._end(EXIT_FAILED, why)
                return
            code, lost = self._start()
            if self.asked or not lost:
                record = self._record()
                if record is not None and record.state != ENDED:  # else the run could say so itself
                    self._end(*((EXIT_PREEMPTED, CANCELLED) if self.asked else _verdict(code)))
                return

    def _start(self) -> tuple[int, bool]:
        """Run all nodes to their end; returns the first node's exit code, and whether another one was lost."""
        if self.nodes == 1:
            self.here = NodeProcess(self.run_dir, asked=self.asked)
            return self.here.wait(), False
        import ray

        meeting = f"{ray.util.get_node_ip_address()}:{_free_port()}"
        self.others = [self._other(rank) for rank in range(1, self.nodes)]
        waiting = [other.ready.remote() for other in self.others]
        while waiting and not self.asked:
            ready, waiting = ray.wait(waiting, timeout=GLANCE)
            with contextlib.suppress(ray.exceptions.RayActorError):  # it shows as soon as it is to run
                ray.get(ready)
        if self.asked:
            return EXIT_PREEMPTED, False
        self.said = (RUNNING, f"on {socket.gethostname()} and {self.nodes - 1} more")
        runs = [
            other.run.remote(str(self.run_dir), rank, self.nodes, meeting)
            for rank, other in enumerate(self.others, start=1)
        ]
        self.here = NodeProcess(self.run_dir, "0", str(self.nodes), meeting, asked=self.asked)
        lost = False
        while (code := self.here.poll()) is None:
            if not lost and (lost := _is_lost(runs, timeout=0)):
                self.here.stop(HANGING)
            time.sleep(GLANCE)
        lost = lost or (code not in (EXIT_DONE, EXIT_PREEMPTED) and _is_lost(runs, timeout=NOTICE))
        self._end_others(runs)
        self.said = (QUEUED, "lost a node; waits for another") if lost else self.said
        return code, lost

    def _other(self, rank: int) -> Any:
        """The actor of another node, in that node's bundle."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = ray.util.get_placement_group(self.name)
        bundle = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
        # One call is to run the node, another to stop it meanwhile.
        return ray.remote(OtherNode).options(scheduling_strategy=bundle, max_concurrency=2, **self.options).remote()

    def _end_others(self, runs: list[Any]) -> None:
        """The other nodes end with the first; what hangs there is ended."""
        import ray

        for other in self.others:
            other.stop.remote(HANGING)
        ray.wait(runs, num_returns=len(runs), timeout=2 * HANGING)
        for other in self.others:
            ray.kill(other)
        self.others = []

    def _record(self) -> JobRecord | None:
        """This job's; None while the driver has not written it."""
        record = JobRecord.read(self.run_dir)
        return record if record is not None and record.job_id.startswith(f"{self.name}@") else None

    def _end(self, code: int, why: str) -> None:
        """Write how the job ended, where the run has not."""
        if (record := self._record()) is not None:
            record.state, record.exit_code, record.ended = ENDED, code, why
            record.write(self.run_dir)

    def _leave(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if self.nodes == 1:
            remove_job(self.name)
            return
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        place = {"lifetime": "detached", "num_cpus": 0, "scheduling_strategy": here}
        remover = ray.remote(JobRemover).options(name=f"{self.name}-remover", get_if_exists=True, **place)
        while True:  # until it has ended this process
            remover.remote(self.name)
            time.sleep(NOTICE)


class JobRemover:
    """The actor that removes a job of several nodes, and itself, from outside of that job's bundles.

    The job's actor cannot: Ray ends it with the bundles, and once they are gone waits for ever to start it again
    (ray-project/ray#57726). So it is to end first, and somebody else is to give the bundles back.
    """

    def __init__(self, name: str):
        import ray

        remove_job(name)
        ray.kill(ray.get_runtime_context().current_actor)


class OtherNode:
    """The actor of every node of a job but the first."""

    def __init__(self) -> None:
        self.here: NodeProcess | None = None
        self.asked = False

    def ready(self) -> None:
        """Answered once there is room for it."""

    def run(self, run_dir: str, rank: int, nodes: int, meeting: str) -> int:
        """Run this node to its end; returns its exit code."""
        self.here = NodeProcess(Path(run_dir), str(rank), str(nodes), meeting, asked=self.asked)
        return self.here.wait()

    def stop(self, seconds: float) -> None:
        """See `NodeProcess.stop`."""
        self.asked = True
        if self.here is not None:
            self.here.stop(seconds)


class NodeProcess:
    """The process that runs one node of a run, and dies with this one."""

    def __init__(self, run_dir: Path, *place: str, asked: bool):
        command = [sys.executable, "-m", "llmkit.launchers.ray_job", str(run_dir), *place]
        self._process = subprocess.Popen(command, env=worker_environment(), stdin=subprocess.DEVNULL)
        if asked:  # while it was being started
            self.stop(SAVING)

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        return self._process.wait()

    def stop(self, seconds: float) -> None:
        """Ask it to save and end; what still runs after so many seconds is ended."""
        self._process.terminate()
        timer = threading.Timer(seconds, self._process.kill)
        timer.daemon = True
        timer.start()


def remove_job(name: str) -> None:
    """End a job's actor for good, then give back its bundles; a job of a single node has none."""
    import ray

    with contextlib.suppress(ValueError):  # it has ended
        ray.kill(ray.get_actor(name))
    with contextlib.suppress(ValueError):  # there is no such group
        ray.util.remove_placement_group(ray.util.get_placement_group(name))


def main(argv: list[str]) -> int:
    """One node of a run; returns its exit code."""
    if not die_with_parent(int(os.environ["LLMKIT_DRIVER"]), signal.SIGKILL):
        return EXIT_PREEMPTED
    run_dir, rank, nodes, meeting = (*argv, "0", "1", "")[:4] if len(argv) == 1 else argv
    place = Place(rank=int(rank), nodes=int(nodes), rendezvous=meeting or None, host=socket.gethostname())
    # Whether another node was lost the actor finds out.
    return run_on_node(Path(run_dir), place, is_interrupted=lambda _code: place.nodes > 1)


def _verdict(code: int) -> tuple[int, str]:
    """The exit code of the contract for a node's process that could not say how it ended, and how that was."""
    return (code, "") if code >= 0 else (EXIT_FAILED, f"ended by {signal.Signals(-code).name}")


def _is_lost(runs: list[Any], *, timeout: float) -> bool:
    """Whether the actor of another node is gone, without its node having come to an end.

    Args:
        timeout: seconds to wait for nodes that have not ended.
    """
    import ray

    ended, _ = ray.wait(runs, num_returns=len(runs), timeout=timeout)
    for run in ended:
        try:
            ray.get(run)
        except ray.exceptions.RayActorError:
            return True
    return False


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
