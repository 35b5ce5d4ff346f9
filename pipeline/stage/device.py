"""Which device a stage runs on, and the name by which all processes of the machine know it."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
from pathlib import Path

from capgap.pipeline.stage.events import event
from capgap.pipeline.stage.gpus import order_is_known, parse_listing, visible
from capgap.schemas.errors import MachineError

_CPU_INFO = Path("/proc/cpuinfo")
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
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The processor's model as Linux names it, or its architecture where it does not."""
    return _cpu_info("model name") or platform.machine()


def cpu_has(*extensions: str) -> bool:
    """Whether this processor has one of these instruction sets, as Linux names them; True where that is not known.

    Only x86's are listed under `flags`: of another processor nothing is known.
    """
    flags = _cpu_info("flags").split()
    return not flags or not set(extensions).isdisjoint(flags)


def multiplies(device: str, dtype: str) -> bool:
    """Whether the device has instructions for products in that float type, `bfloat16` or `float16`.

    A CPU without them computes such a product number by number: the same multiplication took over 100 times as long in
    bfloat16 as in float32 on a processor with AVX2 alone.
    """
    if device != "cpu" or dtype not in ("bfloat16", "float16"):
        return True
    import torch

    asked = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}[dtype]
    # a build without oneDNN has no such question, and nothing is known of its products
    known = getattr(torch.ops.mkldnn, asked, None)
    return known is None or bool(known())


def warn_of_slow_products(what: str, device: str, dtype: str, fix: str) -> None:
    """Say that something will take many times as long as in float32, where that is so.

    Args:
        what: works in that dtype, as a sentence begins with it: a model, or a setting.
        device: on which it does.
        dtype: a float type.
        fix: what to do about it.
    """
    if not multiplies(device, dtype):
        event(
            "slow_products",
            f"{what} works in {dtype}, for which this processor has no instructions: it takes many times as long as in "
            f"float32; {fix}",
            logging.WARNING,
            dtype=dtype,
        )


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


def _cpu_info(name: str) -> str:
    """What Linux says of the first core; empty where it says nothing."""
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def _listing() -> str:
    try:
        done = subprocess.run(_LISTING, capture_output=True, text=True, timeout=_LISTING_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _names_from_cuda() -> list[str]:
    import torch

    return [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(torch.cuda.device_count())]
