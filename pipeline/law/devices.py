"""Assigns devices to the workers of a grid: one thread each on a CPU, otherwise GPUs of their own."""

from __future__ import annotations

import os

from capgap.pipeline.stage.device import resolve_device
from capgap.pipeline.stage.lease import new_cpu_group
from capgap.schemas.errors import MachineError, SettingError
from capgap.schemas.law_grid import LawGrid

# On a busy machine the threads of one process wait for one another (measured); processes of one thread do not.
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def worker_environments(grid: LawGrid, device: str, num_workers: int | None) -> list[dict[str, str]]:
    """Return the environment variables that each worker adds to those of this process, one dictionary for each worker.

    Args:
        grid: The grid, which decides how many GPUs its stages take.
        device: `cpu`, or the name of a GPU.
        num_workers: Number of workers; None means one for each core, or as many as the GPUs allow.

    Raises:
        SettingError: Fewer than one worker was asked for.
        MachineError: There are too few GPUs.
    """
    if num_workers is not None and num_workers < 1:
        raise SettingError("too few workers", where="--workers", found=num_workers, expected="at least 1")
    if device == "cpu":
        group = new_cpu_group(f"law {grid.name}")
        # text in every case, because the failure's reason is searched in the worker's log as a line of text
        shared = {**_ONE_THREAD, **group, "CAPGAP_LOG_FORMAT": "text"}
        return [dict(shared) for _ in range(num_workers or len(os.sched_getaffinity(0)))]
    gpus, each = _visible_gpus(), gpus_of_a_stage(grid)
    most = len(gpus) // each
    wanted = num_workers or most
    if not 1 <= wanted <= most:
        raise MachineError(
            "too few GPUs",
            where="--workers",
            found=f"{len(gpus)} GPUs, {each} for a worker",
            expected=f"{wanted} workers" if wanted else "at least one worker",
            fix="start fewer workers, or lower num_devices, tensor_parallel or replicas",
        )
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each]), "CAPGAP_LOG_FORMAT": "text"}
        for i in range(wanted)
    ]


def num_workers_of(grid: LawGrid, num_workers: int | None) -> int:
    """Return the number of workers that `worker_environments` would give.

    Raises:
        SettingError: Fewer than one worker was asked for.
        MachineError: There are too few GPUs.
    """
    return len(worker_environments(grid, resolve_device(grid.device), num_workers))


def gpus_of_a_stage(grid: LawGrid) -> int:
    """Return the largest number of GPUs that a stage of the grid takes."""
    trained = [grid.train_settings(student).num_devices for student in grid.students]
    taught = [grid.teacher_settings(name).recipe.num_devices for name in grid.teachers]
    return max(grid.cache.num_devices * grid.cache.replicas, *trained, *taught)


def _visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(count)] if setting is None else [one.strip() for one in setting.split(",")][:count]
