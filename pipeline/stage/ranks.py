"""The ranks of one training: which of them this process is, and a rendezvous through which they exchange values.

The launcher gives each process its rank in the environment: torchrun, another launcher that sets the same variables, or
`launch.py`. Rank 0 owns the stage's folder, its manifest and all printing; the others follow what it publishes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from capgap.schemas.errors import MachineError, SettingError
from capgap.schemas.run_optimization import OptimizationSettings

# Another stage may hold for this long a device that rank 0 waits for.
_VALUE_TIMEOUT = timedelta(days=30)
# A rank may take this long over a checkpoint or the held-out text while the others wait for it.
_GROUP_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """The number of this process, and how many processes there are.

    Attributes:
        rank: Number of this process among those of all machines, counted from 0.
        world_size: Number of processes on all machines.
        local_rank: Number of this process on its machine, which is also the number of its GPU.
        local_size: Number of processes on this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0, which owns the folder."""
        return self.rank == 0

    @property
    def node(self) -> int:
        """Number of this process's machine; every machine has equally many processes."""
        return self.rank // self.local_size


def ranks_in_environment() -> Ranks | None:
    """Return the ranks that a launcher has set in the environment; None where this process is the only one.

    It is the only one where WORLD_SIZE is missing or 1, and no other variable names a rank above 0.

    Raises:
        MachineError: Some of the variables are missing, or they contradict one another.
    """
    names = {"rank": "RANK", "world_size": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_size": "LOCAL_WORLD_SIZE"}
    found = {field: os.environ[name] for field, name in names.items() if name in os.environ}
    is_first = all(found.get(field, "0") == "0" for field in ("rank", "local_rank"))
    if found.get("world_size", "1") == "1" and is_first:
        return None
    ranks = Ranks(**{field: int(value) for field, value in found.items() if value.isdigit()})
    sound = ranks.rank < ranks.world_size and ranks.local_rank < ranks.local_size
    whole = len(found) == len(names) and all(value.isdigit() for value in found.values())
    if not sound or not whole or ranks.world_size % ranks.local_size:
        raise MachineError(
            "the launcher's variables do not say which process this is",
            found=", ".join(f"{names[field]}={value}" for field, value in found.items()),
            expected=f"whole numbers in {', '.join(names.values())}, as torchrun sets them",
            fix="start with torchrun, or remove these variables",
        )
    return ranks


def require_shares(recipe: OptimizationSettings, num_ranks: int, section: str = "") -> None:
    """Refuse a training whose steps do not divide among its processes.

    Args:
        recipe: Settings of the training.
        num_ranks: Number of its processes.
        section: Section of the run file that holds the recipe, for errors.

    Raises:
        SettingError: The sequences of a step do not divide among the processes.
    """
    together = num_ranks * (recipe.micro_batch_sequences or 1)
    if recipe.batch_sequences % together:
        micro = f", {recipe.micro_batch_sequences} in a micro-batch" if recipe.micro_batch_sequences else ""
        raise SettingError(
            "a step does not divide among the devices",
            where=f"{section}.batch_sequences" if section else "batch_sequences",
            found=f"{recipe.batch_sequences} sequences on {num_ranks} devices{micro}",
            expected=f"a multiple of {together}",
            fix="change batch_sequences, micro_batch_sequences or the number of devices",
        )


class Rendezvous:
    """A key-value store through which the ranks of one stage exchange values, found through the environment.

    Args:
        ranks: Rank of this process among them.
        name: Name of the stage's instance; processes that torchrun started may meet for several, one after another.
    """

    def __init__(self, ranks: Ranks, name: str) -> None:
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        self.ranks = ranks
        store, _, _ = next(rendezvous("env://"))
        self._store = PrefixStore(name, store)

    def publish(self, key: str, value: Any = True) -> None:
        """Store a JSON value for the other ranks, which must be done only once for each key."""
        self._store.set(key, json.dumps(value))

    def wait_for(self, key: str) -> Any:
        """Wait until a rank has published the key, and return its value."""
        self._store.wait([key], _VALUE_TIMEOUT)
        return json.loads(self._store.get(key))

    def is_first_to_fail(self) -> bool:
        """Return whether no other rank has failed before, since only the first to fail reports why.

        Where the store is gone, only rank 0 counts as the first.
        """
        try:
            return bool(self._store.add("failed", 1) == 1)
        except RuntimeError:
            # the store ended with rank 0, which has reported the cause if it could
            return self.ranks.is_first

    @contextmanager
    def group(self, device: str) -> Iterator[None]:
        """Open torch's process group of these ranks while the block runs: gloo on CPUs, NCCL on GPUs."""
        import torch
        from torch import distributed

        on_gpu = device != "cpu"
        if on_gpu:
            torch.cuda.set_device(device)
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=self._store,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            timeout=_GROUP_TIMEOUT,
            device_id=torch.device(device) if on_gpu else None,
        )
        yield
        # left open after an error, because the other ranks may never answer
        distributed.destroy_process_group()
