"""The connection to a Ray cluster: how it is found, what it wants, and what is said where it does not answer.

A process that is connected to a cluster is ended by Ray when the cluster goes away (2.60: after a minute, with exit
code 1 and no exception), so this one is connected only while it asks.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmkit.errors import ConfigError
from llmkit.install_command import install_command
from llmkit.launchers.cluster import SchedulerError

NAMESPACE = "llmkit"  # of all our actors: one cluster serves many
KNOCK = 10.0  # seconds that a cluster may take to be reached at all
OBJECT_STORE = 80 * 2**20  # bytes, of a Ray of our own: close to the least that Ray takes, and we put nothing there


def ray_module() -> Any:
    """The module `ray`; its telemetry is off unless the environment says otherwise."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # What Ray does anyhow from now on; unset, it warns of it at every start (2.60).
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A cluster that was started where there is a token wants it, but Ray sends it only when told to (2.60).
    if "RAY_AUTH_MODE" not in os.environ and _has_token():
        os.environ["RAY_AUTH_MODE"] = "token"
    try:
        import ray
    except ImportError:
        raise ConfigError(
            f"launcher=ray needs Ray, which is not installed: {install_command('cluster', extra='cluster')}"
        ) from None
    return ray


def _has_token() -> bool:
    """Whether there is one for Ray's clusters, where Ray looks for it."""
    named = os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    return bool(named) or (Path.home() / ".ray" / "auth_token").is_file()


@contextlib.contextmanager
def connected(address: str, *, start: bool = False) -> Iterator[Any]:
    """Ray, connected to a cluster for as long as the block takes; a Ray of our own, once started, stays.

    Args:
        start: start a Ray of our own.

    Raises:
        SchedulerError: saying what was tried, if the cluster does not answer.
    """
    ray = ray_module()
    if ray.is_initialized():  # our own
        yield ray
        return
    options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
    if start:
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
    else:
        address = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
        if address != "auto" and not listens(address):
            raise SchedulerError(f"nothing answers at {address}.")
    try:
        try:
            ray.init(address=address, **options)
        except ConnectionAbortedError:
            # ray:// alone: the server that a cluster starts for each client has half a minute, too little at first for
            # a busy machine (2.60). The next one is there in a second.
            ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError, AssertionError, ray.exceptions.RayError) as error:
        if address == "auto":
            raise SchedulerError(
                "no Ray runs on this machine and RAY_ADDRESS is not set; name one (HOST:6379 from a machine of the "
                "cluster, ray://HOST:10001 from any other), or start one for this command: launcher.address=local."
            ) from error
        raise SchedulerError(
            f"the Ray at {address} cannot be used from here: {reason(error)} (HOST:PORT is for the cluster's own "
            "machines, ray://HOST:10001 for others; one with a token wants RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH)."
        ) from error
    try:
        yield ray
    finally:
        if not start:
            ray.shutdown()


def listens(address: str) -> bool:
    """Whether anybody listens at HOST:PORT or ray://HOST:PORT: Ray itself would take long to say no."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK).close()
    except (OSError, ValueError):
        return False
    return True


def address_of(ray: Any, asked: str) -> str:
    """Where any shell finds the cluster that we are connected to."""
    wanted = os.environ.get("RAY_ADDRESS", asked) if asked == "auto" else asked
    return wanted if wanted.startswith("ray://") else ray.get_runtime_context().gcs_address


def reason(error: BaseException) -> str:
    """The first line of what Ray says; the rest is advice for those who write programs with it."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
