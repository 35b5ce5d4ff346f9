"""Which device a stage runs on."""

from __future__ import annotations

from capgap.schemas.errors import MachineError


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
    """The devices of whatever takes `count` of them; the CPU is one, however many do its work.

    Raises:
        MachineError: the machine has fewer GPUs.
    """
    if device == "cpu":
        return [device]
    import torch

    if torch.cuda.device_count() < count:
        raise MachineError(
            "too few GPUs",
            where="device",
            found=torch.cuda.device_count(),
            expected=count,
            fix="lower train.num_devices or cache.tensor_parallel, or make more of them visible",
        )
    return [f"cuda:{i}" for i in range(count)]
