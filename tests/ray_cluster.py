"""A real Ray of two nodes on this machine, for tests: each node is a `ray start` with all of its processes.

The second one has a GPU, which is a number to Ray: what is told to use it need not.

with RayCluster() as cluster:
    ray.init(cluster.address)
"""

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import psutil
import pytest
from slurm_cluster import MUST, free_ports, wait_until

CPUS = 2  # per node: jobs of these tests take one each, or say otherwise
HOST = "127.0.0.1"
OBJECTS = 80 * 2**20  # bytes
# No ray.init in the test's own process: Ray's warnings would be errors there.
PROGRAM = """
import json, logging, sys
import ray
ray.init(address=sys.argv[1], namespace="llmkit", log_to_driver=False, logging_level=logging.ERROR)
alive = [node for node in ray.nodes() if node["Alive"]]
groups = [one for one in ray.util.placement_group_table().values() if one["state"] != "REMOVED"]
print(json.dumps({
    "nodes": len(alive),
    "jobs": ray.util.list_named_actors(),
    "groups": len(groups),
    "free": ray.available_resources().get("CPU", 0),
}))
"""

# Of the nodes: `lo` is the one address that all of them have here.
VARIABLES = {"RAY_USAGE_STATS_ENABLED": "0", "GLOO_SOCKET_IFNAME": "lo", "RAY_AUTH_MODE": "token"}


class RayCluster:
    """A head and one more node; they end with the `with`. A node that has been killed is started again by `heal`."""

    def __enter__(self) -> Self:
        # Short: a socket's path is at most 107 bytes.
        self.base = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        port, client = free_ports(2)
        self.address, self.client_address = f"{HOST}:{port}", f"ray://{HOST}:{client}"
        self._nodes: dict[str, subprocess.Popen] = {}
        head = ["--head", f"--port={port}", f"--ray-client-server-port={client}", "--include-dashboard=false"]
        try:
            self._start("head", *head, f"--temp-dir={self.base}")
            wait_until(lambda: self.state()["nodes"] == 1, self.told, 60)
            self.heal()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._nodes):
            self.kill_node(name)
        shutil.rmtree(self.base, ignore_errors=True)

    def restart(self) -> None:
        """Begin anew with an empty cluster, at another address."""
        self.__exit__()
        self.__enter__()

    def heal(self) -> None:
        """Start the second node where it has been killed, and wait until both are there."""
        if "second" not in self._nodes:
            self._start("second", f"--address={self.address}", "--num-gpus=1", '--resources={"second": 1}')
            wait_until(lambda: self.state()["nodes"] == len(self._nodes), self.told, 60)

    def kill_node(self, name: str) -> None:
        """End a node as a power cut would: all of its processes, and what they have started."""
        node = self._nodes.pop(name)
        family = [psutil.Process(node.pid)]
        with contextlib.suppress(psutil.NoSuchProcess):
            family += family[0].children(recursive=True)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()
        psutil.wait_procs(family[1:], timeout=30)

    def state(self) -> dict:
        """How many nodes are alive, which of our jobs there are, how many placement groups, and how much room."""
        command, env = [sys.executable, "-c", PROGRAM, self.address], os.environ | VARIABLES
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
        return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"nodes": 0, "error": done.stderr}

    def names(self) -> list[str]:
        """The nodes that are alive."""
        return list(self._nodes)

    def processes_on(self, name: str) -> list[psutil.Process]:
        """All processes of a node."""
        return psutil.Process(self._nodes[name].pid).children(recursive=True)

    def told(self) -> str:
        """What the daemons have written, for the message of a test that fails."""
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(self.base.glob("*.out")))

    def _start(self, name: str, *words: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += [f"--node-ip-address={HOST}", f"--num-cpus={CPUS}", f"--object-store-memory={OBJECTS}", *words]
        with open(self.base / f"{name}.out", "ab") as output:
            self._nodes[name] = subprocess.Popen(command, env=os.environ | VARIABLES, stdout=output, stderr=output)


@pytest.fixture(scope="session")
def ray_token(closed_world: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A token for the clusters of these tests. Without one Ray writes one to the user's home (2.60)."""
    file = tmp_path_factory.mktemp("ray") / "token"
    file.write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
        yield


@pytest.fixture(scope="session")
def ray_cluster(ray_token: None) -> Iterator[RayCluster]:
    """A Ray of two nodes. Skips the test where Ray is not installed, unless LLMKIT_TEST_CLUSTERS is set."""
    if importlib.util.find_spec("ray") is None:
        reason = "Ray is not installed here: make cluster"
        assert MUST not in os.environ, reason
        pytest.skip(reason)
    with RayCluster() as cluster:
        yield cluster
