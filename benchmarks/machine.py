"""What a figure was measured on, and where it is kept."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from capgap.pipeline.stage.device import cpu_name, multiplies

RESULTS = Path(__file__).parent / "results"


def machine(device: str) -> dict[str, Any]:
    """Name and size of the device, and the versions that matter."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else cpu_name()
    return {
        "device": name,
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "liger-kernel": _version("liger-kernel"),
    }


def keep(name: str, device: str, figures: Any, folder: Path = RESULTS) -> Path:
    """Write the figures as data, under a name that says what they were measured on."""
    about = machine(device)
    path = folder / f"{name}-{slug_of(about['device'])}.json"
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": about, "figures": figures}, indent=1) + "\n")
    return path


def every_kept(name: str, folder: Path = RESULTS) -> Iterator[tuple[str, Any]]:
    """Device and content of each file that `keep` has written under that name."""
    for path in sorted(folder.glob(f"{name}-*.json")):
        content = json.loads(path.read_text())
        # figures of another name may begin alike
        if path.stem == f"{name}-{slug_of(content['machine']['device'])}":
            yield content["machine"]["device"], content


def mixed_precision(device: str) -> str:
    """The precision of a training: bfloat16 where the device multiplies in it, float32 where that would take hours."""
    return "bf16-mixed" if multiplies(device, "bfloat16") else "32-true"


@contextmanager
def caught(what: str, failed: list[str]) -> Iterator[None]:
    """Let what fails within the block not lose the rest: it is named in `failed` and shown."""
    try:
        yield
    except Exception as error:  # whatever a peer, a compiler or a device raises
        failed.append(f"{what}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        print(f"  FAILED {failed[-1]}", flush=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def slug_of(device: str) -> str:
    """A device's name as files have it."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
