"""Which device a stage runs on, and the name by which all processes of the machine know it."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from capgap.pipeline.stage.gpus import order_is_known, parse_listing, visible
from capgap.schemas.errors import MachineError

_LISTING = ("nvidia-smi", "-L")
_LISTING_TIMEOUT_S = 60


def resolve_device(setting: str) -> str:
    """`cpu` or `cuda:0` for the run file's `device`.

    Raises:
        MachineError: a GPU is asked for and there is none.
    """
    if setting == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda:0"
    if setting == "cuda":
        raise MachineError("no GPU can be used", where="device", found="cuda", fix="set device to cpu or auto")
    return "cpu"


def devices_from(device: str, count: int) -> list[str]:
    """The devices of whatever takes `count` of them; the CPU is one, however many do its work."""
    return [device][:count] if device == "cpu" else [f"cuda:{i}" for i in range(count)]


def machine_kind(device: str) -> str:
    """What decides the order of sums beside the versions: the GPU, or the processor and its number of threads."""
    import torch

    if device != "cpu":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads"


def device_identity(device: str) -> str:
    """A name of the device that is the same for every process of the machine: `cpu`, or a UUID as a file's name.

    The driver's tool says which GPU or MIG slice `cuda:0` is. Where there is no such tool, or where GPUs differ and
    CUDA's order of them is its own, CUDA is asked; two slices of one GPU may then have one name, and wait for one
    another.

    Raises:
        MachineError: there are fewer devices.
    """
    if device == "cpu":
        return "cpu"
    number = int(device.removeprefix("cuda:"))
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = parse_listing(_listing())
    if gpus and order_is_known(gpus, setting, os.environ.get("CUDA_DEVICE_ORDER")):
        names = visible(gpus, setting)
    else:
        names = _names_from_cuda()
    if number >= len(names):
        raise MachineError(
            "too few devices",
            where=f"CUDA_VISIBLE_DEVICES: {'not set' if setting is None else setting}",
            found=f"{len(names)} that CUDA shows",
            expected=f"at least {number + 1}",
            fix="lower cache.tensor_parallel or train.num_devices, or show more",
        )
    return names[number].lower().replace("/", "_")


def _listing() -> str:
    try:
        done = subprocess.run(_LISTING, capture_output=True, text=True, timeout=_LISTING_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _names_from_cuda() -> list[str]:
    import torch

    return [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(torch.cuda.device_count())]
