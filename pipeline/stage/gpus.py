"""Names of GPUs that are the same in every process of a machine, whatever CUDA_VISIBLE_DEVICES shows the process.

    nvidia-smi -L --parse_listing--> GPUs and their MIG slices --visible--> names in the order of cuda:0, cuda:1, ...

A MIG slice is a device of its own: two stages may hold two slices of one GPU. A GPU that is cut into slices is not
listed beside them, because CUDA does not use it as a whole. The list comes from the driver's tool and not from CUDA, so
that a process which only waits for a device does not open it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_GPU = re.compile(r"^GPU (\d+): (.*) \(UUID: (GPU-[^)\s]+)\)")
_SLICE = re.compile(r"^\s+MIG .*\(UUID: (MIG-[^)\s]+)\)")
_INDEX = re.compile(r"[+-]?\d+")


@dataclass(frozen=True)
class Gpu:
    """One GPU of the machine.

    Attributes:
        index: The driver's index of the GPU.
        model: Name of the model, for example `NVIDIA H100 80GB HBM3`.
        uuid: UUID of the GPU, `GPU-...`.
        slices: UUIDs of its MIG slices, `MIG-...`; none where the GPU is not cut.
    """

    index: int
    model: str
    uuid: str
    slices: tuple[str, ...] = ()


def parse_listing(text: str) -> list[Gpu]:
    """Return the GPUs in what `nvidia-smi -L` prints; lines of other kinds are skipped."""
    found: list[Gpu] = []
    for line in text.splitlines():
        if gpu := _GPU.match(line):
            found.append(Gpu(int(gpu[1]), gpu[2], gpu[3]))
        elif found and (part := _SLICE.match(line)):
            last = found[-1]
            found[-1] = Gpu(last.index, last.model, last.uuid, (*last.slices, part[1]))
    return found


def visible(gpus: Sequence[Gpu], setting: str | None) -> list[str]:
    """Return the UUIDs of the devices that CUDA shows a process, in the order of CUDA's own numbers.

    CUDA shows a process only the first of several slices, and no whole GPU beside it (NVIDIA's MIG User Guide,
    CUDA Device Enumeration).

    Args:
        gpus: GPUs of the machine.
        setting: Value of CUDA_VISIBLE_DEVICES, None where it is not set: indices, or UUIDs of GPUs and slices, which
            may be shortened as long as they match only one device. As in CUDA, everything after an entry that matches
            no device is ignored, and no device is visible where one is named twice.
    """
    if setting is None:
        chosen = [name for gpu in gpus for name in _parts(gpu)]
    else:
        chosen = []
        for entry in setting.split(","):
            found = _named(gpus, entry.strip())
            if found is None:
                break
            chosen.append(found)
        if len(set(chosen)) < len(chosen):
            return []
    slices = [name for name in chosen if name.startswith("MIG-")]
    return slices[:1] or chosen


def order_is_known(gpus: Sequence[Gpu], setting: str | None, device_order: str | None) -> bool:
    """Return whether CUDA numbers the GPUs as the driver lists them; by default CUDA puts the fastest first."""
    by_uuid = setting is not None and not any(_INDEX.fullmatch(entry.strip()) for entry in setting.split(","))
    return by_uuid or device_order == "PCI_BUS_ID" or len({gpu.model for gpu in gpus}) <= 1


def _parts(gpu: Gpu) -> tuple[str, ...]:
    return gpu.slices or (gpu.uuid,)


def _named(gpus: Sequence[Gpu], entry: str) -> str | None:
    """Return the one device that the entry matches; None where it matches none or several."""
    if _INDEX.fullmatch(entry):
        # the index is the position in the list, which is the driver's index unless a container hides some GPUs
        number = int(entry)
        return _parts(gpus[number])[0] if 0 <= number < len(gpus) else None
    if not entry.upper().startswith(("GPU-", "MIG-")):
        return None
    whole = [gpu.uuid for gpu in gpus]
    every = [*whole, *(name for gpu in gpus for name in gpu.slices)]
    found = [name for name in every if name.lower().startswith(entry.lower())]
    if len(found) != 1:
        return None
    gpu = next((gpu for gpu in gpus if gpu.uuid == found[0]), None)
    return found[0] if gpu is None else _parts(gpu)[0]
