"""A Ray cluster for one stage: started here and ended afterwards, or joined where RAY_ADDRESS names one."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capgap.pipeline.store.extras import adding
from capgap.pipeline.store.locks import ProcessLock
from capgap.schemas.errors import MachineError

# the smallest that Ray allows: only jobs and entries of shards pass through it
_OBJECT_STORE_BYTES = 80 << 20
_CPU, _GPU = "CPU", "GPU"


def joins_cluster() -> bool:
    """Return whether stages join the Ray cluster that RAY_ADDRESS names, instead of starting one on this machine."""
    return bool(os.environ.get("RAY_ADDRESS"))


@dataclass(frozen=True)
class Cluster:
    """A running Ray cluster.

    Attributes:
        ray: The module `ray`.
        num_cpus: Number of CPUs of each actor.
        num_gpus: Number of GPUs of each actor.
        logs: Folder of the logs of processes that were started here; None on a cluster that was joined.
    """

    ray: Any
    num_cpus: int
    num_gpus: int
    logs: Path | None

    def actor(self, kind: type, num_threads: int) -> Any:
        """Return the class as an actor with devices of its own, which Ray does not restart when it dies."""
        return self.ray.remote(
            num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_concurrency=num_threads, max_restarts=0
        )(kind)

    def keep_logs(self) -> str:
        """Copy the actors' output to where it can still be read after this process has ended, and return the place."""
        if self.logs is None:
            return "the logs of the Ray cluster"
        kept = tempfile.mkdtemp(prefix="capgap-replicas-")
        for path in self.logs.glob("worker-*"):
            with contextlib.suppress(OSError):
                shutil.copy(path, kept)
        return kept


def require_ray(setting: str, num_replicas: int) -> None:
    """Raise MachineError if Ray is not installed and more than one replica is asked for."""
    if num_replicas > 1 and importlib.util.find_spec("ray") is None:
        raise MachineError(
            "several replicas are started by Ray, which is not installed",
            where=setting,
            found=num_replicas,
            fix=f"run {adding('ray')}, or set {setting} to 1",
        )


@contextlib.contextmanager
def ray_cluster(num_actors: int, num_gpus: int, setting: str) -> Iterator[Cluster]:
    """Start or join a Ray cluster with room for `num_actors` actors of `num_gpus` GPUs each while the block runs.

    With 0 GPUs the CPUs are divided among the actors. Errors name `setting`. A cluster that is started here ends with
    the block, and with this process however that ends: the kernel kills its first processes, and their children end
    when they notice, the last ones after about a minute.

    Raises:
        MachineError: Ray is not installed, cannot be reached, or has no room.
    """
    if importlib.util.find_spec("ray") is None:
        raise MachineError(
            "Ray is not installed",
            where=setting,
            fix=f"run {adding('ray')}, or start slices (`--slice any`), which need no Ray",
        )
    joined = joins_cluster()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's agents check for the death of their parent at this interval, and end after five checks
    os.environ.setdefault("RAY_DASHBOARD_AGENT_CHECK_PARENT_INTERVAL_S", "1")
    if joined:
        # by default each attempt to connect prints a line on the terminal
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_folder())
        # Ray prints notices of deaths, which this package reports in its own events
        silent = stack.enter_context(Path(os.devnull).open("w"))
        stack.enter_context(contextlib.redirect_stdout(silent))
        stack.callback(ray.shutdown)
        _init(ray, folder, joined, num_actors, setting)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        num_cpus = _require_room(nodes, num_actors, num_gpus, setting)
        logs = None if joined else Path(folder, "session_latest", "logs").resolve()
        yield Cluster(ray, 0 if num_gpus else num_cpus, num_gpus, logs)


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """Make a folder for Ray's logs and sockets, whose paths must be short, and remove those that killed stages left."""
    parent = Path(os.environ.get("RAY_TMPDIR", "/tmp"))
    for old in parent.glob("capgap-ray-*/alive"):
        with contextlib.suppress(OSError), ProcessLock(old) as lock:
            if lock.exclusive():
                shutil.rmtree(old.parent)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="capgap-ray-", dir=parent, ignore_cleanup_errors=True)
        )
        stack.enter_context(ProcessLock(Path(folder, "alive"))).exclusive()
        yield folder


def _init(ray: Any, folder: str, joined: bool, num_actors: int, setting: str) -> None:
    started: dict[str, Any] = {"address": "auto"}
    if not joined:
        num_cpus = max(num_actors, len(os.sched_getaffinity(0)))
        started = {"address": "local", "num_cpus": num_cpus, "include_dashboard": False, "_temp_dir": folder}
        started |= {"object_store_memory": _OBJECT_STORE_BYTES}
    try:
        # actors take this folder as theirs and on their import path; it holds no `kernels` that would hide a package
        with contextlib.chdir(folder):
            ray.init(**started, log_to_driver=False, logging_level=logging.CRITICAL)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise MachineError(
            "Ray cannot be reached" if joined else "Ray cannot be started",
            where=f"RAY_ADDRESS: {os.environ['RAY_ADDRESS']}" if joined else setting,
            found=str(error).strip().split("\n")[0],
            fix="check the address, and RAY_AUTH_MODE if the cluster asks for a token" if joined else None,
        ) from None


def _require_room(nodes: list[dict[str, float]], num_actors: int, num_gpus: int, setting: str) -> int:
    """Return the number of CPUs of each actor, the largest that all of them can have."""
    if num_gpus:
        room = sum(int(node.get(_GPU, 0)) // num_gpus for node in nodes)
        if room < num_actors:
            raise MachineError(
                "too few GPUs",
                where=setting,
                found=f"room for {room} replicas of {num_gpus} GPUs",
                expected=num_actors,
                fix=f"lower {setting}, or name a cluster by RAY_ADDRESS",
            )
        return 0
    cpus = [int(node.get(_CPU, 0)) for node in nodes]
    for each in range(max(cpus, default=0), 0, -1):
        if sum(n // each for n in cpus) >= num_actors:
            return each
    raise MachineError("too few CPUs", where=setting, found=sum(cpus), expected=num_actors, fix=f"lower {setting}")
