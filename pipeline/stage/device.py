"""The device that a stage runs on, and the name by which all processes of the machine know that device."""

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
    """Return `cpu` or `cuda:0` for the value of the run file's `device`.

    Raises:
        MachineError: The setting asks for a GPU, and none can be used.
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
    """Return the first `count` devices of the kind of `device`. The CPU is one device, whatever number is asked for."""
    return [device][:count] if device == "cpu" else [f"cuda:{i}" for i in range(count)]


def machine_kind(device: str) -> str:
    """Return what decides the order of sums, beside the versions: the GPU, or the processor and its thread count."""
    import torch

    if device != "cpu":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """Return the processor's model as Linux names it, or its architecture where Linux gives no name."""
    return _cpu_info("model name") or platform.machine()


def cpu_has(*extensions: str) -> bool:
    """Return whether this processor has at least one of these instruction sets, and True where that is not known.

    The names are those of Linux, which lists them under `flags` for x86 alone. Nothing is known of other processors.
    """
    flags = _cpu_info("flags").split()
    return not flags or not set(extensions).isdisjoint(flags)


def multiplies(device: str, dtype: str) -> bool:
    """Return whether the device has instructions for products of `bfloat16` or `float16` numbers.

    A CPU without them computes such a product number by number: the same multiplication took over 100 times as long in
    bfloat16 as in float32 on a processor with AVX2 alone.
    """
    if device != "cpu" or dtype not in ("bfloat16", "float16"):
        return True
    import torch

    asked = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}[dtype]
    # a build without oneDNN has no such function, and nothing is known of its products
    known = getattr(torch.ops.mkldnn, asked, None)
    return known is None or bool(known())


def warn_of_slow_products(what: str, device: str, dtype: str, fix: str) -> None:
    """Log a warning if a computation takes many times as long as in float32 because of its dtype.

    Args:
        what: Name of the model or setting that computes in that dtype, as the start of a sentence.
        device: Device of the computation.
        dtype: Float type of the computation, for example `bfloat16`.
        fix: Advice to the user, as the end of a sentence.
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
    """Return a name of the device that is the same in every process of the machine: `cpu`, or a UUID fit for a file.

    `nvidia-smi` says which GPU or MIG slice `cuda:0` is. CUDA is asked instead where that tool is missing, or where the
    GPUs differ and CUDA numbers them in an order of its own. Two slices of one GPU may then share a name, so that
    their stages wait for each other.

    Raises:
        MachineError: There are fewer devices than the number in `device` needs.
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
            found=f"{len(names)} visible to CUDA",
            expected=f"at least {number + 1}",
            fix="lower cache.tensor_parallel or train.num_devices, or make more devices visible",
        )
    return names[number].lower().replace("/", "_")


def _cpu_info(name: str) -> str:
    """Return the value of an entry in /proc/cpuinfo for the first core; empty where there is none."""
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
