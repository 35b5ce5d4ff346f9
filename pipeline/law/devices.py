"""Where the workers of a grid run: one thread each on a CPU, GPUs of their own otherwise."""

from __future__ import annotations

import os

from capgap.pipeline.stage.device import resolve_device
from capgap.pipeline.stage.lease import new_cpu_group
from capgap.schemas.errors import MachineError, SettingError
from capgap.schemas.law_grid import LawGrid

# Measured: on a busy machine threads of one process wait for one another, and processes of one thread do not.
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def worker_environments(grid: LawGrid, device: str, num_workers: int | None) -> list[dict[str, str]]:
    """What each worker's environment is beside this process's own; as many as there are workers.

    Args:
        grid: the grid; it decides how many GPUs its stages take.
        device: `cpu`, or a GPU where there are some.
        num_workers: None for one a core, or as many as the GPUs allow.

    Raises:
        SettingError: fewer than one.
        MachineError: there are not so many GPUs.
    """
    if num_workers is not None and num_workers < 1:
        raise SettingError("no number of workers", where="--workers", found=num_workers, expected="at least 1")
    if device == "cpu":
        group = new_cpu_group(f"law {grid.name}")
        # a worker names its stages' output a log, whatever form the command's own lines have
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
    """How many `worker_environments` would give; raises as that."""
    return len(worker_environments(grid, resolve_device(grid.device), num_workers))


def gpus_of_a_stage(grid: LawGrid) -> int:
    """The most that any stage of the grid takes."""
    trained = [grid.train_settings(student).num_devices for student in grid.students]
    taught = [grid.teacher_settings(name).recipe.num_devices for name in grid.teachers]
    return max(grid.cache.num_devices * grid.cache.replicas, *trained, *taught)


def _visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES would name them."""
    import torch

    count = torch.cuda.device_count()
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(count)] if setting is None else [one.strip() for one in setting.split(",")][:count]
